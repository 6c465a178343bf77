"""Results of the timed turns: medians, paired ratios, a table, and the goals."""

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from decoders import N_READS, READ_BYTES, Contender, Turn

MEMORY = Contender("memory", "fp32")
_BYTES_PER_WEIGHT = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0}
_Q8_0_BYTES = 34 / 32  # blocks of 32 bytes, each with a scale of two bytes


@dataclass(frozen=True)
class Measured:
    """The turns of a contender, one per round."""

    contender: Contender
    turns: list[Turn]
    prefill_s: dict[int, list[float]] = field(default_factory=dict)
    """Seconds to the first token after prompts of these lengths, one per round."""

    @property
    def tokens_per_s(self) -> float:
        """Throughput of all rows after the first token."""
        n_tokens = (len(self.turns[0].tokens) - 1) * self.contender.n_rows
        return n_tokens / statistics.median(turn.rest_s for turn in self.turns)

    @property
    def step_ms(self) -> float:
        """Time of one step, which decodes a token of every row."""
        return 1e3 * self.contender.n_rows / self.tokens_per_s

    @property
    def first_ms(self) -> float:
        """Time from the prompt to the first token."""
        return 1e3 * statistics.median(turn.first_s for turn in self.turns)

    @property
    def peak_mb(self) -> float:
        return max(turn.peak_bytes for turn in self.turns) / 1e6

    def times_faster(self, other: "Measured") -> float:
        """Return the median over rounds of the ratio of tokens/s in the same round."""
        rows = self.contender.n_rows / other.contender.n_rows
        pairs = zip(self.turns, other.turns, strict=True)
        return rows * statistics.median(theirs.rest_s / ours.rest_s for ours, theirs in pairs)


Results = Mapping[Contender, Measured]


def bandwidth(results: Results) -> float | None:
    """Return the memory bandwidth, in bytes/s."""
    read = results.get(MEMORY)
    if read is None:
        return None
    return N_READS * READ_BYTES / statistics.median(turn.rest_s for turn in read.turns)


def bandwidth_share(measured: Measured, n_weights: int, bytes_per_s: float) -> float:
    """Return the share of the bandwidth that reading the weights once per step uses."""
    contender = measured.contender
    is_q8_0 = contender.engine == "llama.cpp" and contender.precision == "int8"
    size = _Q8_0_BYTES if is_q8_0 else _BYTES_PER_WEIGHT[contender.precision]
    return n_weights * size * 1e3 / measured.step_ms / bytes_per_s


def transformers_of(contender: Contender, results: Results) -> Measured | None:
    """Return the faster of transformers' generate and loop, for the same batch size and precision.

    transformers is not run in int8: int8 is compared with its bf16.
    """
    precision = "bf16" if contender.precision == "int8" else contender.precision
    variants = [
        Contender("transformers", precision, variant, n_rows=contender.n_rows)
        for variant in ("", "loop")
    ]
    return _fastest([results[variant] for variant in variants if variant in results])


def _fastest(measured: list[Measured]) -> Measured | None:
    return max(measured, key=lambda one: one.tokens_per_s, default=None)


def n_same(tokens: list[int], reference: list[int]) -> int:
    """Return the length of the common prefix of two token sequences."""
    pairs = enumerate(zip(tokens, reference, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(reference)))


def table(results: Results, n_weights: int, reference: list[int]) -> str:
    """Return the results as Markdown. Args: reference, the float32 tokens."""
    heads = ["", "tokens/s", "ms/step", "first token", "peak memory", "share of bandwidth"]
    rows = [[*heads, "x transformers", "tokens as float32"], ["---"] + 7 * ["---:"]]
    bytes_per_s = bandwidth(results)
    for contender, measured in results.items():
        if contender == MEMORY:
            continue
        theirs = transformers_of(contender, results)
        share = bytes_per_s and bandwidth_share(measured, n_weights, bytes_per_s)
        agreed = n_same(measured.turns[0].tokens, reference)
        rows.append(
            [
                contender.name,
                f"{measured.tokens_per_s:.4g}",
                f"{measured.step_ms:.3g}",
                f"{measured.first_ms:.3g} ms",
                f"{measured.peak_mb:,.0f} MB",
                f"{share:.0%}" if share else "-",
                f"{measured.times_faster(theirs):.2f}" if theirs else "-",
                # gpt-fast's model class cannot load the same weights.
                "other weights" if contender.engine == "gpt-fast" else f"{agreed}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def prefill_table(results: Results) -> str:
    """Return the milliseconds to the first token for each prompt length as Markdown."""
    timed = {one.name: measured.prefill_s for one, measured in results.items() if one != MEMORY}
    lengths = sorted({length for times in timed.values() for length in times})
    rows = [["", *map(str, lengths)], ["---", *["---:"] * len(lengths)]]
    for name, times in timed.items():
        cells = [f"{1e3 * statistics.median(times[n]):.0f}" if n in times else "-" for n in lengths]
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@dataclass(frozen=True)
class Bar:
    """A goal: a speedup by a factor over the fastest of some contenders."""

    ours: Contender
    theirs: tuple[Contender, ...]
    """Contenders to compare with; the fastest counts."""
    factor: float

    def verdict(self, results: Results) -> str:
        """Return a line with the ratio and its distance from the goal."""
        against = _fastest([results[theirs] for theirs in self.theirs if theirs in results])
        missing = [self.ours.name] * (self.ours not in results)
        missing += [self.theirs[0].name] * (against is None)
        if missing or against is None:
            return f"not measured: {' and '.join(missing)}"
        ratio = results[self.ours].times_faster(against)
        word = "reached" if ratio >= self.factor else "not reached"
        by = f"{abs(ratio / self.factor - 1):.0%} {'above' if ratio >= self.factor else 'below'}"
        return f"{word}: {ratio:.2f} x {against.contender.name}, {by}"

    def __str__(self) -> str:
        return f"{self.ours.name}, {self.factor:g} x {self.theirs[0].name}"


def _transformers(precision: str) -> tuple[Contender, ...]:
    return (
        Contender("transformers", precision),
        Contender("transformers", precision, "loop"),
    )


def bars(shape: str, device: str) -> list[Bar]:
    """Return the goals of a shape."""
    eager = {name: Contender("minigpt", name) for name in _BYTES_PER_WEIGHT}
    compiled = {name: Contender("minigpt", name, is_compiled=True) for name in _BYTES_PER_WEIGHT}
    fast = {name: (Contender("gpt-fast", name, is_compiled=True),) for name in ("fp32", "bf16")}
    if device == "cuda":
        return [Bar(compiled["bf16"], fast["bf16"], 2.0)] if shape == "gpt2" else []
    eager_factor = {"gpt2": 1.5, "mini": 2.5}[shape]
    found = [Bar(eager[name], _transformers(name), eager_factor) for name in ("fp32", "bf16")]
    if shape == "gpt2":
        found += [
            Bar(compiled["fp32"], _transformers("fp32"), 1.8),
            Bar(compiled["bf16"], _transformers("bf16"), 2.2),
            Bar(eager["int8"], (eager["bf16"],), 1.4),
            Bar(compiled["int8"], (compiled["bf16"],), 1.4),
        ]
    found += [Bar(compiled[name], fast[name], 1.3) for name in fast]
    found += [Bar(compiled[name], (Contender("llama.cpp", name),), 1.0) for name in compiled]
    if shape == "mini":
        found.append(Bar(Contender("minigpt", "fp32", n_rows=16), (eager["fp32"],), 6.0))
    return found
