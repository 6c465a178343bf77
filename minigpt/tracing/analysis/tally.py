"""Summary of a trace's knockouts: do larger weights come with larger effects?"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minigpt.tracing.findings import CauseCheck, TraceStep


class CauseTally:
    """Accumulates knockouts, to check whether larger weights come with larger effects."""

    def __init__(self) -> None:
        self._found: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        """|weight| and |change| of the sources, and of the controls."""

    def add(self, step: TraceStep) -> None:
        """Add a step's knockouts; if all positions were knocked out, each counts as a source."""
        if step.changes_S is not None:
            weights_S, changes_S = abs(step.row.weights_S), abs(step.changes_S)
            pairs = zip(weights_S.tolist(), changes_S.tolist(), strict=True)
            self._found[True] += pairs
            return
        for effect in step.effects:
            pair = abs(effect.source.weight), abs(effect.change)
            self._found[effect.control_of is None].append(pair)

    def check(self) -> CauseCheck | None:
        """Return the result, or None if nothing was knocked out."""
        sources, controls = self._found[True], self._found[False]
        if not sources:
            return None
        return CauseCheck(
            n_sources=len(sources),
            n_controls=len(controls),
            mean_effect=_mean_effect(sources),
            mean_control_effect=_mean_effect(controls) if controls else None,
            rank_correlation=rank_correlation(*zip(*sources, *controls, strict=True)),
        )


def _mean_effect(pairs: Sequence[tuple[float, float]]) -> float:
    return float(np.mean([effect for _, effect in pairs]))


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's rank correlation, where equal values get the mean of their ranks.

    None for fewer than three pairs, or if all values of x or of y are equal.
    """
    ranks_x, ranks_y = _centred_ranks(x), _centred_ranks(y)
    scale = float(np.sqrt((ranks_x @ ranks_x) * (ranks_y @ ranks_y)))
    if len(ranks_x) < 3 or scale == 0:  # two pairs always give 1 or -1
        return None
    return float(ranks_x @ ranks_y) / scale


def _centred_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return the ranks minus their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + len(place)) / 2)[place]
