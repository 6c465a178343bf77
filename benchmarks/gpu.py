"""Everything that docs/gpu.md wants to know of a GPU, by one command, in under 8 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --gpt-fast DIR --nanogpt-checkout DIR --out gpu-results
    python benchmarks/gpu.py --device cpu --quick        # rehearse every part without a GPU

The parts run in the order below, what is right before what is fast. Each writes OUT/PART.json as
soon as it ends, and the command stops at the first part that fails (--keep-going: goes on). At the
end, one Markdown table has all results. Nothing begins after --minutes: what is left then is "not
run". The exit code is 1 if a part failed.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decoders
import throughput
import torch
import training
from decoders import Contender, Job, UnavailableError
from decoding_report import Measured, bandwidth_share, n_same
from machine import child_environment, machine_facts
from random_models import SHAPES, weights_read, write_random

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import ATTENTIONS, DataConfig, ModelConfig, RunConfig, SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast.quantize import quantize_int8
from minigpt.generation.sampling import Sampler
from minigpt.model.cost import peak_flops, training_flops_per_token
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import model_class
from minigpt.presets import preset
from minigpt.settings import build, merge
from minigpt.text.tokens import prepare
from minigpt.training.reports.memory import estimate_memory
from minigpt.training.trainer import Trainer

Facts = dict[str, Any]
TARGET = 1.4697  # nanoGPT's validation loss on tinyshakespeare, nats per character


@dataclass(frozen=True)
class Setup:
    """What every part is given."""

    device: torch.device
    is_quick: bool
    folder: Path
    """For files of the parts, which are deleted at the end."""
    data: Path
    """tinyshakespeare.txt, or a stand-in for it."""
    nanogpt_checkout: Path | None
    gpt_fast: str
    with_transformers: bool
    deadline: float
    """Time of the clock after which nothing begins."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the value for a measurement, or for its rehearsal."""
        return quick if self.is_quick else full

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], n_times: int) -> float:
        """Return the median time of a call, after one to warm up."""
        return statistics.median([self.seconds_of(call) for _ in range(n_times + 1)][1:])

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Return the time of one call."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started


class FailedError(Exception):
    """What a part found wrong."""


class SkippedError(Exception):
    """Why a part cannot run here."""


def require(condition: bool, what: str) -> None:
    if not condition:
        raise FailedError(what)


def machine(setup: Setup) -> Facts:
    """Facts of the machine, and the bandwidth of its memory, measured by a copy."""
    facts: Facts = machine_facts(setup.device.type, ["torch", "transformers", "triton"])
    facts["dtype"] = str(resolve_dtype("auto", setup.device))
    if setup.is_cuda:
        properties = torch.cuda.get_device_properties(setup.device)
        free, total = torch.cuda.mem_get_info(setup.device)
        facts |= {
            "GPUs": torch.cuda.device_count(),
            "compute capability": f"{properties.major}.{properties.minor}",
            "CUDA of torch": torch.version.cuda,
            "memory, GB": round(total / 1e9, 1),
            "free, GB": round(free / 1e9, 1),
        }
    facts["bandwidth, GB/s"] = round(bandwidth(setup) / 1e9, 1)
    return facts


def bandwidth(setup: Setup) -> float:
    """Return the bytes that a copy within the device's memory reads and writes in a second."""
    n_bytes = setup.pick(2**31, 2**20)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * n_bytes / setup.seconds(lambda: target.copy_(source), setup.pick(10, 1))


SHAPE = {"vocab_size": 257, "context_length": 64, "n_layer": 2, "d_model": 64}
LLAMA = {"n_head": 4, "n_kv_head": 2, "qk_norm": True}
KINDS: dict[str, Facts] = {
    "llama": LLAMA,
    "gpt2": {"family": "gpt2", "n_head": 4},
    **{name: {"attention": name, "n_head": 4} for name in ATTENTIONS if name != "scaled_dot"},
    "lstm": {"arch": "lstm", "n_head": 1},
    "lstm-attention": {"arch": "lstm-attention", "n_head": 1},
}


def model_of(shape: Facts, device: torch.device, dtype: str = "float32") -> Any:
    """Return a model with random weights, the same on every device, for inference."""
    config = ModelConfig(**SHAPE, **shape)
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # initial ones would be 0 in places
            parameter.normal_(std=0.2, generator=generator)
    resolved = resolve_dtype(dtype, device)
    return model.to(device, resolved).eval().requires_grad_(False)


def parity(setup: Setup) -> Facts:
    """Logits and greedy tokens of the CPU and of the device, in float32, bfloat16 and int8."""
    n_new, prompt, facts = setup.pick(32, 4), [5, 6, 7], {}
    sampling = SamplingConfig(max_new_tokens=n_new, temperature=0.0)
    ways = [(kind, "float32") for kind in KINDS]
    ways += [("llama", "bfloat16"), ("llama", "int8"), ("gpt2", "int8")]
    for kind, way in ways:
        logits, tokens = [], []
        for device in (torch.device("cpu"), setup.device):
            model = model_of(KINDS[kind], device, way if way == "bfloat16" else "float32")
            if way == "int8":
                quantize_int8(model)
            decoder = Decoder(model, prompt, max_new_tokens=n_new)
            logits.append(decoder.prompt_logits.cpu())
            tokens.append([step.token for step in decoder.generate(sampling, seed=0)])
        error = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
        n_agreed = n_same(*tokens)
        limit = 0.05 if way == "bfloat16" else 1e-4  # 8 bits of mantissa, and 24
        require(error < limit, f"{kind}, {way}: logits differ by {error:.2g} of the largest")
        is_exact = way == "bfloat16" or n_agreed == n_new
        require(is_exact, f"{kind}, {way}: {n_agreed} of {n_new} greedy tokens are the CPU's")
        facts[f"{kind}, {way}"] = f"error {error:.1e}, {n_agreed} of {n_new} tokens"
    return facts


def trainer_of(setup: Setup, name: str, settings: Facts, **options: Any) -> Trainer:
    """Return a trainer on a text of random bytes. Args: options, of Trainer."""
    path = setup.folder / "bytes.txt"
    if not path.exists():
        letters = random.Random(0).choices("abcdefgh \n", k=setup.pick(4_000_000, 40_000))
        path.write_text("".join(letters))
    config = build(RunConfig, merge(settings, {"data": {"tokenizer": "bytes"}}))
    device = resolve_device(config.training.device)
    return Trainer(
        config,
        prepare(DataConfig(paths=(str(path),)), cache_dir=setup.folder / "cache"),
        RunFolder(setup.folder / name),
        device=device,
        dtype=resolve_dtype(config.training.dtype, device),
        **options,
    )


def losses(trainer: Trainer, n_steps: int) -> list[float]:
    """Take steps and return their losses."""
    found = []
    for _ in range(n_steps):
        trainer.take_step()
        found.append(trainer.metrics.last().loss)
    return found


def resume(setup: Setup) -> Facts:
    """A checkpoint that is saved on one device and resumed on the other."""
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


@contextmanager
def sync_is_an_error(setup: Setup) -> Iterator[None]:
    """Let torch raise where the host waits for the GPU, or copies memory that is not pinned."""
    if not setup.is_cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def waiting(setup: Setup) -> Facts:
    """A decode step, sampling, and a training step that is not logged never wait for the GPU."""
    model = model_of(LLAMA, setup.device)
    sampling = SamplingConfig(top_k=20, top_p=0.9, repetition_penalty=1.1)
    for compiles in (False, True):
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9, compiles=compiles)
        sampler = Sampler(sampling, seeds=[0], device=setup.device, prompt=[5, 6, 7])
        tokens = sampler.draw(decoder.prompt_logits[None])  # draws uniforms for the next ones, too
        tokens = sampler.draw(decoder.forward.feed(tokens[:, None]))
        with sync_is_an_error(setup):
            for _ in range(3):
                tokens = sampler.draw(decoder.forward.feed(tokens[:, None]))
    run = {"max_steps": 9, "batch_size": 4, "device": setup.device.type}
    trainer = trainer_of(setup, "waiting", {"model": SHAPE | LLAMA, "training": run})
    trainer.take_step()
    with sync_is_an_error(setup):
        for _ in range(3):
            trainer.take_step()
    way = "torch.cuda.set_sync_debug_mode" if setup.is_cuda else "not checked on this device"
    return {"decoding and sampling, eager and compiled": way, "training step": way}


_LIMITS = {
    "cuda": "torch.cuda.set_per_process_memory_fraction(2**28 / "
    "torch.cuda.get_device_properties(0).total_memory)",
    "cpu": "import resource; n = int(open('/proc/self/statm').read().split()[0]) * 4096 + 2**28; "
    "resource.setrlimit(resource.RLIMIT_AS, (n, n))",
}


def memory_limit(setup: Setup) -> Facts:
    """Out of memory in the middle of a run, and a run that can never fit: both exit with 6."""
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
    """Two processes, replicated and sharded, have the losses of one."""
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


def warm_up(setup: Setup) -> Facts:
    """nano, compiled, through its context warm-up: torch.compile sees one graph, never a part."""
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
    speed = trainer.step_tokens / statistics.median(seconds[-max(1, n_steps // 4) :])
    return {
        "graph breaks": breaks,
        "graphs": counters["stats"]["unique_graphs"],
        "contexts": sorted(set(lengths)),
        "tokens/s": round(speed),
        "slowest step (it compiles), s": round(max(seconds), 1),
    }


def small(setup: Setup) -> Facts:
    """Training the preset small: tokens/s, MFU, and peak memory beside the estimate."""
    facts: Facts = {}
    shape = setup.pick({"vocab_size": 50257}, SHAPE | {"n_head": 4})
    n_steps = setup.pick(10, 1)
    for name, options in {
        "eager": {},
        "compiled": {"compile": True},
        "float32": {"dtype": "float32"},
        "tf32": {"dtype": "tf32"},
    }.items():
        if name == "tf32" and not setup.is_cuda:
            continue
        run = {"device": setup.device.type, "batch_size": setup.pick(16, 2), "micro_batch_size": 0}
        settings = merge(preset("small"), {"model": shape, "training": run | options})
        trainer = trainer_of(setup, f"small-{name}", settings)
        if setup.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        speed = trainer.step_tokens / setup.seconds(trainer.take_step, n_steps)
        peak = peak_flops(setup.device, trainer.dtype)
        config = trainer.config
        estimate = estimate_memory(config, 0, trainer.dtype)["total"]
        facts |= {f"{name}, tokens/s": round(speed), f"{name}, dtype": str(trainer.dtype)}
        if peak:
            used = speed * training_flops_per_token(config.model) / peak
            facts[f"{name}, MFU"] = f"{used:.1%}"
        if setup.is_cuda:
            measured = torch.cuda.max_memory_allocated() / 1e9
            about = f"{measured:.2f} GB, estimated {estimate / 1e9:.2f} GB"
            facts[f"{name}, peak memory"] = about
        del trainer
        free(setup)
    return facts


def free(setup: Setup) -> None:
    """Give memory back, so that the next measurement begins with all of it."""
    import gc

    gc.collect()
    if setup.is_cuda:
        torch.cuda.empty_cache()


def nanogpts(setup: Setup) -> Facts:
    """Full training steps at nanoGPT's shape for a GPU: minigpt's gpt2 layout and nanoGPT."""
    shape = throughput.SHAPES[setup.pick("gpu", "cpu")]
    n_steps, batch = setup.pick(20, 1), setup.pick(shape["batch"], 2)
    dtype = resolve_dtype("auto", setup.device)
    tokens = torch.randint(throughput.VOCABULARY, (2, batch, shape["context"]), device=setup.device)
    facts = {}
    for compiled in (False, True):
        arguments = (shape, setup.device, dtype, compiled)
        steps = {
            "minigpt": throughput.ours(*arguments),
            "nanoGPT" if setup.nanogpt_checkout else "stand-in of nanoGPT": throughput.theirs(
                *arguments, setup.nanogpt_checkout
            ),
        }
        for name, step in steps.items():
            seconds = setup.seconds(lambda step=step: step(tokens[0], tokens[1]), n_steps)
            way = "compiled" if compiled else "eager"
            facts[f"{name}, {way}, tokens/s"] = round(tokens[0].numel() / seconds)
    return facts


def mini(setup: Setup) -> Facts:
    """Seconds of training the preset mini to nanoGPT's loss on tinyshakespeare."""
    base = merge(preset("mini"), {"data": {"paths": [str(setup.data)]}, "preset": "mini"})
    run = {"device": setup.device.type, "eval_every": 100, "save_every": 0}
    run |= {"max_steps": setup.pick(2000, 2), "batch_size": setup.pick(32, 2)}
    settings = merge(base, {"training": run, "model": setup.pick({}, SHAPE | LLAMA)})
    text = training.tokenized(setup.data, base["data"]["tokenizer"])
    measured = training.measure(settings, text)
    reached = training.seconds_to(TARGET, measured)
    return {
        f"seconds to {TARGET}": "not reached" if reached is None else reached,
        "last validation loss, nats/byte": measured["curve"][-1][1],
        "seconds of training": measured["curve"][-1][0],
        "tokens/s": measured["tokens_per_s"],
    }


def contenders(setup: Setup) -> list[Contender]:
    """Return the ways to decode, the most telling ones first."""
    found = [Contender("minigpt", "bf16", is_compiled=is_compiled) for is_compiled in (False, True)]
    found += [Contender("minigpt", "fp32"), Contender("minigpt", "bf16", n_rows=16)]
    found += [Contender("minigpt", "bf16", "trace"), Contender("minigpt", "int8")]
    if setup.with_transformers:
        found += [
            Contender("transformers", "fp32", "loop"),
            Contender("transformers", "bf16", "loop"),
        ]
        found += [Contender("transformers", "bf16", "loop", n_rows=16)]
    found += [
        Contender("minigpt", "int8", is_compiled=True),
        Contender("minigpt", "bf16", "trace", is_compiled=True),
        Contender("minigpt", "bf16", is_compiled=True, n_rows=16),
    ]
    return [*found, Contender("gpt-fast", "bf16", is_compiled=True)]


def decoding(setup: Setup) -> Facts:
    """GPT-2's shape, decoded greedily: tokens/s, launches a token and share of the bandwidth."""
    config = SHAPES["gpt2"]
    if setup.is_quick:
        small: Facts = {"vocab_size": 257, "n_layer": 2, "n_head": 2, "n_kv_head": 2}
        config = replace(config, d_model=64, d_mlp=256, d_head=32, **small)
    folder = setup.folder / "gpt2"
    folder.mkdir()
    write_random(folder, config)
    bytes_per_s, n_weights = bandwidth(setup), weights_read(config)
    prompt = random.Random(0).choices(range(config.vocab_size), k=setup.pick(32, 4))
    n_new, n_threads = setup.pick(200, 4), torch.get_num_threads()
    job = Job(str(folder), prompt, n_new, n_threads, setup.device.type, setup.gpt_fast)
    facts: Facts = {}
    tokens: dict[str, list[int]] = {}
    for contender in contenders(setup):
        if time.monotonic() > setup.deadline:
            facts[contender.name] = "not run: out of time"
            continue
        free(setup)
        try:
            decode = decoders.ENGINES[contender.engine](contender, job)
        except UnavailableError as error:
            facts[contender.name] = f"not run: {error}"
            continue
        decoders.take_turn(decode, job)  # compiles, and captures graphs
        turns = [decoders.take_turn(decode, job) for _ in range(setup.pick(3, 1))]
        measured = Measured(contender, turns)
        tokens[contender.name] = turns[0].tokens
        launches = launches_per_token(setup, lambda decode=decode: decode(lambda: None), n_new)
        share = bandwidth_share(measured, n_weights, bytes_per_s)
        facts[contender.name] = (
            f"{measured.tokens_per_s:,.0f} tokens/s, {launches:.1f} launches a token, "
            f"{share:.0%} of the bandwidth"
        )
        print(f"  {contender.name}: {facts[contender.name]}", file=sys.stderr, flush=True)
    theirs = tokens.get("transformers fp32 loop")
    is_same = theirs is None or tokens["minigpt fp32"] == theirs
    require(is_same, "minigpt and transformers, both float32, decode other tokens")
    watched, plain = tokens.get("minigpt bf16 trace"), tokens.get("minigpt bf16")
    require(watched == plain, "the tokens change when they are traced")
    return facts


def launches_per_token(setup: Setup, decode: Callable[[], Any], n_new: int) -> float:
    """Return the kernels and CUDA graphs that the host launches for each new token."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if ProfilerActivity.CUDA in torch.profiler.supported_activities():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        decode()
        setup.wait()
    events = profiler.key_averages()
    return sum(e.count for e in events if re.match(r"cu(da)?(Launch|GraphLaunch)", e.key)) / n_new


PARTS: dict[str, Callable[[Setup], Facts]] = {
    "machine": machine,
    "parity": parity,
    "resume": resume,
    "waiting": waiting,
    "memory_limit": memory_limit,
    "ranks": ranks,
    "warm_up": warm_up,
    "small": small,
    "nanogpts": nanogpts,
    "decoding": decoding,
    "mini": mini,
}


def run_part(name: str, setup: Setup) -> Facts:
    """Run a part and return its result: facts, and the status ok, FAILED, skipped or not run."""
    started = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    if started > setup.deadline:
        return {"part": name, "status": "not run: out of time", "facts": {}, "seconds": 0.0}
    facts: Facts = {}
    try:
        facts, status = PARTS[name](setup), "ok"
    except SkippedError as reason:
        status = f"skipped: {reason}"
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        kind = "" if isinstance(error, FailedError) else f"{type(error).__name__}: "
        status = f"FAILED: {kind}{words[0]}"
    free(setup)
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {status}, {seconds} s", file=sys.stderr, flush=True)
    return {"part": name, "status": status, "facts": facts, "seconds": seconds}


def table(results: list[Facts]) -> str:
    """Return all results as one Markdown table."""
    rows = ["| part | what | result |", "| --- | --- | --- |"]
    for result in results:
        rows.append(f"| {result['part']} | {result['seconds']} s | {result['status']} |")
        rows += [
            f"| {result['part']} | {what} | {value} |" for what, value in result["facts"].items()
        ]
    return "\n".join(rows)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="rehearse with tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0, help="after which nothing begins")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    data = Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"
    parser.add_argument("--data", type=Path, default=data, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt-checkout", type=Path)
    parser.add_argument("--gpt-fast", default="", help="path of a gpt-fast checkout")
    parser.add_argument("--without-transformers", action="store_true")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    device = resolve_device(args.device)
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(prefix="minigpt-gpu-") as temporary:
        folder, data = Path(temporary), args.data.resolve()
        if args.quick or not data.exists():
            data = folder / "text.txt"
            data.write_text("To be, or not to be, that is the question.\n" * 200)
        setup = Setup(
            device=device,
            is_quick=args.quick,
            folder=folder,
            data=data,
            nanogpt_checkout=args.nanogpt_checkout,
            gpt_fast=args.gpt_fast,
            with_transformers=not args.without_transformers,
            deadline=deadline,
        )
        for name in args.parts:
            results.append(run_part(name, setup))
            text = json.dumps(results[-1], indent=2, default=str) + "\n"
            (args.out / f"{name}.json").write_text(text)
            if results[-1]["status"].startswith("FAILED") and not args.keep_going:
                break
    print(table(results))
    return int(any(result["status"].startswith("FAILED") for result in results))


if __name__ == "__main__":
    sys.exit(main())
