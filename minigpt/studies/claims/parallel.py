"""Claim 3: attention trains all positions at once, where a recurrent network goes one by one."""

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from minigpt.model.cost import parameter_count
from minigpt.model.registry import model_class
from minigpt.studies.claims.learning import Progress, contender

ARCHS = ("lstm", "gpt")
_VOCAB_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a forward and backward pass takes at one length of sequences."""

    arch: str
    device: str
    n_parameters: int
    length: int
    """Tokens in a sequence."""
    batch_size: int
    """Sequences in a step."""
    step_ms: float
    """Of a step, the median."""
    tokens_per_s: float


def measure_timings(
    lengths: Sequence[int],
    *,
    step_tokens: int,
    n_repeats: int,
    d_model: int,
    device: torch.device,
) -> Generator[Progress, None, tuple[Timing, ...]]:
    """Yield how far it is, and return a step's time for each architecture and length.

    Steps have the same number of tokens at all lengths. All lengths and architectures take turns,
    so that whatever else the machine does, it does to all of them.
    """
    turns: dict[tuple[str, int], Callable[[], float]] = {}
    n_parameters = {}
    for arch in ARCHS:
        config = contender(arch, d_model, context_length=max(lengths), vocab_size=_VOCAB_SIZE)
        n_parameters[arch] = parameter_count(config)
        model = model_class(config)(config).to(device)
        for length in lengths:
            turns[arch, length] = _turn(model, max(1, step_tokens // length), length)
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in turns}
    for repeat in range(n_repeats + 1):  # the first warms up
        for (arch, length), step_s in turns.items():
            share = repeat / (n_repeats + 1)
            yield Progress(f"steps on {device.type}", share, (arch, f"{length} tokens"))
            seconds[arch, length].append(step_s())
    timings = []
    for (arch, length), found in seconds.items():
        batch_size = max(1, step_tokens // length)
        median_s = statistics.median(found[1:])
        timings.append(
            Timing(
                arch=arch,
                device=device.type,
                n_parameters=n_parameters[arch],
                length=length,
                batch_size=batch_size,
                step_ms=1000 * median_s,
                tokens_per_s=batch_size * length / median_s,
            )
        )
    return tuple(timings)


def _turn(model: torch.nn.Module, batch_size: int, length: int) -> Callable[[], float]:
    """Return what takes a step, forward and backward, and tells its seconds."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(length)
    shape = (batch_size, length)
    tokens = torch.randint(_VOCAB_SIZE, shape, generator=generator).to(device)

    def step_s() -> float:
        _wait(device)
        started_at = time.perf_counter()
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        _wait(device)
        took_s = time.perf_counter() - started_at
        model.zero_grad()
        return took_s

    return step_s


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()
