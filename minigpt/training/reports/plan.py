"""What a run is going to be, before it is one: sizes, counts, memory, and how long it may take."""

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
from minigpt.training.distributed import ALONE, World
from minigpt.training.reports.memory import (
    MemoryEstimate,
    estimate_memory,
    machine_bytes,
    optimizer_values,
)
from minigpt.training.schedule import with_max_steps
from minigpt.training.state import Progress
from minigpt.training.trainer import Trainer

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
_NOTHING = Progress()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on paper."""

    parameters: dict[str, int]
    """Weights by the part of the model that they are in."""
    n_train_tokens: int
    n_val_tokens: int
    step_tokens: int
    """Tokens of an optimizer step, over all ranks."""
    n_micro_batches: int
    """Forward passes of one rank in a step."""
    max_steps: int
    """Optimizer steps of the whole run; with a limit of minutes, as many as the guess makes."""
    n_steps_left: int
    """Those that are still to be taken."""
    epochs: float
    """Passes over the training tokens that all steps make."""
    training_flops: int
    """Of the steps that are left."""
    memory: MemoryEstimate
    """Of one rank."""
    machine_bytes: int | None
    """Memory of the device; None where it is not known."""
    checkpoint_bytes: int
    """Weights and optimizer of one checkpoint."""
    step_s: float
    """Guess of the seconds of a step, from a few that were taken."""
    training_s: float
    """Guess of the seconds of the steps that are left; evaluation and saving come on top."""
    device: str
    dtype: str
    n_ranks: int
    peak_flops: float | None
    """What the hardware could do at most, FLOP/s, over all ranks; None where it is not known."""

    @property
    def mfu(self) -> float | None:
        """Share of the peak that the measured steps had; None where the peak is not known."""
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
    done: Progress = _NOTHING,
) -> Plan:
    """Count what a run will be, and take some steps of a model of its shape to see how long.

    That model is dropped, and nothing is written. The steps are taken by this process alone and
    not compiled, on no more tokens than take a moment: a whole step is worked out by its FLOPs.

    Args: run, which is not looked at; done, from where the run goes on.
    Raises: DataError if the corpus is too short; ConfigError if the ranks cannot share the batch.
    """
    train_tokens, val_tokens = data.tokens.split(config.data.val_fraction)
    config = with_max_steps(config, len(train_tokens))
    training, length = config.training, config.sequence_length
    step_tokens = training.batch_size * length
    micro_batch_size = world.micro_batch_size(training.batch_size, training.micro_batch_size)
    memory = estimate_memory(config, len(val_tokens), dtype, world.size)
    there = machine_bytes(device)
    is_tight = there is not None and memory.total > there
    flop_s, update_s = _measured(
        config, data, run, 1 if is_tight else micro_batch_size, device, dtype
    )
    full_flops = step_tokens * training_flops_per_token(_at_length(config, length))
    step_s = flop_s * full_flops / world.size + update_s
    limits = [training.max_steps]
    if training.max_minutes:
        limits.append(done.step + int((60 * training.max_minutes - done.elapsed_s) / step_s))
    max_steps = max(1, done.step, min(limit for limit in limits if limit))
    flops = flops_of_steps(config, max_steps, max_steps) - flops_of_steps(
        config, done.step, max_steps
    )
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
        machine_bytes=there,
        checkpoint_bytes=4 * (parameter_count(config.model) + optimizer_values(config)),
        step_s=step_s,
        training_s=flop_s * flops / world.size + (max_steps - done.step) * update_s,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        n_ranks=world.size,
        peak_flops=peak * world.size if peak else None,
    )


def parameters_by_part(config: ModelConfig) -> dict[str, int]:
    """Count weights by the part of the model that they are in; the parts add up to all of them."""
    model = model_class(config).without_weights(replace(config, n_layer=1))
    counts = dict.fromkeys(_PARTS, 0)
    for name, parameter in model.named_parameters():
        place = f".{name}"
        part = next(part for part, words in _PARTS.items() if any(word in place for word in words))
        n_times = config.n_layer if name.startswith("blocks.") else 1
        counts[part] += n_times * parameter.numel()
    return {part: count for part, count in counts.items() if count}


def flops_of_steps(config: RunConfig, n_steps: int, max_steps: int) -> int:
    """Return the FLOPs of the first steps of a run of so many, some with a shorter context."""
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


def _measured(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    most_sequences: int,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the seconds per FLOP of a forward and backward pass, and the seconds of an update.

    A first step on few tokens tells how many take about a second.
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
        pass_s, update_s = _seconds_of(Trainer(tried, data, run, device=device, dtype=dtype))
        n_flops = n_sequences * n_tokens * training_flops_per_token(_at_length(config, n_tokens))
        return pass_s / n_flops, update_s

    first_s, _ = trial(1, min(_FIRST_TOKENS, length))
    flops_per_token = training_flops_per_token(_at_length(config, length))
    n_tokens = max(_FIRST_TOKENS, int(_MEASURED_S / (first_s * flops_per_token)))
    n_sequences = min(most_sequences, max(1, n_tokens // length))
    return trial(n_sequences, min(length, n_tokens))


def _seconds_of(trainer: Trainer) -> tuple[float, float]:
    """Return the medians of the seconds of forward and backward pass and of the update."""
    device, marks = trainer.device, list[float]()

    def mark(*_: object) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    trainer.optimizers[0].register_step_pre_hook(mark)
    trainer.optimizers[-1].register_step_post_hook(mark)
    trainer.take_step()  # the first one makes the optimizer's state
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
