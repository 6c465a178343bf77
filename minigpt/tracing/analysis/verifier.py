"""Effects of knockouts in a trace: which positions to hide at each step, and what changes.

Shapes: S positions in view.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.knockout import Knockouts, Query
from minigpt.tracing.analysis.tally import CauseTally
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import Effect, Kept, TraceStep
from minigpt.tracing.head_lists import HeadSelection, select_heads
from minigpt.tracing.signals import delay_signals

_WAIT_S = 0.25
"""Longest time for which a token waits to be verified in a batch with the next ones."""


class Verifier:
    """Adds the effects of knockouts to the steps of a trace, in batches over several steps."""

    def __init__(self, model: LanguageModel, config: AnalysisConfig) -> None:
        """Raises: ConfigError for heads that the model does not have, or a kind of knockout that it
        does not support.
        """
        shape = model.config
        self.selection: HeadSelection | None = None
        """Heads in which positions are hidden. None for all."""
        if config.verify_layers is not None or config.verify_heads is not None:
            self.selection = select_heads(
                shape.n_attention_layer,
                shape.n_head,
                layers=config.verify_layers,
                heads=config.verify_heads,
                options=("--verify-layers", "--verify-heads"),
            )
        self._knockouts = Knockouts(model, config.knockout, self.selection)
        windows = [
            attention.score.window
            for layer, attention in enumerate(model.attentions)
            if self.selection is None or self.selection.heads_by_layer[layer]
        ]
        self._window = 0 if 0 in windows else max(windows)
        """Widest sliding window of the layers in which sources are knocked out; 0 for none."""
        self._n_verified = config.n_verified
        self._n_shown = config.n_kept
        self.tally = CauseTally()
        """Knockouts of the steps so far."""

    def verify(
        self, steps: Iterable[TraceStep], tokens: Sequence[Token], cache: KVCache, *, sink: int
    ) -> Iterator[TraceStep]:
        """Yield the steps with their effects, in order.

        Steps wait until their knockouts fill a batch, but not much longer than ``_WAIT_S``, or
        until the steps end or fail.

        Args: tokens, at least those that the newest step's query sees; cache, with at least their
            keys and values; sink, a position that is never a source or a control.
        """
        waiting: list[TraceStep] = []
        n_rows, due = 0, 0.0  # the first token is shown at once
        try:
            for step in steps:
                waiting.append(step)
                n_view, n_verified = step.token.position, self._n_verified
                n_rows += 1 + (n_view if n_verified == "all" else min(n_view, 2 * n_verified + 1))
                if n_rows >= self._knockouts.batch_rows or time.perf_counter() > due:
                    batch, waiting, n_rows = waiting, [], 0
                    yield from self._with_effects(batch, tokens, cache, sink)
                    due = time.perf_counter() + _WAIT_S
        finally:
            yield from self._with_effects(waiting, tokens, cache, sink)

    def _with_effects(
        self, steps: Sequence[TraceStep], tokens: Sequence[Token], cache: KVCache, sink: int
    ) -> Iterator[TraceStep]:
        verified: list[TraceStep] = []
        try:
            with delay_signals():
                plans = [
                    _plan(abs(step.row.weights_S), self._n_verified, sink, self._window)
                    for step in steps
                ]
                places = [step.token.position - 1 for step in steps]
                queries = [
                    Query(place, tokens[place].id, step.token.id, plan.hidden)
                    for place, step, plan in zip(places, steps, plans, strict=True)
                ]
                changes = self._knockouts.changes(cache, queries)
                verified = [
                    self._verified(step, tokens, plan, of_step)
                    for step, plan, of_step in zip(steps, plans, changes, strict=True)
                ]
        finally:
            for step in verified:
                self.tally.add(step)
                yield step

    def _verified(
        self,
        step: TraceStep,
        tokens: Sequence[Token],
        plan: "_Plan",
        changes: NDArray[np.float32],
    ) -> TraceStep:
        """Return a step with its effects."""
        weights_S = step.row.weights_S

        def effect(position: int, change: float, control_of: int | None = None) -> Effect:
            source = Source(tokens[position], float(weights_S[position]))
            return Effect(source, float(change), control_of)

        if plan.chosen is None:
            changes_S = changes[:, 0]
            largest = np.argsort(-abs(changes_S), kind="stable")[: self._n_shown].tolist()
            effects = tuple(effect(position, changes_S[position]) for position in largest)
            return replace(step, effects=effects, changes_S=changes_S)
        effects = tuple(
            effect(position, change, control_of)
            for (position, control_of), change in zip(plan.chosen, changes[:, 0], strict=False)
        )
        kept = Kept(*map(float, changes[-1])) if len(changes) > len(effects) else None
        return replace(step, effects=effects, kept=kept)


@dataclass(frozen=True)
class _Plan:
    """Knockouts to compute for one token."""

    hidden: list[list[int]]
    """Positions to hide, for each row."""
    chosen: list[tuple[int, int | None]] | None = None
    """Position of each source, with None, and of each control, with its source's index. None if
    each position is hidden in turn."""


def _plan(
    weights_S: NDArray[np.float32], n_verified: int | Literal["all"], sink: int, window: int
) -> _Plan:
    """Plan to hide each source, each control, and finally all but the sources and the sink."""
    if n_verified == "all":
        return _Plan([[position] for position in range(len(weights_S))])
    order = np.argsort(-weights_S, kind="stable").tolist()
    sources = [position for position in order if position != sink][:n_verified]
    # Outside the window, a knockout has no effect.
    first = max(0, len(weights_S) - window) if window else 0
    controls = choose_controls(weights_S, sources, sink=sink, first=first)
    chosen: list[tuple[int, int | None]] = [(position, None) for position in sources]
    chosen += [(position, i) for i, position in enumerate(controls) if position is not None]
    hidden = [[position] for position, _ in chosen]
    others = [p for p in range(len(weights_S)) if p not in (sink, *sources)]
    hidden += [others] if sources and others else []
    return _Plan(hidden, chosen)


def choose_controls(
    weights_S: NDArray[np.float32], sources: Sequence[int], *, sink: int, first: int = 0
) -> list[int | None]:
    """Return a control for each source: the nearest position with a smaller weight.

    Sources, the sink, controls of other sources and positions before ``first`` are not eligible. At
    equal distance, the earlier position is chosen. None if no position is left.
    """
    taken: set[int | None] = {sink, *sources, *range(first)}
    controls: list[int | None] = []
    for source in sources:
        smaller = np.flatnonzero(weights_S < weights_S[source]).tolist()
        nearest = sorted(smaller, key=lambda position: abs(position - source))
        control = next((position for position in nearest if position not in taken), None)
        controls.append(control)
        taken.add(control)
    return controls
