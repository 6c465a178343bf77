"""The plan of a run before it begins: sizes, counts, memory and time."""

import math
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import ModelConfig, RunConfig
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.device import peak_flops
from minigpt.model.registry import model_class
from minigpt.text.shards import PreparedData
from minigpt.training.reports.memory import (
    MemoryEstimate,
    estimate_memory,
    machine_bytes,
    optimizer_values,
)
from minigpt.training.schedule import with_max_steps
from minigpt.training.state import TrainingState
from minigpt.training.trainer import Trainer
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
_MOST_STEPS = 20
_START = TrainingState()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes, counts and estimates of a run."""

    parameters: dict[str, int]
    """Number of parameters by part of the model."""
    n_train_tokens: int
    """Number of training tokens."""
    n_val_tokens: int
    """Number of validation tokens."""
    step_tokens: int
    """Tokens per optimizer step, over all ranks."""
    n_micro_batches: int
    """Forward passes of a rank per step."""
    max_steps: int
    """Number of optimizer steps of the whole run, estimated if it is limited by minutes."""
    n_steps_left: int
    """Number of optimizer steps left."""
    epochs: float
    """Passes over the training tokens of the whole run."""
    training_flops: int
    """FLOPs of the steps left."""
    memory: MemoryEstimate
    """Peak memory of one rank."""
    machine_bytes: int | None
    """Memory of the device in bytes. None if it is unknown."""
    checkpoint_bytes: int
    """Size of a checkpoint: weights and optimizer state."""
    step_s: float
    """Estimated seconds per step, from a few timed steps."""
    training_s: float
    """Estimated seconds of the steps left, without evaluation and saving."""
    device: str
    """Device type."""
    dtype: str
    """Compute dtype."""
    n_ranks: int
    """Number of processes."""
    peak_flops: float | None
    """Peak FLOP/s of the hardware, over all ranks. None if it is unknown."""

    @property
    def mfu(self) -> float | None:
        """Fraction of the peak reached by the timed steps. None if the peak is unknown."""
        flops_per_s = self.training_flops / self.training_s if self.training_s else 0.0
        return flops_per_s / self.peak_flops if self.peak_flops else None


def make_plan(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    *,
    device: torch.device,
    dtype: torch.dtype,
    world: World = ALONE,
    done: TrainingState = _START,
) -> Plan:
    """Plan a run, and time a few steps of a new model of its shape.

    Nothing is written. The timed steps are taken by this process alone, uncompiled, on about a
    second's worth of tokens; the time of a whole step is scaled by its FLOPs.

    Args: run, its folder, which is not touched; done, the state that the run resumes from.
    Raises: DataError if the corpus is too short; ConfigError if the batch cannot be divided.
    """
    train_tokens, val_tokens = data.tokens.split(config.data.val_fraction)
    config = with_max_steps(config, len(train_tokens))
    training, length = config.training, config.sequence_length
    step_tokens = training.batch_size * length
    micro_batch_size = world.micro_batch_size(training.batch_size, training.micro_batch_size)
    memory = estimate_memory(config, len(val_tokens), dtype, world.size)
    available = machine_bytes(device)
    is_tight = available is not None and memory.total > available
    largest = 1 if is_tight else micro_batch_size
    flop_s, update_s = _measure(config, data, run, largest, device, dtype)
    step_flops = step_tokens * training_flops_per_token(_at_length(config, length))
    step_s = flop_s * step_flops / world.size + update_s
    limits = [training.max_steps]
    if training.max_minutes:
        limits.append(done.step + int((60 * training.max_minutes - done.elapsed_s) / step_s))
    max_steps = max(1, done.step, min(limit for limit in limits if limit))
    flops = flops_of_steps(config, max_steps, max_steps)
    flops -= flops_of_steps(config, done.step, max_steps)
    peak = peak_flops(device, dtype)
    return Plan(
        parameters=parameters_by_part(config.model),
        n_train_tokens=len(train_tokens),
        n_val_tokens=len(val_tokens),
        step_tokens=step_tokens,
        n_micro_batches=training.batch_size // world.size // micro_batch_size,
        max_steps=max_steps,
        n_steps_left=max_steps - done.step,
        epochs=max_steps * step_tokens / len(train_tokens),
        training_flops=flops,
        memory=memory,
        machine_bytes=available,
        checkpoint_bytes=4 * (parameter_count(config.model) + optimizer_values(config)),
        step_s=step_s,
        training_s=flop_s * flops / world.size + (max_steps - done.step) * update_s,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        n_ranks=world.size,
        peak_flops=peak * world.size if peak else None,
    )


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count the parameters by part of the model."""
    model = model_class(config).without_weights(replace(config, n_layer=1))
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter in model.named_parameters():
        place = f".{name}"
        part = next(part for part, words in _PARTS.items() if any(word in place for word in words))
        n_times = config.n_layer if name.startswith("blocks.") else 1
        counts[part] += n_times * parameter.numel()
    return {part: count for part, count in counts.items() if count}


def flops_of_steps(config: RunConfig, n_steps: int, max_steps: int) -> int:
    """Return the FLOPs of the first ``n_steps`` of ``max_steps``, with context warm-up."""
    training, length = config.training, config.sequence_length
    short_length = training.context_warmup_length or length
    n_short = min(n_steps, math.ceil(training.context_warmup_fraction * max_steps))
    short, full = (
        training_flops_per_token(_at_length(config, n_tokens))
        for n_tokens in (short_length, length)
    )
    return training.batch_size * length * (n_short * short + (n_steps - n_short) * full)


def _at_length(config: RunConfig, length: int) -> ModelConfig:
    return replace(config.model, context_length=length)


def _measure(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    most_sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the seconds per FLOP of forward and backward pass, and the seconds of an update.

    A first trial on few tokens decides how many tokens take about a second.
    """
    length = config.sequence_length

    def trial(n_sequences: int, n_tokens: int) -> tuple[float, float]:
        changes: dict[str, Any] = {
            "max_steps": 10**9,
            "max_minutes": 0.0,
            "max_epochs": 0.0,
            "batch_size": n_sequences,
            "micro_batch_size": n_sequences,
            "sequence_length": n_tokens,
            "context_warmup_length": 0,
            "compile": False,
            "shard": False,
        }
        tried = replace(config, training=replace(config.training, **changes))
        pass_s, update_s = _time_steps(Trainer(tried, data, run, device=device, dtype=dtype))
        n_flops = n_sequences * n_tokens * training_flops_per_token(_at_length(config, n_tokens))
        return pass_s / n_flops, update_s

    first_s, _ = trial(1, min(_FIRST_TOKENS, length))
    flops_per_token = training_flops_per_token(_at_length(config, length))
    n_tokens = max(_FIRST_TOKENS, int(_MEASURED_S / (first_s * flops_per_token)))
    n_sequences = min(most_sequences, max(1, n_tokens // length))
    return trial(n_sequences, min(length, n_tokens))


def _time_steps(trainer: Trainer) -> tuple[float, float]:
    """Return the median seconds of forward and backward pass, and of the update."""
    marks = list[float]()

    def mark(*_: object) -> None:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    trainer.optimizers[0].register_step_pre_hook(mark)
    trainer.optimizers[-1].register_step_post_hook(mark)
    trainer.take_step()  # creates the optimizer state
    started = time.perf_counter()
    passes, updates = list[float](), list[float]()
    while len(passes) < _MOST_STEPS and (not passes or time.perf_counter() < started + _MEASURED_S):
        marks.clear()
        mark()
        trainer.take_step()
        begin, between, end = marks
        passes.append(between - begin)
        updates.append(end - between)
    return statistics.median(passes), statistics.median(updates)
