"""Faithfulness: how well each measure of attention predicts the effect of knocking out a position.

Whether attention weights are explanations is disputed (Jain & Wallace 2019, arXiv:1902.10186;
Wiegreffe & Pinter 2019, arXiv:1908.04626). Here each measure ranks the positions, and the
reference is the exact effect of each position on each generated token.

Shapes: N generated tokens, S positions in view.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.generation.decoder import Decoder
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.analysis.knockout import Knockouts, Query
from minigpt.tracing.analysis.measures import find
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.analysis.tally import rank_correlation
from minigpt.tracing.analysis_config import MEASURES, AnalysisConfig
from minigpt.tracing.findings import Trace, TraceStep
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace

ROLLOUT, DISTANCE, RANDOM, EXACT = "rollout", "distance", "random", "exact"
CONTROLS = {
    DISTANCE: "the nearest position first",
    RANDOM: "a random order",
    EXACT: "the exact effects themselves: the best that a ranking by single knockouts can reach",
}
"""Baseline rankings to compare the measures with."""
MIN_POSITIONS = 10
"""Minimum number of positions besides the sink for a token to count."""
TOPS = (1, 3, 5)
"""Values of k for the share of all effects that the k strongest positions have."""
SHARES = (0.01, 0.05, 0.1, 0.2, 0.5)
"""Shares of the positions to hide together, strongest first (DeYoung et al. 2020)."""
METRICS = ("rank_correlation", *(f"top_{k}" for k in TOPS), "deletion")
"""Names of a token's metrics, in the order of ``Faithfulness.metrics``."""
_N_RESAMPLES = 2000

ProgressCallback = Callable[[float, str], None]
"""Called with the share of the work done, and a description of the current step."""


@dataclass(frozen=True)
class Interval:
    """A mean over tokens, with its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of tokens for which the value is defined."""


@dataclass(frozen=True)
class Faithfulness:
    """Metrics of how well one ranking predicts the effects."""

    name: str
    metrics: dict[str, Interval | None]
    """Metrics by name, as in METRICS. None if undefined for every token."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of the measures of one model on the same tokens."""

    results: tuple[Faithfulness, ...]
    n_tokens: int
    """Number of tokens with enough positions to count."""
    n_knockouts: int
    """Number of knockouts computed."""
    mean_positions: float
    """Mean number of ranked positions per token."""
    text: str
    """Generated text of the first sample."""
    left_out: dict[str, str]
    """Measures that are not possible with the model or the length of the text, with the reason."""


@dataclass(frozen=True, kw_only=True)
class _Measures(AnalysisConfig):
    """Settings of a trace with a row for each of any number of measures."""

    compared: tuple[str, ...] = ()

    @property
    def measures(self) -> tuple[str, ...]:
        return self.compared


def measure_names() -> tuple[str, ...]:
    """Return the installed measures, and rollout."""
    return (*MEASURES, ROLLOUT)


def choose_measures(text: str) -> tuple[str, ...]:
    """Parse a list of measures such as ``weight,norm``.

    Raises: ConfigError for a measure that does not exist.
    """
    names = measure_names()
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in chosen:
        if name not in names:
            raise ConfigError(f"there is no measure {name!r}. Choose from {', '.join(names)}.")
    return chosen


def compare_measures(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: AnalysisConfig,
    *,
    measures: Sequence[str] | None = None,
    seed: int,
    progress: ProgressCallback = lambda share, what: None,
) -> Comparison:
    """Continue a prompt, and compare measures on all generated tokens.

    Each sample is decoded once for all measures and once more for the rollout, with the same
    tokens. Then each position is knocked out alone, and the strongest positions of each ranking
    together.

    Args: config, whose ``knockout`` and ``sink`` are used; measures, or None for all that are
        possible; seed, of the first sample.
    Raises: those of ``trace``; DataError if no token has MIN_POSITIONS positions besides the sink.
    """
    left_out: dict[str, str] = {}
    if measures is None:
        RowRecorder(model)  # an error for a model without attention
        n_positions = min(len(prompt) + sampling.max_new_tokens, model.config.context_length)
        left_out = _impossible(model, config, n_positions)
        measures = [name for name in measure_names() if name not in left_out]
    knockouts = Knockouts(model, config.knockout)
    found: dict[str, list[list[float]]] = {name: [] for name in (*measures, *CONTROLS)}
    generator = np.random.default_rng(seed)
    counts: list[int] = []
    first_text = ""
    for sample in range(sampling.num_samples):

        def show(share: float, what: str, sample: int = sample) -> None:
            progress((sample + share) / sampling.num_samples, what)

        traced, rows = _trace_by(
            measures, model, tokenizer, prompt, sampling, config, seed=seed + sample, progress=show
        )
        first_text = first_text or traced.text
        for n_positions, metrics in _compare_steps(model, traced, rows, knockouts, generator, show):
            counts.append(n_positions)
            for name, numbers in metrics.items():
                found[name].append(numbers)
    if not counts:
        raise DataError(
            f"no generated token has {MIN_POSITIONS} positions besides the sink before it. Give a "
            "longer prompt, or generate more tokens."
        )
    intervals = {
        name: [bootstrap(column, seed=seed) for column in np.array(numbers).T]
        for name, numbers in found.items()
    }
    return Comparison(
        tuple(
            Faithfulness(name, dict(zip(METRICS, of_metrics, strict=True)))
            for name, of_metrics in intervals.items()
        ),
        n_tokens=len(counts),
        n_knockouts=sum(counts) + len(counts) * len(found) * len(SHARES),
        mean_positions=float(np.mean(counts)),
        text=first_text,
        left_out=left_out,
    )


def _trace_by(
    measures: Sequence[str],
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: AnalysisConfig,
    *,
    seed: int,
    progress: ProgressCallback,
) -> tuple[Trace, dict[str, list[NDArray[np.float32]]]]:
    """Continue a prompt, and return its trace and the row of each step by each measure."""
    plain = tuple(name for name in measures if name != ROLLOUT)
    passes: list[tuple[str, tuple[str, ...], AnalysisConfig]] = []
    if plain:
        passes.append(("measuring", plain, _Measures(**vars(config) | {"compared": plain})))
    if ROLLOUT in measures:
        rollout = replace(config, measure="weight", reduce="rollout")
        passes.append(("rolling out", (ROLLOUT,), rollout))
    rows: dict[str, list[NDArray[np.float32]]] = {}
    for number, (what, names, of_pass) in enumerate(passes):
        events: list[Any] = []
        for event in trace(model, tokenizer, prompt, sampling, of_pass, seed=seed):
            done = min(len(events) / (sampling.max_new_tokens + 2), 1)  # + header, footer
            progress(0.5 * (number + done) / len(passes), what)
            events.append(event)
        traced = Trace.of(events)
        if traced.footer.finish is None:  # Ctrl-C ends a trace with a footer
            raise KeyboardInterrupt
        for i, name in enumerate(names):
            rows[name] = [step.rows[i].weights_S for step in traced.steps]
    return traced, rows


def _compare_steps(
    model: LanguageModel,
    traced: Trace,
    rows: dict[str, list[NDArray[np.float32]]],
    knockouts: Knockouts,
    generator: np.random.Generator,
    progress: ProgressCallback,
) -> Iterator[tuple[int, dict[str, list[float]]]]:
    """Yield the number of ranked positions and the metrics of each token with enough positions."""
    tokens = [token.id for token in traced.tokens]
    cache = Decoder(model, tokens[:-1] or tokens, max_new_tokens=1).cache
    for number, step in enumerate(traced.steps):
        positions = np.delete(np.arange(step.token.position), traced.header.sink)
        if len(positions) < MIN_POSITIONS:
            continue
        progress(0.5 + 0.5 * number / len(traced.steps), "knocking out")
        strengths = {name: abs(of_steps[number][positions]) for name, of_steps in rows.items()}
        strengths[DISTANCE] = positions.astype(np.float32)
        strengths[RANDOM] = generator.random(len(positions), dtype=np.float32)
        yield len(positions), _compare_at(step, tokens, positions, strengths, knockouts, cache)


def _compare_at(
    step: TraceStep,
    tokens: Sequence[int],
    positions_S: NDArray[np.int64],
    strengths: dict[str, NDArray[np.float32]],
    knockouts: Knockouts,
    cache: KVCache,
) -> dict[str, list[float]]:
    """Return the metrics of each ranking at one token, and those of the exact effects.

    Args: tokens, of the whole text; positions_S, to rank; strengths, of the positions by each
        ranking; cache, of the whole text.
    """
    query_position = step.token.position - 1
    query = Query(query_position, tokens[query_position], step.token.id, [])
    single = replace(query, hidden=[[position] for position in positions_S.tolist()])
    [changes] = knockouts.changes(cache, [single])
    effects_S = abs(changes[:, 0])
    strengths = strengths | {EXACT: effects_S}
    orders = {name: np.argsort(-one, kind="stable") for name, one in strengths.items()}
    hidden = [
        positions_S[order_S[: ceil(share * len(order_S))]].tolist()
        for order_S in orders.values()
        for share in SHARES
    ]
    [together] = knockouts.changes(cache, [replace(query, hidden=hidden)])
    drops = step.probability - np.exp(step.log_probability + together[:, 0])
    mean_drops = drops.reshape(-1, len(SHARES)).mean(axis=1)
    return {
        name: _numbers(strengths[name], effects_S, order_S, float(drop))
        for (name, order_S), drop in zip(orders.items(), mean_drops, strict=True)
    }


def _impossible(model: LanguageModel, config: AnalysisConfig, n_positions: int) -> dict[str, str]:
    """Return the measures that are not possible, with the reason."""
    reasons: dict[str, str] = {}
    for name in measure_names():
        try:
            if name == ROLLOUT:
                Rollout(select_heads(1, 1), n_positions)
            elif name != "weight":
                find(name).make(model, config)
        except ConfigError as error:
            reasons[name] = str(error)
    return reasons


def _numbers(
    strengths_S: NDArray[np.float32],
    effects_S: NDArray[np.float32],
    order_S: NDArray[np.int64],
    drop: float,
) -> list[float]:
    """Return the metrics of one token, in the order of METRICS; NaN if undefined."""
    correlation = rank_correlation(strengths_S, effects_S)
    total = float(effects_S.sum())
    shares = [effects_S[order_S[:k]].sum() / total if total else np.nan for k in TOPS]
    return [np.nan if correlation is None else correlation, *map(float, shares), drop]


def bootstrap(values_N: NDArray[np.float64], *, seed: int) -> Interval | None:
    """Return the mean of the values that are not NaN, with its interval; None if all are NaN.

    Source: Efron 1979 (percentile interval of resampled means).
    """
    values_N = values_N[~np.isnan(values_N)]
    n = len(values_N)
    if not n:
        return None
    generator = np.random.default_rng(seed)
    means = [values_N[generator.integers(0, n, n)].mean() for _ in range(_N_RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values_N.mean()), float(low), float(high), n)
