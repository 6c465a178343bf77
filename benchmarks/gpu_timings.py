"""The parts of benchmarks/gpu.py that measure: bandwidth, training and decoding."""

import random
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import decoders
import throughput
import torch
import training
from decoders import Contender, Job, Turn, UnavailableError
from decoding_report import Measured, bandwidth_share
from gpu_setup import LLAMA, SHAPE, Facts, Setup, SkippedError, free, require, trainer_of
from machine import machine_facts
from random_models import SHAPES, weights_read, write_random

from minigpt.model.cost import peak_flops, training_flops_per_token
from minigpt.model.device import resolve_dtype
from minigpt.presets import preset
from minigpt.settings import merge
from minigpt.training.reports.memory import estimate_memory

TARGET = 1.4697  # nanoGPT's validation loss on tinyshakespeare, nats per character


def machine(setup: Setup) -> Facts:
    """Return facts about the machine, and its memory bandwidth, measured by a copy."""
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
    """Return the bytes per second that a copy within the device's memory reads and writes."""
    n_bytes = setup.pick(2**31, 2**20)
    source = torch.zeros(n_bytes, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    return 2 * n_bytes / setup.seconds(lambda: target.copy_(source), setup.pick(10, 1))


def small(setup: Setup) -> Facts:
    """Train the preset small: tokens/s, MFU, and measured and estimated peak memory."""
    variants: dict[str, Facts] = {
        "eager": {},
        "compiled": {"compile": True},
        "float32": {"dtype": "float32"},
        "tf32": {"dtype": "tf32"},
    }
    for name, options in variants.items():
        if name == "tf32" and not setup.is_cuda:
            continue
        with setup.attempt(name):
            setup.require_time()
            train_small(setup, name, options)
        free(setup)
    return {}


def train_small(setup: Setup, name: str, options: Facts) -> None:
    """Train the preset small with these settings, and record its speed and memory."""
    shape = setup.pick({"vocab_size": 50257}, SHAPE | {"n_head": 4})
    run = {"device": setup.device.type, "batch_size": setup.pick(16, 2), "micro_batch_size": 0}
    settings = merge(preset("small"), {"model": shape, "training": run | options})
    trainer = trainer_of(setup, f"small-{name}", settings)
    if setup.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    speed = trainer.config.step_tokens / setup.seconds(trainer.take_step, setup.pick(10, 1))
    peak = peak_flops(setup.device, trainer.dtype)
    config = trainer.config
    setup.facts[f"{name}, tokens/s"] = round(speed)
    setup.facts[f"{name}, dtype"] = str(trainer.dtype)
    if peak:
        used = speed * training_flops_per_token(config.model) / peak
        setup.facts[f"{name}, MFU"] = f"{used:.1%}"
    if setup.is_cuda:
        kind = setup.device.type
        estimate = estimate_memory(config, 0, trainer.dtype, device_type=kind)["total"]
        measured = torch.cuda.max_memory_allocated() / 1e9
        memory = f"{measured:.2f} GB, estimated {estimate / 1e9:.2f} GB"
        setup.facts[f"{name}, peak memory"] = memory


def nanogpts(setup: Setup) -> Facts:
    """Time training steps at nanoGPT's shape for a GPU: minigpt's gpt2 layout and nanoGPT."""
    shape = throughput.SHAPES[setup.pick("gpu", "cpu")]
    n_steps, batch = setup.pick(20, 1), setup.pick(shape["batch"], 2)
    dtype = resolve_dtype("auto", setup.device)
    tokens = torch.randint(throughput.VOCABULARY, (2, batch, shape["context"]), device=setup.device)
    theirs = "nanoGPT" if setup.nanogpt_checkout else "stand-in for nanoGPT"
    for compiled in (False, True):
        for name in ("minigpt", theirs):
            label = f"{name}, {'compiled' if compiled else 'eager'}, tokens/s"
            with setup.attempt(label):
                setup.require_time()
                arguments = (shape, setup.device, dtype, compiled)
                if name == "minigpt":
                    step = throughput.ours(*arguments)
                else:
                    step = throughput.theirs(*arguments, setup.nanogpt_checkout)
                seconds = setup.seconds(lambda step=step: step(tokens[0], tokens[1]), n_steps)
                setup.facts[label] = round(tokens[0].numel() / seconds)
            free(setup)
    return {}


def mini(setup: Setup) -> Facts:
    """Time the training of the preset mini to nanoGPT's loss on tinyshakespeare."""
    if not (setup.is_quick or setup.has_tinyshakespeare):
        raise SkippedError("needs tinyshakespeare.txt: --data FILE")
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
    """Return the contenders, the most informative ones first."""
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
    """Decode greedily at GPT-2's shape: tokens/s, launches per token and share of bandwidth."""
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
    tokens: dict[str, list[int]] = {}
    for contender in contenders(setup):
        free(setup)
        with setup.attempt(contender.name):
            setup.require_time()
            turns, launches = turns_of(setup, contender, job)
            tokens[contender.name] = turns[0].tokens
            measured = Measured(contender, turns)
            share = bandwidth_share(measured, n_weights, bytes_per_s)
            setup.facts[contender.name] = (
                f"{measured.tokens_per_s:,.0f} tokens/s, {launches:.1f} launches per token, "
                f"{share:.0%} of the bandwidth"
            )
            print(f"  {contender.name}: {setup.facts[contender.name]}", file=sys.stderr, flush=True)
    for ours, other in (
        ("minigpt fp32", "transformers fp32 loop"),
        ("minigpt bf16", "minigpt bf16 trace"),
    ):
        if ours in tokens and other in tokens:
            is_same = tokens[ours] == tokens[other]
            require(is_same, f"{ours} and {other} decode different tokens")
    return {}


def turns_of(setup: Setup, contender: Contender, job: Job) -> tuple[list[Turn], float]:
    """Return some timed turns, and the launches per token."""
    try:
        decode = decoders.ENGINES[contender.engine](contender, job)
    except (UnavailableError, ImportError) as error:
        raise SkippedError(str(error)) from error
    decoders.timed_turn(decode, job)  # compiles, and captures graphs
    turns = [decoders.timed_turn(decode, job) for _ in range(setup.pick(3, 1))]
    return turns, launches_per_token(setup, lambda: decode(job, lambda: None), job.n_new)


def launches_per_token(setup: Setup, decode: Callable[[], Any], n_new: int) -> float:
    """Return the kernels and CUDA graphs that the host launches for each new token."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if ProfilerActivity.CUDA in torch.profiler.supported_activities():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, acc_events=True) as profiler:
        decode()
        setup.wait()
    events = profiler.key_averages()
    return sum(e.count for e in events if re.match(r"cu(da)?(Launch|GraphLaunch)", e.key)) / n_new
