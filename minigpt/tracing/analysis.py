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


def row_facts(rows_RS: Tensor, *, sink: int, n_prompt: int, n_sources: int) -> RowFacts:
    """Return the facts about some rows, by one copy from the device.

    Args: sink, the position that is left out of the sources; n_prompt, how many of the positions
        are the prompt's; n_sources, at most so many a row.
    """
    n_rows, n_view = rows_RS.shape
    place_S = torch.arange(n_view, device=rows_RS.device)
    counted_S3 = torch.stack(
        (torch.ones_like(place_S), place_S < n_prompt, n_view - 1 - place_S), dim=1
    )
    sums_R3 = rows_RS @ counted_S3.float()  # total, prompt, distance times total
    total_R1 = sums_R3[:, :1].clamp(min=1e-30)
    entropy_R1 = torch.special.entr(rows_RS / total_R1).sum(dim=1, keepdim=True) / math.log(2)
    others_RS = rows_RS.clone()
    others_RS[:, sink] = -1
    top = others_RS.topk(min(n_sources, n_view - 1), dim=1)
    n_top = top.values.shape[1]
    # float32 holds positions below 2^24 exactly.
    packed = torch.cat(
        (
            sums_R3[:, :2],
            sums_R3[:, 2:] / total_R1,
            entropy_R1,
            rows_RS[:, sink : sink + 1],
            rows_RS[:, -1:],
            top.values,
            top.indices.float(),
        ),
        dim=1,
    )
    flat = torch.cat((packed.flatten(), rows_RS[0])).cpu().numpy()
    facts = flat[: packed.numel()].reshape(n_rows, -1)
    return RowFacts(
        total_R=facts[:, 0],
        prompt_R=facts[:, 1],
        distance_R=facts[:, 2],
        entropy_R=facts[:, 3],
        sink_R=facts[:, 4],
        own_R=facts[:, 5],
        positions_RK=facts[:, 6 + n_top :].astype(np.int32),
        weights_RK=facts[:, 6 : 6 + n_top],
        first_S=flat[packed.numel() :],
    )
