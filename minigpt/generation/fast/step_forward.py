"""Decoding by a decode step: one new token per row by the step, more by the model itself.

Shapes: L layers, B rows, H query heads, D head dim, S positions in view.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.generation.forward import PlainForward
from minigpt.model.attention import AttentionPass, Recorder
from minigpt.model.gpt import GPT


@dataclass(frozen=True)
class StepOutput:
    """Results of a decode step; weights and contexts only for a recorder."""

    logits: Tensor
    weights_LBHS: Tensor | None = None
    context_LBHD: Tensor | None = None


class StepForward(PlainForward):
    """Runs ``_decode`` for one new token per row, and GPT.forward for more, on the same cache.

    A prompt is one pass over the weights for all its tokens, where libraries are fast already.
    """

    min_rows = 1
    """Least number of rows that a step takes; the last row is repeated."""

    def __init__(self, model: GPT, *, capacity: int, recorder: Recorder | None = None) -> None:
        super().__init__(model, capacity=capacity, recorder=recorder)

    def _bind(self) -> None:
        """Make the buffers for the rows that the cache now has."""
        raise NotImplementedError

    def _decode(self, tokens: Tensor, position: int) -> StepOutput:
        """Run the step for tokens (B,) at a position that the cache has room for."""
        raise NotImplementedError

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        n_rows, n_new = tokens.shape
        if n_new == 1 and self.cache.n_rows < self.min_rows:
            self.keep([0])
        if n_rows < self.cache.n_rows:  # the cache repeats the last row
            tokens = torch.cat((tokens, tokens[-1:].expand(self.cache.n_rows - n_rows, -1)))
        if n_new > 1:
            return super().feed(tokens)[:n_rows]
        length = self.cache.length
        if length == self.config.context_length:
            raise ValueError(f"the model sees {length} positions; {length + 1} were given")
        self.cache.require_room(length + 1)
        output = self._decode(tokens[:, 0], length)
        self.cache.advance(1)
        if self.recorder is not None:
            assert output.weights_LBHS is not None
            assert output.context_LBHD is not None
            self.recorder.record(
                AttentionPass(
                    output.weights_LBHS[:, :n_rows, :, : length + 1],
                    output.context_LBHD[:, :n_rows],
                    self.cache.values_LBGSD[:, :n_rows, :, : length + 1],
                    n_new=1,
                )
            )
        return output.logits[:n_rows]

    def keep(self, rows: Sequence[int]) -> None:
        super().keep([*rows, *[rows[-1]] * (self.min_rows - len(rows))])
        self._bind()
