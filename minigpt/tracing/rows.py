"""Rows of attention, reduced over heads and summarized in a few numbers.

Shapes: L layers, H query heads, S positions in view, R rows, K sources.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.tracing.config import Measure
from minigpt.tracing.events import HeadRows, Row, Source, Token
from minigpt.tracing.selection import HeadSelection

_LEAST = 1e-30


def reduce_rows(rows_LHS: Tensor, selection: HeadSelection, *, is_max: bool = False) -> Tensor:
    """Return the mean of the chosen heads' rows, or the maximum at each position: (S,)."""
    rows_RS = rows_LHS.flatten(0, 1)
    if not selection.is_all:
        rows_RS = rows_RS[selection.flat_indices]
    return rows_RS.amax(dim=0) if is_max else rows_RS.mean(dim=0)


@dataclass(frozen=True)
class RowFacts:
    """Summaries of R rows of S positions."""

    total_R: NDArray[np.float32]
    """Sum of the row."""
    sink_R: NDArray[np.float32]
    """Weight on the sink."""
    own_R: NDArray[np.float32]
    """Weight on the last position, the query's own."""
    prompt_R: NDArray[np.float32]
    """Weight on the prompt, including the sink."""
    entropy_R: NDArray[np.float32]
    """Entropy of the normalized row, in bits."""
    distance_R: NDArray[np.float32]
    """Mean distance from the last position under the normalized row."""
    positions_RK: NDArray[np.int32]
    """Positions with the largest weights, except the sink, in descending order."""
    weights_RK: NDArray[np.float32]
    """Weights of those positions."""
    first_S: NDArray[np.float32]
    """The whole first row."""

    def first_row(
        self, measure: Measure, tokens: Sequence[Token], heads: HeadRows | None = None
    ) -> Row:
        """Return the first row; ``tokens`` are those in view."""
        total, prompt = float(self.total_R[0]), float(self.prompt_R[0])
        sources = zip(self.positions_RK[0].tolist(), self.weights_RK[0].tolist(), strict=True)
        return Row(
            measure=measure,
            total=total,
            sink=float(self.sink_R[0]),
            own=float(self.own_R[0]),
            prompt=prompt,
            generated=max(0.0, total - prompt),
            entropy=float(self.entropy_R[0]),
            distance=float(self.distance_R[0]),
            sources=tuple(Source(tokens[position], weight) for position, weight in sources),
            weights_S=self.first_S,
            heads=heads,
        )

    def by_head(self, n_layer: int) -> HeadRows:
        """Return the summaries of all rows but the first, by layer and head."""

        def grid(array_RX: NDArray[Any]) -> NDArray[Any]:
            return array_RX[1:].reshape(
                n_layer, (len(array_RX) - 1) // n_layer, *array_RX.shape[1:]
            )

        return HeadRows(
            sink_LH=grid(self.sink_R),
            own_LH=grid(self.own_R),
            prompt_LH=grid(self.prompt_R),
            entropy_LH=grid(self.entropy_R),
            distance_LH=grid(self.distance_R),
            positions_LHK=grid(self.positions_RK),
            weights_LHK=grid(self.weights_RK),
        )


class RowReader:
    """Summarizes rows with a single copy from the device."""

    def __init__(self, *, sink: int, n_prompt: int, n_sources: int) -> None:
        """Prepare to read the rows of one sequence.

        Args: sink, the position that is not listed among the sources; n_prompt, the number of
            positions of the prompt; n_sources, the maximum number of sources per row.
        """
        self.sink, self._n_prompt, self._n_sources = sink, n_prompt, n_sources
        self._columns_P3 = torch.empty(0, 3)

    def facts(self, rows_RS: Tensor) -> RowFacts:
        """Return the summaries of some rows."""
        n_rows, n_view = rows_RS.shape
        others_RS = rows_RS.clone()
        others_RS[:, self.sink] = -1
        top = others_RS.topk(min(self._n_sources, n_view - 1), dim=1)
        n_top = top.values.shape[1]
        # Few calls, because each costs as much as the work in it.
        packed = torch.cat(
            (
                rows_RS @ self._columns(n_view, rows_RS.device),
                torch.special.entr(rows_RS).sum(dim=1, keepdim=True),
                rows_RS[:, self.sink, None],
                rows_RS[:, -1:],
                top.values,
                top.indices.float(),  # exact below 2^24
            ),
            dim=1,
        )
        flat = torch.cat((packed.flatten(), rows_RS[0])).cpu().numpy()
        facts = flat[: packed.numel()].reshape(n_rows, -1)
        total_R = np.maximum(facts[:, 0], _LEAST)
        return RowFacts(
            total_R=facts[:, 0],
            prompt_R=facts[:, 1],
            distance_R=n_view - 1 - facts[:, 2] / total_R,
            # With p = r / t: -sum p ln p = -sum r ln r / t + ln t.
            entropy_R=np.maximum(facts[:, 3] / total_R + np.log(total_R), 0) / math.log(2),
            sink_R=facts[:, 4],
            own_R=facts[:, 5],
            positions_RK=facts[:, 6 + n_top :].astype(np.int32),
            weights_RK=facts[:, 6 : 6 + n_top],
            first_S=flat[packed.numel() :],
        )

    def _columns(self, n_view: int, device: torch.device) -> Tensor:
        """Return (S, 3); a row times it is the total, the prompt's weight, and the sum of weight x
        position.
        """
        if len(self._columns_P3) < n_view:
            place_P = torch.arange(2 * n_view, device=device)
            columns = (torch.ones_like(place_P), place_P < self._n_prompt, place_P)
            self._columns_P3 = torch.stack(columns, dim=1).float()
        return self._columns_P3[:n_view]
