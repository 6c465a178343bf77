"""``--overflow slide``: a decoder that drops old tokens when its window is full, and continues.

A full window slides: it keeps the first few tokens and the newest half of a window, and encodes
them again from position 0. The first tokens are kept because they are attention sinks: without
them, the model's predictions break down.
Source: Xiao et al. 2023, arXiv:2309.17453, section 3.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder, Step

_N_SINK = 4


@dataclass
class Window:
    """The tokens in the context window of rows of equal length, and how many have left it."""

    rows: dict[int, list[int]]
    """Tokens in the window, by row number."""
    n_slides: int = 0
    """Number of times that the window has slid."""
    n_forgotten: int = 0
    """Number of tokens of each row that have left the window."""

    def __len__(self) -> int:
        return len(next(iter(self.rows.values())))

    def slide(self, context_length: int) -> None:
        """Keep the first tokens and the newest half of a window."""
        n_newest = max(1, context_length // 2)
        n_sink = min(_N_SINK, context_length // 4)
        self.n_forgotten += len(self) - n_newest - n_sink
        self.n_slides += 1
        for number, row in self.rows.items():
            self.rows[number] = row[:n_sink] + row[len(row) - n_newest :]


class SlidingDecoder(Decoder):
    """A decoder that records the tokens in its window, and slides it if ``overflow`` is slide."""

    def _in_view(self, prompt: Sequence[int]) -> list[int]:
        window = Window({0: super()._in_view(prompt)})
        if len(window) > self.context_length:
            window.slide(self.context_length)
        self._start = self._window = window
        return window.rows[0]

    def batch(
        self, config: SamplingConfig, *, seeds: Sequence[int], **options: Any
    ) -> Iterator[tuple[int, Step]]:
        """Yield (row, Step), as ``Decoder.batch``."""
        for row, step in super().batch(config, seeds=seeds, **options):
            window = self._window
            if step.finish != "end_of_text":
                window.rows[row].append(step.token)
            yield row, replace(step, n_slides=window.n_slides, n_forgotten=window.n_forgotten)

    def _begin(self, n_rows: int) -> Tensor:
        logits = super()._begin(n_rows)
        rows = {row: list(self.prompt) for row in range(n_rows)}
        self._window = replace(self._start, rows=rows)
        return logits

    @property
    def _holds_prompt(self) -> bool:
        return self._window.n_slides == self._start.n_slides and super()._holds_prompt

    def _feed(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        if self.cache.length < self.context_length:
            return super()._feed(rows, tokens)
        window = self._window
        window.rows = {row: window.rows[row] for row in rows}
        window.slide(self.context_length)
        self.cache.truncate(0)
        view = torch.tensor(list(window.rows.values()), device=self.forward.device)
        return self.forward.feed(view)
