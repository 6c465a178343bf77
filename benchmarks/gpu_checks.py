"""The parts of benchmarks/gpu.py that check correctness: parity, resume, waits, memory, ranks."""

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from decoding_report import n_same
from gpu_setup import KINDS, LLAMA, SHAPE, Facts, Setup, SkippedError, model_of, require, trainer_of
from machine import child_environment

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast.reading import prepare_for_decoding
from minigpt.generation.sampling import Sampler
from minigpt.presets import preset
from minigpt.settings import merge
from minigpt.training import distributed
from minigpt.training.trainer import Trainer
from minigpt.training.world import is_sharded


def parity(setup: Setup) -> Facts:
    """Compare logits and greedy tokens of the CPU and the device in float32, bfloat16 and int8."""
    pairs = [(kind, "float32") for kind in KINDS]
    pairs += [("llama", "bfloat16"), ("llama", "int8"), ("gpt2", "int8")]
    for kind, precision in pairs:
        with setup.attempt(f"{kind}, {precision}"):
            setup.facts[f"{kind}, {precision}"] = compared(setup, kind, precision)
    return {}


def compared(setup: Setup, kind: str, precision: str) -> str:
    """Compare a model on the CPU and on the device; return the differences in words."""
    n_new, prompt = setup.pick(32, 4), [5, 6, 7]
    sampling = SamplingConfig(max_new_tokens=n_new, temperature=0.0)
    logits, tokens = [], []
    for device in (torch.device("cpu"), setup.device):
        dtype = precision if precision == "bfloat16" else "float32"
        model = model_of(KINDS[kind], device, dtype)
        if precision == "int8":
            model = prepare_for_decoding(model, quantizes=True, joins=False)
        decoder = Decoder(model, prompt, max_new_tokens=n_new)
        logits.append(decoder.prompt_logits.cpu())
        tokens.append([step.token for step in decoder.generate(sampling, seed=0)])
    error = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    n_agreed = n_same(*tokens)
    limit = 0.05 if precision == "bfloat16" else 1e-4  # 8 bits of mantissa, and 24
    require(error < limit, f"logits differ by {error:.2g} times the largest")
    is_exact = precision == "bfloat16" or n_agreed == n_new
    require(is_exact, f"only {n_agreed} of {n_new} greedy tokens equal those of the CPU")
    return f"error {error:.1e}, {n_agreed} of {n_new} tokens"


def losses(trainer: Trainer, n_steps: int) -> list[float]:
    """Run training steps and return their losses."""
    found = []
    for _ in range(n_steps):
        trainer.take_step()
        found.append(trainer.metrics.last().loss)
    return found


def resume(setup: Setup) -> Facts:
    """Check that a checkpoint saved on one device resumes on the other with the same losses."""
    facts = {}
    for first, second in (("cpu", setup.device.type), (setup.device.type, "cpu")):
        run = {"max_steps": 6, "batch_size": 4, "dtype": "float32"}
        settings = {"model": SHAPE | LLAMA, "training": run | {"device": first}}
        names = f"{first}-straight", f"{first}-first"
        expected = losses(trainer_of(setup, names[0], settings), 6)
        started = trainer_of(setup, names[1], settings)
        found = losses(started, 3)
        for _ in started.checkpoints.evaluate_and_save():
            pass
        latest = started.folder.latest()
        assert latest is not None
        settings = merge(settings, {"training": {"device": second}})
        found += losses(trainer_of(setup, names[1], settings, resume_from=latest.folder), 3)
        error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        require(
            error < 1e-3, f"saved on {first}, resumed on {second}: losses differ by {error:.2g}"
        )
        facts[f"{first} to {second}"] = f"largest difference of the loss {error:.1e}"
    return facts


def dropout(setup: Setup) -> Facts:
    """Check that dropout depends on seed and step only: a resumed run equals an uninterrupted one.

    The losses without dropout show that dropout is applied.
    """
    run = {"max_steps": 6, "batch_size": 4, "dtype": "float32", "device": setup.device.type}
    settings = {"model": SHAPE | LLAMA | {"dropout": 0.5}, "training": run}
    expected = losses(trainer_of(setup, "dropout-straight", settings), 6)
    started = trainer_of(setup, "dropout-first", settings)
    found = losses(started, 3)
    for _ in started.checkpoints.evaluate_and_save():
        pass
    latest = started.folder.latest()
    assert latest is not None
    torch.manual_seed(99)  # the state of the global RNG must not matter
    found += losses(trainer_of(setup, "dropout-first", settings, resume_from=latest.folder), 3)
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    require(error < 1e-3, f"resumed, the losses differ by {error:.2g}")
    without = merge(settings, {"model": {"dropout": 0.0}})
    plain = losses(trainer_of(setup, "dropout-none", without), 6)
    effect = max(abs(a - b) for a, b in zip(plain, expected, strict=True))
    require(effect > 1e-2, f"dropout of 0.5 changes the losses by only {effect:.2g}")
    return {"resumed": f"difference of the loss {error:.1e}", "without": f"{effect:.1e}"}


@contextmanager
def sync_is_an_error(setup: Setup) -> Iterator[None]:
    """Make torch raise if the host waits for the GPU, or copies memory that is not pinned."""
    if not setup.is_cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waiting(setup: Setup) -> Facts:
    """Check that decode steps, sampling, and unlogged training steps never wait for the GPU."""
    model = model_of(LLAMA, setup.device)
    sampling = SamplingConfig(top_k=20, top_p=0.9, repetition_penalty=1.1)
    run = {"max_steps": 9, "batch_size": 4, "device": setup.device.type}
    method = "torch.cuda.set_sync_debug_mode" if setup.is_cuda else "not checked on this device"
    with setup.attempt("training step"):
        trainer = trainer_of(setup, "waiting", {"model": SHAPE | LLAMA, "training": run})
        trainer.take_step()
        with sync_is_an_error(setup):
            for _ in range(3):
                trainer.take_step()
        setup.facts["training step"] = method
    for name, compiles in {"eager": False, "compiled": True}.items():
        with setup.attempt(f"decoding and sampling, {name}"):
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=9, compile=compiles)
            sampler = Sampler(sampling, seeds=[0], device=setup.device, prompt=[5, 6, 7])
            # The first draw also samples the uniforms for the next tokens.
            tokens = sampler.draw(decoder.prompt_logits[None])
            tokens = sampler.draw(decoder.forward.feed(tokens[:, None]))
            with sync_is_an_error(setup):
                for _ in range(3):
                    tokens = sampler.draw(decoder.forward.feed(tokens[:, None]))
            setup.facts[f"decoding and sampling, {name}"] = method
    return {}


_LIMITS = {
    "cuda": "torch.cuda.set_per_process_memory_fraction(2**28 / "
    "torch.cuda.get_device_properties(0).total_memory)",
    "cpu": "import resource; n = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**28; "
    "resource.setrlimit(resource.RLIMIT_AS, (n, n))",
}


def memory_limit(setup: Setup) -> Facts:
    """Check that a run that runs out of memory, and one that can never fit, exit with 6."""
    words = ["train", str(setup.data), "--tokenizer", "bytes", "--max-steps", "2", "--name"]
    words += ["{}", "--device", setup.device.type, "--dtype", "float32", "--patience", "0"]
    facts = {}
    for name, limit, extra in (
        ("during the run", _LIMITS[setup.device.type], "--batch-size=128"),
        ("before it", "pass", "--batch-size=1000000"),
    ):
        call = [word.replace("{}", "memory") for word in words] + [extra]
        code = f"import sys, torch; {limit}; sys.argv[1:] = {call!r}; "
        code += "from minigpt.commands import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=setup.folder,
            env=child_environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        last = (done.stderr.strip().splitlines() or [""])[-1]
        require(done.returncode == 6, f"{name}: exit code {done.returncode}: {last}")
        facts[name] = f"exit code 6, {last}"
    return facts


def ranks(setup: Setup) -> Facts:
    """Check that two processes, replicated and sharded, have the losses of one."""
    if setup.is_cuda and torch.cuda.device_count() < 2:
        raise SkippedError("needs two GPUs")
    options = (
        "--tokenizer bytes --max-steps 4 --batch-size 4 --context-length 64 --n-layer 2 "
        "--dtype float32 --patience 0 --set training.log_every=1 --device"
    )
    words = ["train", str(setup.folder / "bytes.txt"), *options.split(), setup.device.type]
    trainer_of(setup, "text", {"model": SHAPE | LLAMA, "training": {"max_steps": 1}})
    found: dict[str, list[float]] = {}
    for name, n_ranks, extra in (("one", 1, []), ("ddp", 2, []), ("shard", 2, ["--shard"])):
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"] if n_ranks > 1 else []
        done = subprocess.run(
            [sys.executable, *launcher, "-m", "minigpt", *words, "--name", name, *extra],
            cwd=setup.folder,
            env=child_environment(1),
            capture_output=True,
            text=True,
            check=False,
        )
        require(done.returncode == 0, f"{name}: {done.stderr.strip()[-500:]}")
        lines = (setup.folder / "checkpoints" / name / "metrics.jsonl").read_text().splitlines()
        events = map(json.loads, lines)
        found[name] = [event["train_loss"] for event in events if "train_loss" in event]
        error = max(abs(a - b) for a, b in zip(found[name], found["one"], strict=True))
        require(error < 1e-3, f"{name}: losses differ by {error:.2g}")
    return {name: f"losses {values[0]:.4f} to {values[-1]:.4f}" for name, values in found.items()}


def shards(setup: Setup) -> Facts:
    """Check that FSDP2 in a group of one process, which needs only one GPU, has the same losses."""
    run = {"max_steps": 4, "batch_size": 4, "dtype": "float32", "device": setup.device.type}
    settings = {"model": SHAPE | LLAMA, "training": run}
    expected = losses(trainer_of(setup, "whole", settings), 4)
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = str(free_port.getsockname()[1])
    one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with mock.patch.dict(os.environ, one | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}):
        world = distributed.join()
        try:
            settings = merge(settings, {"training": {"shard": True}})
            trainer = trainer_of(setup, "shards", settings, world=world)
            is_split = is_sharded(next(trainer.model.parameters()))
            require(is_split, "the parameters are not sharded")
            found = losses(trainer, 4)
        finally:
            world.close()
    error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    require(error < 1e-3, f"losses differ by {error:.2g}")
    return {"one process": f"largest difference of the loss {error:.1e}"}


def warm_up(setup: Setup) -> Facts:
    """Check that nano, compiled, has no graph breaks through its context warm-up."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    n_steps = setup.pick(40, 4)
    run = {"max_steps": n_steps, "compile": True, "device": setup.device.type}
    own = {"model": {"vocab_size": 257}, "training": run}
    trainer = trainer_of(setup, "nano", merge(preset("nano"), own))
    lengths, seconds = [], []
    for _ in range(n_steps):
        lengths.append(trainer.context_length)
        seconds.append(setup.seconds_of(trainer.take_step))
    breaks = sum(counters["graph_break"].values())
    require(len(set(lengths)) == 2, f"the context did not grow: {sorted(set(lengths))}")
    require(breaks == 0, f"{breaks} graph breaks: {list(counters['graph_break'])[:1]}")
    speed = trainer.config.step_tokens / statistics.median(seconds[-max(1, n_steps // 4) :])
    return {
        "graph breaks": breaks,
        "graphs": counters["stats"]["unique_graphs"],
        "contexts": sorted(set(lengths)),
        "tokens/s": round(speed),
        "slowest step (it compiles), s": round(max(seconds), 1),
    }
