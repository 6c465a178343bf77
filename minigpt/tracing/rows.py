"""Summaries of attention rows in a few numbers, with a single copy from the device.

Shapes: S positions in view, R rows, K sources.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import HeadRows, Row

_LEAST = 1e-30
_N_SUMS = 10
_NUMBERS = ("total", "prompt", "sink", "own", "entropy", "distance")


class RowSummarizer:
    """Summarizes rows with a single copy from the device."""

    def __init__(self, *, sink: int, n_prompt: int, n_sources: int) -> None:
        """Args: sink, position to exclude from the sources; n_prompt, length of the prompt;
        n_sources, maximum number of sources per row.
        """
        self.sink, self._n_prompt, self._n_sources = sink, n_prompt, n_sources
        self._columns_P3, self._hidden_P = torch.empty(0, 3), torch.empty(0)

    def rows(
        self,
        rows_NRS: Sequence[Tensor],
        tokens: Sequence[Token],
        n_layer: int = 1,
        *,
        measure: str = "weight",
        is_signed: bool = False,
    ) -> list[Row]:
        """Summarize the first row of each step.

        Args: rows_NRS, as for ``summaries``, where rows after the first are those of all heads, for
            ``Row.heads``; tokens, at least those in view.
        """
        summaries = self.summaries(rows_NRS, is_signed=is_signed)
        has_heads = len(rows_NRS[0]) > 1
        numbers = zip(*(summaries[name][:, 0].tolist() for name in _NUMBERS), strict=True)
        rows = []
        for i, (total, prompt, *others) in enumerate(numbers):
            positions, weights = summaries["positions"][i][0], summaries["weights"][i][0]
            sources = zip(positions.tolist(), weights.tolist(), strict=True)
            heads = None
            if has_heads:
                of_step = {name: values[i] for name, values in summaries.items()}
                heads = HeadRows.of(of_step, n_layer)
            row = Row(
                measure=measure,
                is_signed=is_signed,
                total=total,
                prompt=prompt,
                generated=total - prompt if is_signed else max(0.0, total - prompt),
                sources=tuple(Source(tokens[position], weight) for position, weight in sources),
                weights_S=summaries["first"][i],
                heads=heads,
                **dict(zip(_NUMBERS[2:], others, strict=True)),
            )
            rows.append(row)
        return rows

    def summaries(self, rows_NRS: Sequence[Tensor], *, is_signed: bool = False) -> dict[str, Any]:
        """Return the total and the fields of ``HeadRows`` for each row, and the ``first`` row.

        Each value is an array (N, R), or a list of N arrays if its length varies between steps.

        Args: rows_NRS, rows (R, S) of each step, where S may differ between steps; is_signed,
            whether order, entropy and distance use magnitudes.
        """
        packed = [self._packed(rows_RS, is_signed=is_signed) for rows_RS in rows_NRS]
        tensors = [*packed, *(rows_RS[0] for rows_RS in rows_NRS)]
        flat = torch.cat([x.flatten() for x in tensors]).cpu().numpy()
        parts = np.split(flat, list(accumulate(x.numel() for x in tensors))[:-1])
        rows = [part.reshape(x.shape) for part, x in zip(parts, packed, strict=False)]
        sums = np.stack([x[:, :_N_SUMS] for x in rows])  # (N, R, number of sums)
        total, prompt, _, size, _, places, entropy, sink, last, own = np.moveaxis(sums, 2, 0)
        size = np.maximum(size, _LEAST)
        ends = [(_N_SUMS + x.shape[1]) // 2 for x in rows]  # weights, then positions
        return {
            "total": total,
            "prompt": prompt,
            "distance": last - places / size,
            # With p = r / t: -sum p ln p = -sum r ln r / t + ln t.
            "entropy": np.maximum(entropy / size + np.log(size), 0) / math.log(2),
            "sink": sink,
            "own": own,
            "weights": [x[:, _N_SUMS:end] for x, end in zip(rows, ends, strict=True)],
            "positions": [x[:, end:].astype(np.int32) for x, end in zip(rows, ends, strict=True)],
            "first": parts[len(rows) :],
        }

    def _packed(self, rows_RS: Tensor, *, is_signed: bool) -> Tensor:
        """Concatenate sums of rows, their largest numbers, and the positions of these."""
        n_view = rows_RS.shape[1]
        columns_S3, hidden_S = self._columns(n_view, rows_RS.device)
        size_RS = rows_RS.abs() if is_signed else rows_RS
        has_sink = self.sink < n_view  # else the query comes before the sink
        top = (size_RS - hidden_S).topk(min(self._n_sources, n_view - has_sink), dim=1)
        sums_R3 = rows_RS @ columns_S3
        # Few calls: at this size, a call's overhead exceeds its arithmetic.
        return torch.cat(
            (
                sums_R3,
                size_RS @ columns_S3 if is_signed else sums_R3,
                torch.special.entr(size_RS).sum(dim=1, keepdim=True),
                rows_RS.narrow(1, self.sink, 1) if has_sink else rows_RS.new_zeros(len(rows_RS), 1),
                columns_S3[-1:, 2:].expand(len(rows_RS), 1),  # the query's position
                rows_RS.narrow(1, n_view - 1, 1),
                rows_RS.gather(1, top.indices) if is_signed else top.values,
                top.indices.float(),  # exact below 2^24
            ),
            dim=1,
        )

    def _columns(self, n_view: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tensors (S, 3) and (S,).

        A row times the first gives the total, the prompt's weight, and the sum of weight x
        position. The second is infinite at the sink and 0 elsewhere.
        """
        if len(self._hidden_P) < n_view:
            place_P = torch.arange(2 * n_view, device=device)
            columns = (torch.ones_like(place_P), place_P < self._n_prompt, place_P)
            self._columns_P3 = torch.stack(columns, dim=1).float()
            hidden_P = torch.zeros_like(place_P, dtype=torch.float32)
            self._hidden_P = hidden_P.masked_fill(place_P == self.sink, math.inf)
        return self._columns_P3[:n_view], self._hidden_P[:n_view]
