"""What forward shows of its attention, kept: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, T queries, S keys, D head dim, C model
dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.generation.fast.quantize import NarrowLinear
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.model.scores import attention_weights
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.analysis.sink import SinkFinder


def require_attention(model: LanguageModel) -> None:
    """Raise ConfigError if a model has no attention."""
    if not model.attentions:
        raise ConfigError(
            f"a model of arch {model.config.arch} has no attention to show. Choose another one."
        )


class RowRecorder:
    """Keeps each head's attention row of the last query, of the last forward pass.

    The model's own path is not touched: the row is the softmax of the model's own score of the
    query and the cached keys that the kernel was given, computed beside it in float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        has_norms: bool = False,
        rollout: Rollout | None = None,
        sink_finder: SinkFinder | None = None,
    ) -> None:
        """Watch passes of this model.

        Args: has_norms, keep the lengths of what the heads would add to the stream, too. rollout
            and sink_finder are shown every query's row, not the last one's alone.
        Raises: ConfigError if the model has no attention.
        """
        require_attention(model)
        self._scores = [attention.score for attention in model.attentions]
        self._n_layer = len(self._scores)
        self._rollout, self._sink_finder = rollout, sink_finder
        self._norms = _ValueNorms(model) if has_norms else None
        self._weights: list[Tensor] = []
        self._new_values: list[Tensor] = []
        self._shown: tuple[Tensor, Tensor] | None = None
        self._weights_LHS: Tensor | None = None
        self._n_passes = 0
        self.product_error: Tensor | None = None
        """The largest difference between a row times the values and the head's output, over the
        largest output; in the last pass, of one layer, each in its turn."""

    @torch.no_grad()
    def record(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor
    ) -> None:
        """Take one layer's row of the batch's first sequence."""
        if layer == 0:
            self._weights, self._new_values = [], []
        weights = self._scores[layer].weights
        self._weights.append(weights(q_BHTD[:1, :, -1:], k_BGSD[:1])[0, :, 0])
        if layer == self._checked_layer:
            self._shown = v_BGSD[0], context_BHTD[0, :, -1]
        if self._norms is not None:
            self._new_values.append(v_BGSD[0, :, v_BGSD.shape[2] - q_BHTD.shape[2] :])
        for watcher in (self._rollout, self._sink_finder):
            if watcher is not None:
                watcher.watch(layer, q_BHTD[:1], k_BGSD[:1], weights)
        if layer == self._n_layer - 1:
            weights_LHS = torch.stack(self._weights)
            assert self._shown is not None
            self.product_error = _product_error(weights_LHS[self._checked_layer], *self._shown)
            self._end_pass(weights_LHS)

    @torch.no_grad()
    def record_pass(self, q_LHTD: Tensor, cache: KVCache, contexts_BHTD: Sequence[Tensor]) -> None:
        """Take the rows of a pass of one token from its queries, with what the cache now holds.

        One product for all layers is a third of the cost of one for each.
        """
        keys_LGSD = cache.keys_LBGSD[:, 0, :, : cache.length]
        values_LGSD = cache.values_LBGSD[:, 0, :, : cache.length]
        if self._scores[0].is_dot_product:
            weights_LHS = attention_weights(q_LHTD, keys_LGSD)[:, :, 0]  # layers, as if a batch
        else:
            rows = zip(self._scores, q_LHTD[:, None], keys_LGSD[:, None], strict=True)
            weights_LHS = torch.stack([score.weights(q, k)[0, :, 0] for score, q, k in rows])
        layer = self._checked_layer
        context_HD = contexts_BHTD[layer][0, :, -1]
        error = _product_error(weights_LHS[layer], values_LGSD[layer], context_HD)
        self.take(weights_LHS, values_LGSD[:, :, -1:])
        self.product_error = error

    @torch.no_grad()
    def take(self, weights_LHS: Tensor, new_values_LGTD: Tensor) -> None:
        """Take the rows of a pass that computed them itself, and the values that it added."""
        self._new_values = list(new_values_LGTD)
        self.product_error = None  # its outputs are these very rows times the values
        if self._rollout is not None:
            for layer, weights_HS in enumerate(weights_LHS):
                self._rollout.extend(layer, weights_HS[:, None])
        self._end_pass(weights_LHS)

    @property
    def _checked_layer(self) -> int:
        return self._n_passes % self._n_layer

    def _end_pass(self, weights_LHS: Tensor) -> None:
        self._weights_LHS = weights_LHS
        self._n_passes += 1
        if self._norms is not None:
            self._norms.extend(torch.stack(self._new_values), weights_LHS.shape[2])

    @property
    def weights_LHS(self) -> Tensor:
        """The last pass's rows, float32, on the model's device; each sums to 1."""
        assert self._weights_LHS is not None, "no forward pass was recorded"
        return self._weights_LHS

    @property
    def norms_LHS(self) -> Tensor:
        """The lengths of what the heads would add to the stream: the rows times ||v W_O||.

        Source: Kobayashi et al. 2020, arXiv:2004.10102, equation 4.
        """
        assert self._norms is not None, "no norms were asked for"
        return self.weights_LHS * self._norms.norms_LHP[:, :, : self.weights_LHS.shape[2]]

    def rollout_S(self) -> Tensor:
        """The last query's row of the rollout."""
        assert self._rollout is not None, "no rollout was asked for"
        return self._rollout.row()


def _product_error(weights_HS: Tensor, v_GSD: Tensor, context_HD: Tensor) -> Tensor:
    rows_GRS = weights_HS.unflatten(0, (v_GSD.shape[0], -1))
    product_HD = (rows_GRS @ v_GSD.float()).flatten(0, 1)
    context_HD = context_HD.float()
    return (product_HD - context_HD).abs().max() / context_HD.abs().max().clamp(min=1e-30)


class _ValueNorms:
    """||v_j W_O,h|| of every layer, head and position: one scalar each, computed once.

    Of the (C, D) part of W_O that is a head's, only the triangle of its QR decomposition matters to
    a length: D x D numbers, however wide the model is.
    """

    def __init__(self, model: LanguageModel) -> None:
        factors = []
        for attention in model.attentions:
            weight = _dense_weight(attention.output)
            heads_HCD = (
                weight.detach().float().unflatten(1, (model.config.n_head, -1)).transpose(0, 1)
            )
            factors.append(torch.linalg.qr(heads_HCD, mode="r").R)
        factors_LHCD = torch.stack(factors)
        # (L, G, R, D, C or D), so that it meets the values of the heads' groups
        self._factors = factors_LHCD.unflatten(1, (model.config.n_kv_head, -1)).mT.contiguous()
        self.norms_LHP = torch.empty(*factors_LHCD.shape[:2], 0, device=weight.device)

    def extend(self, new_values_LGTD: Tensor, end: int) -> None:
        """Compute the lengths of new positions, of which ``end`` is the one after the last."""
        n_new = new_values_LGTD.shape[2]
        if end > self.norms_LHP.shape[2]:
            room = self.norms_LHP.new_empty(*self.norms_LHP.shape[:2], 2 * end)
            room[:, :, : self.norms_LHP.shape[2]] = self.norms_LHP
            self.norms_LHP = room
        added_LGRTD = new_values_LGTD.float()[:, :, None] @ self._factors
        lengths_LGRT = torch.linalg.vector_norm(added_LGRTD, dim=-1)
        self.norms_LHP[:, :, end - n_new : end] = lengths_LGRT.flatten(1, 2)


def _dense_weight(linear: nn.Module) -> Tensor:
    if isinstance(linear, NarrowLinear):
        return linear.wide()
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight
