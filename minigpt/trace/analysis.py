"""What an attention row says, in a few numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSummary:
    """The largest parts of one row."""

    sink: float
    """Weight on position 0, where heads put what they have no use for (Xiao et al. 2023,
    arXiv:2309.17453)."""
    positions: tuple[int, ...]
    """The other positions with the most weight, most first."""
    weights: tuple[float, ...]
    """Their weights."""
    total: float
    """Sum of the whole row: 1 for a softmax row or a mean of them."""

    @property
    def rest(self) -> float:
        """Weight on all other positions together."""
        return max(0.0, self.total - self.sink - sum(self.weights))


def summarize_row(row: Tensor, n_sources: int) -> RowSummary:
    """Return the weight on position 0 and the ``n_sources`` largest others of a row (S,)."""
    top = row[1:].topk(min(n_sources, row.numel() - 1))
    # One copy to the host for all of it; float64 holds positions and float32 weights exactly.
    flat = torch.cat((row[:1], row.sum()[None], top.values, top.indices)).double().tolist()
    n_top = top.values.numel()
    return RowSummary(
        sink=flat[0],
        total=flat[1],
        weights=tuple(flat[2 : 2 + n_top]),
        positions=tuple(int(index) + 1 for index in flat[2 + n_top :]),
    )
