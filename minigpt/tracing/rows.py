"""Rows -> one row -> a few numbers that say what it looked at.

Shapes: L layers, H query heads, S positions in view, R rows, K sources.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.tracing.selection import HeadSelection

_LEAST = 1e-30


def reduce_rows(rows_LHS: Tensor, selection: HeadSelection, *, is_max: bool = False) -> Tensor:
    """Return the mean of the chosen heads' rows, or of each position the largest: (S,)."""
    rows_RS = rows_LHS.flatten(0, 1)
    if not selection.is_all:
        rows_RS = rows_RS[selection.flat_indices]
    return rows_RS.amax(dim=0) if is_max else rows_RS.mean(dim=0)


@dataclass(frozen=True)
class RowFacts:
    """Facts about R rows of S positions."""

    total_R: NDArray[np.float32]
    sink_R: NDArray[np.float32]
    own_R: NDArray[np.float32]
    """On the last position, the query's own."""
    prompt_R: NDArray[np.float32]
    """On the prompt, the sink and the own position among it."""
    entropy_R: NDArray[np.float32]
    """Bits, of the row as shares of its sum."""
    distance_R: NDArray[np.float32]
    """Mean distance from the last position, of the row as shares of its sum."""
    positions_RK: NDArray[np.int32]
    """The positions with the most weight, the sink left out, most first."""
    weights_RK: NDArray[np.float32]
    """Their weights."""
    first_S: NDArray[np.float32]
    """The first row, whole."""


class RowReader:
    """Finds the facts about rows, by one copy from the device."""

    def __init__(self, *, sink: int, n_prompt: int, n_sources: int) -> None:
        """Args: sink, the position that is left out of the sources; n_prompt, how many of the
        positions are the prompt's; n_sources, at most so many a row.
        """
        self._sink, self._n_prompt, self._n_sources = sink, n_prompt, n_sources
        self._counted_P3 = torch.empty(0, 3)

    def facts(self, rows_RS: Tensor) -> RowFacts:
        """Return the facts about some rows."""
        n_rows, n_view = rows_RS.shape
        others_RS = rows_RS.clone()
        others_RS[:, self._sink] = -1
        top = others_RS.topk(min(self._n_sources, n_view - 1), dim=1)
        n_top = top.values.shape[1]
        # As few calls as it takes: between the reads of a model's weights each is slow.
        packed = torch.cat(
            (
                rows_RS @ self._counted(n_view, rows_RS.device),
                torch.special.entr(rows_RS).sum(dim=1, keepdim=True),
                rows_RS[:, self._sink, None],
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
            # Of shares p = r / t: -sum p ln p = -sum r ln r / t + ln t.
            entropy_R=np.maximum(facts[:, 3] / total_R + np.log(total_R), 0) / math.log(2),
            sink_R=facts[:, 4],
            own_R=facts[:, 5],
            positions_RK=facts[:, 6 + n_top :].astype(np.int32),
            weights_RK=facts[:, 6 : 6 + n_top],
            first_S=flat[packed.numel() :],
        )

    def _counted(self, n_view: int, device: torch.device) -> Tensor:
        """Return (S, 3), what a row is multiplied by for its total, the prompt's part and the mean
        position times the total.
        """
        if len(self._counted_P3) < n_view:
            place_P = torch.arange(2 * n_view, device=device)
            columns = (torch.ones_like(place_P), place_P < self._n_prompt, place_P)
            self._counted_P3 = torch.stack(columns, dim=1).float()
        return self._counted_P3[:n_view]
