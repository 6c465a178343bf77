"""Recording of attention: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring
from minigpt.tracing.config import Measure

_CHUNK = 64  # queries of a prompt whose weights are in memory together


def require_attention(model: LanguageModel) -> None:
    """Raise ConfigError if a model has no attention."""
    if not model.attentions:
        raise ConfigError(
            f"a model of arch {model.config.arch} has no attention to show. Choose another one."
        )


class Watcher(Protocol):
    """Receives the weights of all queries, also those of the prompt, as a rollout does."""

    def add(self, layer: int, weights_HTS: Tensor) -> None:
        """Take the weights of the newest queries of a layer; queries come in order."""


class RowRecorder:
    """Keeps each head's attention row of the last query of the last forward pass.

    In a decode step these are the weights that the model used. In a prefill, the model uses a fused
    kernel, and the row is the softmax of the model's own score, computed separately in float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        measures: Sequence[Measure] = ("weight",),
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Prepare to record forward passes of a model.

        Args: measures, available from ``rows_LHS``; watchers, which receive the weights of all
            queries, not only the last one.
        Raises: ConfigError if the model has no attention, or if a measure is not installed.
        """
        require_attention(model)
        self._scores = [attention.score for attention in model.attentions]
        self._watchers = watchers
        self.needs_queries = bool(watchers)
        self._measures = {
            name: ring(f"tracing.analysis.measures.{name}").measure(model)
            for name in measures
            if name != "weight"
        }
        self._rows: dict[Measure, Tensor] = {}
        self._n_passes = 0
        self.product_error: Tensor | None = None
        """Largest difference between a row times the values and the head's output, relative to the
        largest output; of the last pass, in one layer (each pass checks the next layer)."""

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Take the rows of the first sequence of the batch."""
        weights_LHS = attention.weights_LBHS[:, 0]
        self._rows = {name: rows_LHS(attention) for name, rows_LHS in self._measures.items()}
        self._rows["weight"] = weights_LHS
        values_LGSD = attention.values_LBGSD[:, 0]
        layer = self._n_passes % len(self._scores)
        self.product_error = _product_error(
            weights_LHS[layer], values_LGSD[layer], attention.context_LBHD[layer, 0]
        )
        self._n_passes += 1
        if self._watchers:
            for layer in range(len(self._scores)):
                for weights_HTS in self._new_rows(attention, layer):
                    for watcher in self._watchers:
                        watcher.add(layer, weights_HTS)

    def _new_rows(self, attention: AttentionPass, layer: int) -> Iterator[Tensor]:
        """Yield the weights (H, T, S) of the new queries, a few at a time to save memory."""
        if attention.queries is None or attention.keys is None:
            yield attention.weights_LBHS[layer, 0, :, None]
            return
        q_BHTD, k_BGSD = attention.queries[layer][:1], attention.keys[layer][:1]
        n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
        for first in range(0, n_query, _CHUNK):
            last = min(first + _CHUNK, n_query)
            k_in_view_BGSD = k_BGSD[:, :, : n_key - n_query + last]
            yield self._scores[layer].weights(q_BHTD[:, :, first:last], k_in_view_BGSD)[0]

    @property
    def weights_LHS(self) -> Tensor:
        """Attention weights of the last pass, float32, on the model's device; rows sum to 1."""
        return self.rows_LHS("weight")

    def rows_LHS(self, measure: Measure) -> Tensor:
        """Return the rows of the last pass by a measure, float32, on the model's device."""
        assert measure in self._rows, f"no forward pass was recorded with the measure {measure}"
        return self._rows[measure]


def _product_error(weights_HS: Tensor, v_GSD: Tensor, context_HD: Tensor) -> Tensor:
    rows_GRS = weights_HS.unflatten(0, (v_GSD.shape[0], -1))
    product_HD = (rows_GRS @ v_GSD.float()).flatten(0, 1)
    context_HD = context_HD.float()
    return (product_HD - context_HD).abs().max() / context_HD.abs().max().clamp(min=1e-30)
