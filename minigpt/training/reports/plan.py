"""Plan a run before it starts: sizes, counts, memory and time."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from minigpt.checkpoint.model_folder import name_of
from minigpt.config import ModelConfig, RunConfig
from minigpt.model.cost import (
    parameter_count,
    parameters,
    peak_flops,
    training_flops_per_token,
)
from minigpt.model.device import autocast, has_fast_bfloat16, resolve_device, resolve_dtype
from minigpt.model.language_model import model_class
from minigpt.rings import find_ring
from minigpt.text.tokens import PreparedData
from minigpt.training.optim import make_optimizers
from minigpt.training.reports.memory import estimate_memory, machine_bytes, optimizer_values
from minigpt.training.run import resolve_for_text
from minigpt.training.state import TrainingState
from minigpt.training.trainer import TrainingLoss
from minigpt.training.world import ALONE, World

_PARTS = {
    "output": ("unembedding.",),
    "embedding": ("embedding.", "positions."),
    "attention": (".attention.",),
    "LSTM": (".lstm.",),
    "MLP": (".mlp.",),
    "norms": ("norm.",),
}
_FIRST_TOKENS = 64
_MEASURED_S = 1.0
_MAX_STEPS = 20
_GROWTH = 4


def make_plan(
    config: RunConfig,
    data: PreparedData,
    world: World = ALONE,
    done: TrainingState | None = None,
    base_dtype: str = "float32",
) -> dict[str, Any]:
    """Plan a run: sizes, counts and estimates, with a few timed steps of a new model.

    The steps are timed in this process alone, uncompiled, on about a second's worth of tokens; the
    time of a full step is extrapolated by its FLOPs.

    Args: done, the state that the run resumes from; None for a new run; base_dtype, of the weights
        that the run is fine-tuned from.
    Returns: the facts that ``--json`` prints; None for unknown properties of the hardware.
    Raises: DataError if the corpus is too short; ConfigError if the batch cannot be divided.
    """
    done = done or TrainingState()
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    config, train_tokens, val_tokens = resolve_for_text(config, data)
    training = config.training
    micro_batch_size = world.micro_batch_size(training)
    memory = estimate_memory(config, len(val_tokens), dtype, world.size, device.type)
    available = machine_bytes(device)
    is_tight = available is not None and memory["total"] > available
    flop_s, update_s = _measure(config, 1 if is_tight else micro_batch_size, device, dtype)
    step_s = flop_s * flops_of_steps(config, 1, 0) / world.size + update_s
    limits = [training.max_steps] if training.max_steps else []
    if training.max_minutes:
        limits.append(done.step + int((60 * training.max_minutes - done.elapsed_s) / step_s))
    max_steps = max(1, done.step, min(limits))
    flops = flops_of_steps(config, max_steps, max_steps)
    flops -= flops_of_steps(config, done.step, max_steps)
    peak = peak_flops(device, dtype)
    peak = peak * world.size if peak else None
    n_parameters = parameter_count(config.model)
    saved_dtype = base_dtype if training.save_dtype == "auto" else training.save_dtype
    is_rounded = saved_dtype in ("bfloat16", "float16")  # the float32 weights are saved too
    training_s = flop_s * flops / world.size + (max_steps - done.step) * update_s
    is_compiled = bool(training.compile)
    if compiling := find_ring("training.compiling"):
        is_compiled = compiling.is_compiled(config, n_parameters, device, world.size)
    return {
        "parameters": parameters_by_part(config.model),
        "n_train_tokens": len(train_tokens),
        "n_val_tokens": len(val_tokens),
        "step_tokens": config.step_tokens,  # over all ranks
        "n_micro_batches": training.batch_size // world.size // micro_batch_size,
        "max_steps": max_steps,
        "n_steps_left": max_steps - done.step,
        "epochs": max_steps * config.step_tokens / len(train_tokens),
        "training_flops": flops,  # of the remaining steps
        "memory": memory,
        "machine_bytes": available,
        "checkpoint_bytes": 4
        * (n_parameters * (2 if training.average else 1) + optimizer_values(config))
        + 2 * n_parameters * is_rounded,
        "step_s": step_s,
        "training_s": training_s,  # of the remaining steps, without evaluation and saving
        "is_compiled": is_compiled,
        "device": device.type,
        "dtype": name_of(dtype),
        "n_ranks": world.size,
        "peak_flops": peak,
        "n_parameters": n_parameters,
        "mfu": flops / training_s / peak if peak and training_s else None,
    }


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count the parameters by part of the model."""
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter, n in parameters(config):
        place = f".{name}"
        part = next(part for part, words in _PARTS.items() if any(word in place for word in words))
        counts[part] += n * parameter.numel()
    return {part: count for part, count in counts.items() if count}


def flops_of_steps(config: RunConfig, n_steps: int, max_steps: int) -> int:
    """Return the FLOPs of the first ``n_steps`` of ``max_steps``, with context warm-up."""
    training, length = config.training, config.sequence_length
    short_length = training.context_warmup_length or length
    n_short = min(n_steps, math.ceil(training.context_warmup_fraction * max_steps))
    short, full = _flops_per_token(config, short_length), _flops_per_token(config, length)
    return training.batch_size * length * (n_short * short + (n_steps - n_short) * full)


def _flops_per_token(config: RunConfig, length: int) -> int:
    return training_flops_per_token(replace(config.model, context_length=length))


def _measure(
    config: RunConfig, max_sequences: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the seconds per FLOP of forward and backward pass, and the seconds of an update."""
    model = model_class(config.model)(config.model).to(device)
    product_dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    optimizers = make_optimizers(model, config.training, product_dtype)

    loss_of = TrainingLoss(model)
    length = config.sequence_length

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(n_tokens: int) -> tuple[float, float]:
        """Return the seconds of forward and backward pass, and of the update."""
        tokens = torch.zeros(shape_of(n_tokens), dtype=torch.long, device=device)
        started = now()
        with autocast(device, dtype):
            loss = loss_of(tokens, tokens, recompute=config.training.recompute)
        loss.backward()
        between = now()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return between - started, now() - between

    def shape_of(n_tokens: int) -> tuple[int, int]:
        return max(1, n_tokens // length), min(length, n_tokens)

    few = min(_FIRST_TOKENS, length)
    step(few)  # creates the optimizer state
    n_tokens = tokens_to_measure(lambda n: step(n)[0], few, max_sequences * length)
    step(n_tokens)  # the first step of a size allocates memory
    end = now() + _MEASURED_S
    times = [step(n_tokens)]
    while len(times) < _MAX_STEPS and now() < end:
        times.append(step(n_tokens))
    pass_s, update_s = map(statistics.median, zip(*times, strict=True))
    n_sequences, n_positions = shape_of(n_tokens)
    n_flops = n_sequences * n_positions * _flops_per_token(config, n_positions)
    return pass_s / n_flops, update_s


def tokens_to_measure(pass_s: Callable[[int], float], few: int, most: int) -> int:
    """Return how many tokens take about a second or a little less, from ``few`` to ``most``.

    On a GPU, a step on few tokens takes only the time to launch its kernels.

    Args: pass_s, which measures the seconds of a forward and backward pass over some tokens.
    """
    n_tokens = few
    while n_tokens < most and pass_s(n_tokens) < _MEASURED_S / _GROWTH:
        n_tokens = min(most, _GROWTH * n_tokens)
    return n_tokens
