"""What forward shows of its attention, kept: the last query's row, reduced on the device.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from typing import Literal

import torch
from torch import Tensor

from minigpt.model.scores import attention_weights
from minigpt.trace.selection import HeadSelection

Reduce = Literal["mean", "max"]


class RowRecorder:
    """Computes each layer's attention row of the last query, and reduces the rows to one.

    The model's own path is not touched: the row is softmax(q K^T / sqrt(D)) of the query and the
    cached keys that the kernel was given, computed beside it in float32.
    """

    def __init__(self, selection: HeadSelection, reduce: Reduce = "mean") -> None:
        self.selection = selection
        self.reduce = reduce
        self._first_layer = min(i for i, heads in enumerate(selection.heads_by_layer) if heads)
        self.folded: Tensor | None = None
        """The last pass's rows (S,) so far: their sum or their maximum."""

    @property
    def graph_key(self) -> str:
        """What ``fold`` does; recorders with equal keys fold alike."""
        return f"{self.reduce} {self.selection.as_text()} {self.selection.n_head}"

    @torch.no_grad()
    def record(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor
    ) -> None:
        """Take one layer's row into the reduction; a forward pass starts a new one."""
        if self.selection.heads_by_layer[layer]:
            weights_HS = attention_weights(q_BHTD[:1, :, -1:], k_BGSD[:1])[0, :, 0]
            self.folded = self.fold(layer, weights_HS, self.folded)

    def fold(self, layer: int, weights_HS: Tensor, folded: Tensor | None) -> Tensor | None:
        """Return the rows of the layers before, reduced to one, with this layer's; pure.

        A pass that shows its weights, as a compiled one does, needs only this of a recorder.
        """
        heads = self.selection.heads_by_layer[layer]
        if not heads:
            return folded
        if len(heads) < self.selection.n_head:
            weights_HS = weights_HS[list(heads)]
        row = weights_HS.sum(dim=0) if self.reduce == "mean" else weights_HS.amax(dim=0)
        if layer == self._first_layer:
            return row
        assert folded is not None
        return folded + row if self.reduce == "mean" else torch.maximum(folded, row)

    def row(self) -> Tensor:
        """Return the last forward pass's reduced row: (S,), float32, on the model's device.

        The mean over heads sums to 1; the maximum does not.
        """
        assert self.folded is not None, "no forward pass was recorded"
        return self.folded / self.selection.n_chosen if self.reduce == "mean" else self.folded
