"""Recording of attention: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, T new positions, S keys, D head dim,
C model dim.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import dense_weight

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
    kernel, and the row is the softmax of the model's own score, computed beside it in float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        has_norms: bool = False,
        watchers: Sequence[Watcher] = (),
    ) -> None:
        """Prepare to record forward passes of a model.

        Args: has_norms, whether ``norms_LHS`` is wanted. watchers receive the weights of all
            queries, not only the last one.
        Raises: ConfigError if the model has no attention.
        """
        require_attention(model)
        self._scores = [attention.score for attention in model.attentions]
        self._watchers = watchers
        self.needs_queries = bool(watchers)
        self._norms = _ValueNorms(model) if has_norms else None
        self._weights_LHS: Tensor | None = None
        self._n_passes = 0
        self.product_error: Tensor | None = None
        """Largest difference between a row times the values and the head's output, relative to the
        largest output; of the last pass, in one layer (each pass checks the next layer)."""

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Take the rows of the first sequence of the batch."""
        weights_LHS = self._weights_LHS = attention.weights_LBHS[:, 0]
        values_LGSD = attention.values_LBGSD[:, 0]
        layer = self._n_passes % len(self._scores)
        self.product_error = _product_error(
            weights_LHS[layer], values_LGSD[layer], attention.context_LBHD[layer, 0]
        )
        self._n_passes += 1
        if self._norms is not None:
            n_key = values_LGSD.shape[2]
            self._norms.extend(values_LGSD[:, :, n_key - attention.n_new :], n_key)
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
        """Rows of the last pass, float32, on the model's device; each sums to 1."""
        assert self._weights_LHS is not None, "no forward pass was recorded"
        return self._weights_LHS

    @property
    def norms_LHS(self) -> Tensor:
        """Norms of the weighted value vectors, after W_O: the rows times ||v W_O||.

        Source: Kobayashi et al. 2020, arXiv:2004.10102, equation 4.
        """
        assert self._norms is not None, "pass has_norms=True"
        return self.weights_LHS * self._norms.norms_LHP[:, :, : self.weights_LHS.shape[2]]


def _product_error(weights_HS: Tensor, v_GSD: Tensor, context_HD: Tensor) -> Tensor:
    rows_GRS = weights_HS.unflatten(0, (v_GSD.shape[0], -1))
    product_HD = (rows_GRS @ v_GSD.float()).flatten(0, 1)
    context_HD = context_HD.float()
    return (product_HD - context_HD).abs().max() / context_HD.abs().max().clamp(min=1e-30)


class _ValueNorms:
    """||v_j W_O,h|| of every layer, head and position: one scalar each, computed once.

    The length of v_j W_O,h, where W_O,h is a head's (C, D) part of W_O, only needs the R of its QR
    decomposition: D x D numbers, however wide the model is.
    """

    def __init__(self, model: LanguageModel) -> None:
        factors = []
        for attention in model.attentions:
            weight = dense_weight(attention.output).detach()
            heads_HCD = weight.unflatten(1, (model.config.n_head, -1)).transpose(0, 1)
            factors.append(torch.linalg.qr(heads_HCD, mode="r").R)
        factors_LHCD = torch.stack(factors)
        # (L, G, R, D, C or D), so that it meets the values of the heads' groups
        self._factors = factors_LHCD.unflatten(1, (model.config.n_kv_head, -1)).mT.contiguous()
        self.norms_LHP = torch.empty(*factors_LHCD.shape[:2], 0, device=weight.device)

    def extend(self, new_values_LGTD: Tensor, end: int) -> None:
        """Add the norms of new positions; ``end`` is one past the last of them."""
        n_new = new_values_LGTD.shape[2]
        if end > self.norms_LHP.shape[2]:
            room = self.norms_LHP.new_empty(*self.norms_LHP.shape[:2], 2 * end)
            room[:, :, : self.norms_LHP.shape[2]] = self.norms_LHP
            self.norms_LHP = room
        added_LGRTD = new_values_LGTD.float()[:, :, None] @ self._factors
        lengths_LGRT = torch.linalg.vector_norm(added_LGRTD, dim=-1)
        self.norms_LHP[:, :, end - n_new : end] = lengths_LGRT.flatten(1, 2)
