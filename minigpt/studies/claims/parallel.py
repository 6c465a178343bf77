"""Claim 3: attention trains all positions in parallel, a recurrent network one after another."""

import statistics
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F

from minigpt.format import with_unit
from minigpt.model.cost import parameter_count
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.studies.claims.learning import Progress, Size, equal_size_config
from minigpt.studies.claims.study import Panel, Study, Verdict, percent

FASTER = 2.0
"""Smallest ratio of two speeds that counts as faster."""
_ARCHS = ("lstm", "gpt")
_VOCAB_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Time of a forward and backward pass at one sequence length."""

    arch: str
    device: str
    n_parameters: int
    length: int
    """Tokens in a sequence."""
    batch_size: int
    """Sequences in a step."""
    step_ms: float
    """Median time of a step, in milliseconds."""
    tokens_per_s: float


def measure(study: Study) -> Generator[Progress, None, tuple[Timing, ...]]:
    """Time training steps on the CPU and on the study's device."""
    timings: tuple[Timing, ...] = ()
    # The outcome may differ between CPU and GPU, and every machine has a CPU.
    for device in dict.fromkeys((torch.device("cpu"), study.device)):
        timings += yield from _measure_on(device, study.size)
    return timings


def _measure_on(device: torch.device, size: Size) -> Generator[Progress, None, tuple[Timing, ...]]:
    """Time steps with the same number of tokens at all lengths.

    Lengths and architectures alternate, so that other load on the machine affects all of them.
    """
    models: dict[str, LanguageModel] = {}
    for arch in _ARCHS:
        config = equal_size_config(
            arch, size.timed_d_model, context_length=max(size.lengths), vocab_size=_VOCAB_SIZE
        )
        models[arch] = model_class(config)(config).to(device)
    batch_sizes = {length: max(1, size.step_tokens // length) for length in size.lengths}
    seconds: dict[tuple[str, int], list[float]] = {k: [] for k in product(_ARCHS, size.lengths)}
    n_rounds = size.n_repeats + 1  # the first round warms up
    for repeat, (arch, length) in product(range(n_rounds), seconds):
        yield Progress(f"steps on {device.type}", repeat / n_rounds, (arch, f"{length} tokens"))
        shape = batch_sizes[length], length
        generator = torch.Generator().manual_seed(length)
        tokens = torch.randint(_VOCAB_SIZE, shape, generator=generator).to(device)
        _wait(device)
        started_at = time.perf_counter()
        F.cross_entropy(models[arch](tokens).flatten(0, 1), tokens.flatten()).backward()
        _wait(device)
        seconds[arch, length].append(time.perf_counter() - started_at)
        models[arch].zero_grad()
    timings = []
    for (arch, length), found in seconds.items():
        median_s = statistics.median(found[1:])
        timings.append(
            Timing(
                arch=arch,
                device=device.type,
                n_parameters=parameter_count(models[arch].config),
                length=length,
                batch_size=batch_sizes[length],
                step_ms=1000 * median_s,
                tokens_per_s=batch_sizes[length] * length / median_s,
            )
        )
    return tuple(timings)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def judge(timings: Sequence[Timing]) -> Verdict:
    """Judge whether the Transformer trains long sequences faster, and keeps its speed.

    Borne out if on every device it is faster at the largest length, and by more than at the
    smallest; in part if on some device.
    """
    reasons, holds = [], []
    for device in dict.fromkeys(timing.device for timing in timings):
        speed = {(t.arch, t.length): t.tokens_per_s for t in timings if t.device == device}
        lengths = sorted({length for _, length in speed})
        short, long = lengths[0], lengths[-1]
        ratio = {length: speed["gpt", length] / speed["lstm", length] for length in lengths}
        kept = {arch: speed[arch, long] / speed[arch, short] for arch in _ARCHS}
        reasons.append(
            f"{device}: the Transformer trains {ratio[short]:.2g} times as many tokens/s as the "
            f"LSTM at length {short}, {ratio[long]:.2g} times as many at {long}."
        )
        reasons.append(
            f"{device}: from length {short} to {long}, with the same number of tokens in a step, "
            f"the LSTM keeps {percent(kept['lstm'])} of its speed and the Transformer "
            f"{percent(kept['gpt'])}."
        )
        if kept["gpt"] < 1 / FASTER:
            reasons.append(f"{device}: attention compares all pairs of positions, at a cost.")
        if ratio[long] < FASTER:
            reasons.append(
                f"{device}: the LSTM has enough parallelism over the batch and its width here."
            )
        holds.append(ratio[long] >= FASTER and ratio[long] > ratio[short])
    return Verdict.of("parallel", reasons, holds=all(holds), in_part=any(holds))


def table(timings: Sequence[Timing]) -> list[list[str]]:
    """Return a table with a row per architecture, device and length."""
    return [["training", "parameters", "length", "batch", "ms/step", "tokens/s"]] + [
        [
            f"{one.arch} on {one.device}",
            str(one.n_parameters),
            str(one.length),
            str(one.batch_size),
            f"{one.step_ms:.3g}",
            with_unit(one.tokens_per_s, "").strip(),
        ]
        for one in timings
    ]


def panels(timings: Sequence[Timing]) -> list[Panel]:
    """Return a chart for each device: training speed by sequence length."""
    charts = []
    for device in dict.fromkeys(timing.device for timing in timings):
        lines = []
        for arch in _ARCHS:
            found = [one for one in timings if (one.device, one.arch) == (device, arch)]
            lines.append((arch, [t.length for t in found], [t.tokens_per_s for t in found]))
        charts.append(Panel(device, "tokens", "trained tokens/s", lines))
    return charts
