"""The decode step on a CPU with as few and as fast calls as torch has: one token a row.

A step of a small model is bound by calls (2 to 5 us each), one of a large model by reading its
weights. So: no modules, projections of the same input in one product, buffers made once.

Shapes: B rows, C model dim, H query heads, G key/value heads, R = H / G, D head dim, S positions in
view, L layers, P positions of the context, X all that a layer's heads have.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from minigpt.generation.fast.products import make_product
from minigpt.generation.forward import EagerForward
from minigpt.model.attention import Attention, PassCollector, Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import GatedMLP
from minigpt.model.scores import weighted_sum

Norm = Callable[["_Stream"], Tensor]


class FusedForward:
    """Decodes one token a row in few calls; more through EagerForward, into the same cache.

    A recorder is shown buffers that the next pass writes over: it must keep no view of them.
    """

    def __init__(self, model: GPT, *, capacity: int, recorder: Recorder | None = None) -> None:
        """Args: capacity, the positions that the cache has room for."""
        self.model, self.recorder = model, recorder
        self._eager = EagerForward(model, capacity=capacity, recorder=recorder)
        self.config, self.device = self._eager.config, self._eager.device
        with torch.no_grad():
            blocks = [block for block in model.blocks if isinstance(block, Block)]
            self._final_norm = _make_norm(model.final_norm)
            self._unembed = make_product([model.unembedding or model.embedding])
            self._turn = _Turn(model, blocks) if model.config.family == "llama" else None
            self._layers = [_Layer(block) for block in blocks]
        self._bind(1)

    @property
    def cache(self) -> KVCache:
        """The keys and values of every position so far."""
        return self._eager.cache

    def _bind(self, n_rows: int) -> None:
        """Make the buffers of so many rows."""
        config, dtype = self.config, self.model.dtype
        self._stream = _Stream(torch.empty(n_rows, 2 * config.d_model, dtype=dtype))
        self._logits = torch.empty(n_rows, config.vocab_size, dtype=dtype)
        n_heads = config.n_head + 2 * config.n_kv_head
        qkv_LBX = torch.empty(config.n_layer, n_rows, n_heads * config.d_head, dtype=dtype)
        self._heads = [_Heads(self.model, qkv_BX) for qkv_BX in qkv_LBX]

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        if tokens.shape[1] > 1:
            return self._eager.feed(tokens)
        length = self.cache.length
        if length == self.config.context_length:
            raise ValueError(f"the model sees {length} positions; {length + 1} were given")
        self._embed(tokens[:, 0], length)
        turns = self._turn.at(length) if self._turn is not None else None
        collector = None if self.recorder is None else PassCollector(self.recorder, 1)
        for layer, (part, places) in enumerate(zip(self._layers, self.cache.grown(), strict=True)):
            turn = turns[layer] if turns is not None else None
            self._attend(layer, part, places, turn, collector)
            part.add_mlp(self._stream)
        self.cache.advance(1)
        if collector is not None:
            collector.finish(self.cache.values_LBGSD[:, :, :, : self.cache.length])
        self._unembed.into(self._final_norm(self._stream), self._logits)
        return self._logits.float()

    def _embed(self, tokens: Tensor, position: int) -> None:
        embedded = self.model.embedding(tokens)
        if self.config.family == "gpt2":
            torch.add(embedded, self.model.positions.weight[position], out=self._stream.x)
        else:
            self._stream.x.copy_(embedded)

    def _attend(
        self,
        layer: int,
        part: "_Layer",
        places: tuple[Tensor, Tensor, Tensor, Tensor],
        turn: tuple[Tensor, Tensor] | None,
        collector: PassCollector | None,
    ) -> None:
        """Add the attention's output to the stream."""
        heads = self._heads[layer]
        new_k_BGD, new_v_BGD, k_BGSD, v_BGSD = places
        part.qkv.into(part.attention_norm(self._stream), heads.qkv)
        if turn is not None:
            heads.turn(*turn, part.qk_norm_eps)
        new_k_BGD.copy_(heads.k_BGD)
        new_v_BGD.copy_(heads.v_BGD)
        q_BHTD = heads.q_BHTD
        if part.score.changes_queries:
            q_BHTD.copy_(part.score.fold(q_BHTD))
        weights_BHTS = part.score.weights(q_BHTD, k_BGSD)
        context_BHTD = weighted_sum(weights_BHTS, v_BGSD)
        if collector is not None:
            collector.add(q_BHTD, k_BGSD, v_BGSD, context_BHTD, weights_BHTS)
        part.output.onto(context_BHTD.flatten(1), self._stream.x)

    def repeat(self, n_rows: int) -> None:
        self.keep([0] * n_rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)
        self._bind(len(rows))

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


class _Stream:
    """The residual stream x (B, C), with room for -x beside it."""

    def __init__(self, both_B2C: Tensor) -> None:
        self.both = both_B2C
        self.x, self.minus_x = both_B2C.chunk(2, dim=1)


class _Layer:
    """A block's weights, as the step reads them."""

    def __init__(self, block: Block) -> None:
        attention, mlp = block.attention, block.mlp
        self.attention_norm, self.mlp_norm = map(_make_norm, (block.attention_norm, block.mlp_norm))
        self.qkv = make_product([attention.query, attention.key, attention.value])
        self.score = attention.score
        self.output = make_product([attention.output])
        self.qk_norm_eps: float | None = None
        if isinstance(attention.query_norm, nn.RMSNorm):
            self.qk_norm_eps = attention.query_norm.eps
        self.is_gated = isinstance(mlp, GatedMLP)
        self.up = make_product([mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) else [mlp.up])
        self.down = make_product([mlp.down])
        self.activation = mlp.activation
        self._d_hidden = mlp.down.in_features * (2 if self.is_gated else 1)
        self._hidden = self._gate = self._factor = torch.empty(0)

    def add_mlp(self, stream: _Stream) -> None:
        """Add to the stream what the MLP makes of it."""
        if len(self._hidden) != len(stream.x):
            self._hidden = stream.x.new_empty(len(stream.x), self._d_hidden)
            self._gate, self._factor = self._hidden.chunk(2, dim=1)
        self.up.into(self.mlp_norm(stream), self._hidden)
        if self.is_gated:
            self.down.onto(self.activation(self._gate).mul_(self._factor), stream.x)
        else:
            self.down.onto(self.activation(self._hidden), stream.x)


class _Heads:
    """The buffer that queries, keys and values of the new positions are computed in, as views."""

    def __init__(self, model: GPT, qkv_BX: Tensor) -> None:
        config, dtype = model.config, model.dtype
        n_query, n_key, d_head = config.n_head, config.n_kv_head, config.d_head
        self.qkv = qkv_BX
        heads = self.qkv.unflatten(1, (-1, d_head))
        q_BHD, self.k_BGD, self.v_BGD = heads.split([n_query, n_key, n_key], dim=1)
        self.q_BHTD = q_BHD[:, :, None]
        self._qk = heads[:, : n_query + n_key]
        self._qk_alone = self._qk[:, :, None]
        self._signs = torch.tensor([-1.0, 1.0], dtype=dtype)[:, None]
        self._both = torch.empty(*self._qk.shape[:2], 2, d_head, dtype=dtype)  # -x, x
        self._side_by_side = self._both.flatten(2)

    def turn(self, cos: Tensor, sin: Tensor, norm_eps: float | None) -> None:
        """Norm queries and keys, if there is an eps, and turn them by their position's angle."""
        torch.mul(self._qk_alone, self._signs, out=self._both)
        both = self._side_by_side
        if norm_eps is not None:  # as in _rms_norm; the weights are in cos and sin
            both = torch.layer_norm(both, both.shape[2:], eps=norm_eps)
        d_head = self._qk.shape[2]
        crossed = both.narrow(2, d_head // 2, d_head)  # -x's second half, x's first
        torch.mul(both.narrow(2, d_head, d_head), cos, out=self._qk)
        self._qk.addcmul_(crossed, sin)


class _Turn:
    """Rotary angles, with the weights of the norms of queries and keys in them."""

    def __init__(self, model: GPT, blocks: Sequence[Block]) -> None:
        self._cos_PD = torch.cat((model.rotary_cos, model.rotary_cos), dim=1)
        self._sin_PD = torch.cat((model.rotary_sin, model.rotary_sin), dim=1)
        self._n_layer = len(blocks)
        self._weights: tuple[Tensor, Tensor] | None = None
        if model.config.qk_norm:
            weight_LXD = torch.stack([_qk_weight(block.attention) for block in blocks])
            # What sin multiplies comes from the other half of the head.
            self._weights = weight_LXD, weight_LXD.roll(weight_LXD.shape[2] // 2, 2)

    def at(self, position: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return what each layer's queries and keys are multiplied by: cos and sin.

        sin is for -x's second half and x's first, side by side.
        """
        cos, sin = self._cos_PD[position], self._sin_PD[position]
        if self._weights is None:
            return [(cos, sin)] * self._n_layer
        own, crossed = self._weights
        return list(zip((own * cos).unbind(), (crossed * sin).unbind(), strict=True))


def _qk_weight(attention: Attention) -> Tensor:
    """Return the norms' weights of every query and key head: (H + G, D)."""
    query, key = attention.query_norm.weight, attention.key_norm.weight
    assert isinstance(query, Tensor)
    assert isinstance(key, Tensor)
    n_query = attention.query.out_features // attention.d_head
    n_key = attention.key.out_features // attention.d_head
    return torch.cat((query.expand(n_query, -1), key.expand(n_key, -1)))


def _make_norm(norm: nn.Module) -> Norm:
    if isinstance(norm, nn.LayerNorm):
        weight, bias, eps = norm.weight, norm.bias, norm.eps
        return lambda stream: torch.layer_norm(stream.x, weight.shape, weight, bias, eps)
    assert isinstance(norm, nn.RMSNorm)
    return _rms_norm(norm.weight.detach(), norm.eps or 0.0)


def _rms_norm(weight: Tensor, eps: float) -> Norm:
    """Return RMSNorm in three calls; F.rms_norm is seven on a CPU, and five times as slow.

    Of x and -x together the mean is 0 and the variance mean(x^2): their LayerNorm is the RMSNorm.
    """
    width = len(weight)
    weights = torch.cat((weight, torch.zeros_like(weight)))

    def norm(stream: _Stream) -> Tensor:
        torch.neg(stream.x, out=stream.minus_x)
        return torch.layer_norm(stream.both, weights.shape, weights, None, eps).narrow(1, 0, width)

    return norm
