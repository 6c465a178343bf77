"""Eager kernels of the decode step on a CPU: few calls, preallocated buffers.

A step of a small model is bound by kernel calls (2 to 5 us each), one of a large model by reading
its weights. So there are no modules, projections of the same input are one product, and operations
are in-place where possible.

Shapes: B rows, C model dim, H query heads, G key/value heads, N = B G, R = H / G, D head dim, S
positions in view, L layers, P positions of the context, X concatenated values of all heads.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.generation.fast.decode_step import (
    Add,
    Attend,
    DecodeStep,
    Function,
    Shown,
    StepForward,
    shown_to,
)
from minigpt.generation.fast.idle import borrow
from minigpt.generation.fast.products import make_product
from minigpt.model.attention import Attention, PassCollector, Recorder, attend
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.layers import MLP, GatedMLP
from minigpt.model.scores import weighted_sum


class EagerForward(StepForward):
    """Decodes one token per row with few calls."""

    def __init__(self, model: GPT, *, capacity: int, recorder: Recorder | None = None) -> None:
        """Args: capacity, the number of positions that the cache has room for."""
        super().__init__(model, capacity=capacity, recorder=recorder)
        shown = shown_to(recorder)
        self._prompt = borrow(
            self, model, ("eager", shown), lambda: PromptStep(model, EagerKernels(model), shown)
        )
        self._step, self._kernels = self._prompt.step, self._prompt.kernels
        if self._kernels.n_rows > 1:  # left by the previous decoder
            self._bind()

    def _bind(self) -> None:
        self._kernels.bind(self.cache.n_rows)

    def _decode(self, tokens: Tensor, position: int) -> Sequence[Tensor]:
        return self._step(tokens, position, list(append_views(self.cache)))


class EagerKernels:
    """``decode_step.Kernels`` that write into buffers, which the next step overwrites."""

    def __init__(self, model: GPT, *, copies: bool = True) -> None:
        """Args: copies, as for ``make_product``."""
        self._config = config = model.config
        self._dtype, self._embedding = model.dtype, model.embedding
        self.product = partial(make_product, copies=copies)
        self._zero = torch.zeros(1, 1, 1, dtype=torch.float32, device="cpu")
        self._signs = torch.tensor([-1.0, 1.0], dtype=model.dtype)[:, None]
        self._qk_weights: tuple[Tensor, Tensor] | None = None
        if config.family == "gpt2":
            self._positions = model.positions
        else:
            self._cos_PD = torch.cat((model.rotary_cos, model.rotary_cos), dim=1)
            self._sin_PD = torch.cat((model.rotary_sin, model.rotary_sin), dim=1)
        if config.qk_norm:
            weight_LXD = torch.stack([_qk_weight(attention) for attention in model.attentions])
            # sin multiplies the other half of the head.
            self._qk_weights = weight_LXD, weight_LXD.roll(config.d_head // 2, 2)
        self.bind(1)

    def bind(self, n_rows: int) -> None:
        """Allocate the buffers for a number of rows."""
        self.n_rows, config, dtype = n_rows, self._config, self._dtype
        n_query, n_key, d_head = config.n_head, config.n_kv_head, config.d_head
        # The residual stream x, with room for -x next to it.
        self._both_B2C = torch.empty(n_rows, 2 * config.d_model, dtype=dtype)
        self._x_BC, self._minus_x_BC = self._both_B2C.chunk(2, dim=1)
        is_gated = config.family == "llama"
        self._hidden = torch.empty(n_rows, config.d_mlp * (1 + is_gated), dtype=dtype)
        self._gate_and_up = self._hidden.chunk(2, dim=1)
        # Concatenated queries, keys and values of the new positions, and views of them.
        self._qkv_BX = torch.empty(n_rows, (n_query + 2 * n_key) * d_head, dtype=dtype)
        heads = self._qkv_BX.unflatten(1, (-1, d_head))
        q_BHD, self._k_BGD, self._v_BGD = heads.split([n_query, n_key, n_key], dim=1)
        self._q_BHTD = q_BHD[:, :, None]
        self._q_BGRD = q_BHD.unflatten(1, (n_key, -1))
        self._qk = heads[:, : n_query + n_key]
        self._qk_twice = self._qk[:, :, None].expand(-1, -1, 2, -1)
        self._both_qk = torch.empty(n_rows, n_query + n_key, 2, d_head, dtype=dtype)  # -x, x
        self._both_flat = self._both_qk.flatten(2)

    def embed(self, tokens: Tensor, position: int | slice | Tensor) -> Tensor:
        embedded = self._embedding(tokens)
        if self._config.family == "gpt2":
            return torch.add(embedded, self._positions.weight[position], out=self._x_BC)
        return self._x_BC.copy_(embedded)

    def rotary(self, position: int | slice | Tensor) -> Iterable[tuple[Tensor, Tensor] | None]:
        """Return cos and sin for each layer, multiplied by the weights of the norms of q and k.

        sin is for the second half of -x and the first half of x.
        """
        n_layer = self._config.n_layer
        if self._config.family == "gpt2":
            return [None] * n_layer
        cos, sin = self._cos_PD[position], self._sin_PD[position]
        if not isinstance(position, int):  # for all heads of each row
            cos, sin = cos[:, None], sin[:, None]
        if self._qk_weights is None:
            return [(cos, sin)] * n_layer
        own, crossed = self._qk_weights
        if not isinstance(position, int):
            return ((a * cos, b * sin) for a, b in zip(own, crossed, strict=True))
        return zip((own * cos).unbind(), (crossed * sin).unbind(), strict=True)

    def norm(self, module: nn.Module) -> Function:
        if isinstance(module, nn.LayerNorm):
            weight, bias, eps = module.weight, module.bias, module.eps
            return lambda x: torch.layer_norm(x, weight.shape, weight, bias, eps)
        assert isinstance(module, nn.RMSNorm)
        return self._rms_norm(module.weight.detach(), module.eps or 0.0)

    def _rms_norm(self, weight: Tensor, eps: float) -> Function:
        """Return RMSNorm in three calls; F.rms_norm takes seven on a CPU, and five times as long.

        x and -x together have mean 0 and variance mean(x^2): their LayerNorm is the RMSNorm of x.
        """
        width = len(weight)
        weights = torch.cat((weight, torch.zeros_like(weight)))

        def norm(x: Tensor) -> Tensor:
            torch.neg(x, out=self._minus_x_BC)
            normed = torch.layer_norm(self._both_B2C, weights.shape, weights, None, eps)
            return normed.narrow(1, 0, width)

        return norm

    def _rotate(self, cos: Tensor, sin: Tensor, norm_eps: float | None) -> None:
        """Normalize queries and keys, if ``norm_eps`` is given, and rotate them.

        The norms' weights are in cos and sin; with -x next to x, a LayerNorm is the RMSNorm.
        """
        torch.mul(self._qk_twice, self._signs, out=self._both_qk)
        both = self._both_flat
        if norm_eps is not None:
            both = torch.layer_norm(both, both.shape[2:], eps=norm_eps)
        d_head = self._qk.shape[2]
        crossed = both.narrow(2, d_head // 2, d_head)  # -x's second half, x's first
        torch.mul(both.narrow(2, d_head, d_head), cos, out=self._qk)
        self._qk.addcmul_(crossed, sin)

    def projection(self, module: Attention) -> Callable[[Tensor, Any], None]:
        """Return a function that writes a layer's queries, keys and values into the buffers."""
        project = self.product([module.query, module.key, module.value])
        score = module.score
        eps = module.query_norm.eps if isinstance(module.query_norm, nn.RMSNorm) else None

        def write(normed_BC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> None:
            project.write(normed_BC, self._qkv_BX)
            if rotary is not None:
                self._rotate(*rotary, eps)
            if score.changes_queries:
                self._q_BHTD.copy_(score.fold(self._q_BHTD))

        return write

    def attention(self, module: Attention) -> Attend:
        project = self.projection(module)
        score, scale = module.score, module.d_head**-0.5
        widen, restore = _casts(self._dtype)

        def attend_step(
            normed_BC: Tensor,
            position: int,
            rotary: tuple[Tensor, Tensor] | None,
            cache: "tuple[Tensor, Tensor, Tensor, Tensor] | PromptCache",
        ) -> tuple[Tensor, Tensor]:
            project(normed_BC, rotary)
            if isinstance(cache, PromptCache):
                return self._attend_in_prompt(module, cache), self._zero
            new_k_BGD, new_v_BGD, k_NDS, v_NSD = cache
            new_k_BGD.copy_(self._k_BGD)
            new_v_BGD.copy_(self._v_BGD)
            n_rows = len(normed_BC)
            if score.is_dot_product:
                q_NRD = self._q_BGRD.flatten(0, 1)
                score_NRS = torch.baddbmm(
                    self._zero, widen(q_NRD), widen(k_NDS), beta=0, alpha=scale
                )
                weights_NRS = score_NRS.softmax(-1)
            else:
                weights_BHTS = score.weights(self._q_BHTD, k_NDS.mT.unflatten(0, (n_rows, -1)))
                weights_NRS = weights_BHTS.reshape(len(v_NSD), -1, v_NSD.shape[1])
            context_BX = torch.bmm(weights_NRS, widen(v_NSD)).view(n_rows, -1)
            return restore(context_BX), weights_NRS.view(n_rows, -1, v_NSD.shape[1])

        return attend_step

    def _attend_in_prompt(self, module: Attention, prompt: "PromptCache") -> Tensor:
        """Return the context (T, X) of the tokens; in the last layer, only the last token's."""
        q_BHTD = self._q_BHTD[:, :, 0].transpose(0, 1)[None]
        new_k_BGTD, new_v_BGTD = (x.transpose(0, 1)[None] for x in (self._k_BGD, self._v_BGD))
        k_BGSD, v_BGSD = prompt.cache.write(module.layer, new_k_BGTD, new_v_BGTD)
        collector = prompt.collector
        if collector is not None:
            q_BHTD = q_BHTD.clone()  # may be kept, and the next layer overwrites the buffer
        if module.layer < self._config.n_layer - 1:
            context_BHTD = attend(module.score, q_BHTD, k_BGSD, v_BGSD, None, collector)
        else:
            self._keep_last()
            weights_BHTS = module.score.weights(q_BHTD[:, :, -1:], k_BGSD)
            context_BHTD = weighted_sum(weights_BHTS, v_BGSD)
            if collector is not None:
                collector.add(q_BHTD, k_BGSD, v_BGSD, context_BHTD, weights_BHTS)
        return context_BHTD[0].transpose(0, 1).flatten(1)

    def _keep_last(self) -> None:
        """Continue with the residual stream of the last row only."""
        self._both_B2C, self._hidden = self._both_B2C[-1:], self._hidden[-1:]
        self._x_BC, self._minus_x_BC = self._both_B2C.chunk(2, dim=1)
        self._gate_and_up = self._hidden.chunk(2, dim=1)

    def hidden(self, module: MLP | GatedMLP) -> Function:
        activation, is_gated = module.activation, isinstance(module, GatedMLP)
        layers = [module.gate, module.up] if isinstance(module, GatedMLP) else [module.up]
        product = self.product(layers)

        def hidden(normed_BC: Tensor) -> Tensor:
            product.write(normed_BC, self._hidden)
            if not is_gated:
                return activation(self._hidden)
            gate, up = self._gate_and_up
            return activation(gate).mul_(up)

        return hidden

    def add(self, module: nn.Module) -> Add:
        product = self.product([module])

        def add(_: Tensor, branch: Tensor) -> Tensor:
            product.add(branch, self._x_BC)
            return self._x_BC

        return add

    def unembed(self, module: nn.Module) -> Function:
        product = self.product([module])

        logits = torch.empty(0)

        def unembed(normed_BC: Tensor) -> Tensor:
            nonlocal logits
            if len(logits) != len(normed_BC):
                logits = normed_BC.new_empty(len(normed_BC), self._config.vocab_size)
            product.write(normed_BC, logits)
            return logits

        return unembed


@dataclass(frozen=True, eq=False)
class PromptCache:
    """The cache that the tokens of a prompt attend to and are added to."""

    cache: KVCache
    """Cache of one row."""
    collector: PassCollector | None


class PromptStep:
    """A decode step that also accepts several new tokens of one row, as rows of its products.

    In the last layer, only the last token's attention and MLP are computed.
    """

    def __init__(self, model: GPT, kernels: EagerKernels, shown: Shown) -> None:
        """Args: kernels, bound to one row."""
        with torch.no_grad():
            self.step = DecodeStep(model, kernels, shown)
        self.kernels, self._n_layer = kernels, model.config.n_layer

    def __call__(self, tokens_T: Tensor, cache: KVCache, recorder: Recorder | None) -> Tensor:
        """Append tokens (T,) to a cache of one row; return the logits (1, V) after them."""
        start, end = cache.length, cache.length + len(tokens_T)
        collector = None if recorder is None else PassCollector(recorder, len(tokens_T))

        def keep(x_TC: Tensor) -> None:
            if collector is not None:
                collector.add_residual(x_TC[None])

        self.kernels.bind(len(tokens_T))
        try:
            prompt = [PromptCache(cache, collector)] * self._n_layer
            (logits,) = self.step(tokens_T, slice(start, end), prompt, keep)
        finally:
            self.kernels.bind(1)
        cache.advance(len(tokens_T))
        if collector is not None:
            collector.finish(cache.values_LBGSD[:, :, :, :end])
        return logits


def _casts(dtype: torch.dtype) -> tuple[Function, Function]:
    """Return functions that cast to float32 and back; for float32, they make no torch call."""
    if dtype == torch.float32:
        return (lambda x: x), (lambda x: x)
    return Tensor.float, lambda x: x.to(dtype)


def _qk_weight(attention: Attention) -> Tensor:
    """Return the norms' weights of every query and key head: (H + G, D)."""
    query, key = attention.query_norm.weight, attention.key_norm.weight
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    n_query = attention.query.out_features // attention.d_head
    n_key = attention.key.out_features // attention.d_head
    return torch.cat((query.expand(n_query, -1), key.expand(n_key, -1)))


def append_views(cache: KVCache) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield views of the next position of each layer, which the caller must fill.

    Returns: the new key and value, each (B, G, D), and the keys (N, D, S) and values (N, S, D) of
        all positions including the new one.
    """
    end = cache.length + 1
    new = [kind.select(3, cache.length).unbind() for kind in (cache.keys_LBGSD, cache.values_LBGSD)]
    k_LNSD, v_LNSD = (
        kind.narrow(3, 0, end).flatten(1, 2) for kind in (cache.keys_LBGSD, cache.values_LBGSD)
    )
    return zip(*new, k_LNSD.mT.unbind(), v_LNSD.unbind(), strict=True)
