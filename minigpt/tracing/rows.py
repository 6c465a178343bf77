"""Rows of attention, summarized in a few numbers.

Shapes: S positions in view, R rows, K sources.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.rings import ring
from minigpt.tracing.events import Row, Source, Token

_LEAST = 1e-30
_SUMMARIES = ("sink", "own", "prompt", "entropy", "distance")


class RowReader:
    """Summarizes rows with a single copy from the device."""

    def __init__(self, *, sink: int, n_prompt: int, n_sources: int) -> None:
        """Args: sink, position that is not among the sources; n_prompt, positions of the prompt;
        n_sources, most sources per row.
        """
        self.sink, self._n_prompt, self._n_sources = sink, n_prompt, n_sources
        self._columns_P3 = torch.empty(0, 3)

    def row(
        self,
        rows_RS: Tensor,
        tokens: Sequence[Token],
        n_layer: int = 1,
        *,
        measure: str = "weight",
        is_signed: bool = False,
    ) -> Row:
        """Summarize the first row; any further rows are those of all heads, for ``Row.heads``.

        Args: tokens, those in view.
        """
        facts = self.facts(rows_RS, is_signed=is_signed)
        numbers: dict[str, Any] = {name: float(facts[name][0]) for name in ("total", *_SUMMARIES)}
        generated = numbers["total"] - numbers["prompt"]
        sources = zip(facts["positions"][0].tolist(), facts["weights"][0].tolist(), strict=True)
        has_heads = len(rows_RS) > 1
        return Row(
            measure=measure,
            is_signed=is_signed,
            generated=generated if is_signed else max(0.0, generated),
            sources=tuple(Source(tokens[position], weight) for position, weight in sources),
            weights_S=facts["first"],
            heads=ring("tracing.findings").HeadRows.of(facts, n_layer) if has_heads else None,
            **numbers,
        )

    def facts(self, rows_RS: Tensor, *, is_signed: bool = False) -> dict[str, NDArray[Any]]:
        """Return the total and the fields of ``HeadRows`` for each row, and the ``first`` row.

        Args: is_signed, whether order, entropy and distance are those of the magnitudes.
        """
        n_rows, n_view = rows_RS.shape
        size_RS = rows_RS.abs() if is_signed else rows_RS
        others_RS = size_RS.clone()
        others_RS[:, self.sink] = -1
        top = others_RS.topk(min(self._n_sources, n_view - 1), dim=1)
        n_top = top.values.shape[1]
        columns_S3 = self._columns(n_view, rows_RS.device)
        sums_R3 = rows_RS @ columns_S3
        # Few calls, because at this size each call costs more than its arithmetic.
        packed = torch.cat(
            (
                sums_R3,
                torch.special.entr(size_RS).sum(dim=1, keepdim=True),
                rows_RS[:, self.sink, None],
                rows_RS[:, -1:],
                size_RS @ columns_S3 if is_signed else sums_R3,
                rows_RS.gather(1, top.indices) if is_signed else top.values,
                top.indices.float(),  # exact below 2^24
            ),
            dim=1,
        )
        flat = torch.cat((packed.flatten(), rows_RS[0])).cpu().numpy()
        facts = flat[: packed.numel()].reshape(n_rows, -1)
        total_R = np.maximum(facts[:, 6], _LEAST)  # of the magnitudes
        return {
            "total": facts[:, 0],
            "prompt": facts[:, 1],
            "distance": n_view - 1 - facts[:, 8] / total_R,
            # With p = r / t: -sum p ln p = -sum r ln r / t + ln t.
            "entropy": np.maximum(facts[:, 3] / total_R + np.log(total_R), 0) / math.log(2),
            "sink": facts[:, 4],
            "own": facts[:, 5],
            "positions": facts[:, 9 + n_top :].astype(np.int32),
            "weights": facts[:, 9 : 9 + n_top],
            "first": flat[packed.numel() :],
        }

    def _columns(self, n_view: int, device: torch.device) -> Tensor:
        """Return (S, 3); a row times it is the total, the prompt's weight, and the sum of weight x
        position.
        """
        if len(self._columns_P3) < n_view:
            place_P = torch.arange(2 * n_view, device=device)
            columns = (torch.ones_like(place_P), place_P < self._n_prompt, place_P)
            self._columns_P3 = torch.stack(columns, dim=1).float()
        return self._columns_P3[:n_view]
