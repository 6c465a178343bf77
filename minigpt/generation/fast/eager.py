"""Eager kernels of the decode step on a CPU: few calls, buffers made once.

A step of a small model is bound by calls (2 to 5 us each), one of a large model by reading its
weights. So: no modules, projections of the same input in one product, in-place where possible.

Shapes: B rows, C model dim, H query heads, G key/value heads, R = H / G, D head dim, S positions in
view, L layers, P positions of the context, X all heads' values side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt.generation.fast.decode_step import Add, Attend, DecodeStep, Function
from minigpt.generation.fast.products import make_product
from minigpt.generation.fast.step_forward import StepForward, StepOutput
from minigpt.model.attention import Attention, Recorder
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import MLP, GatedMLP


class EagerForward(StepForward):
    """Decodes one token per row with few calls."""

    def __init__(self, model: GPT, *, capacity: int, recorder: Recorder | None = None) -> None:
        """Args: capacity, the number of positions that the cache has room for."""
        super().__init__(model, capacity=capacity, recorder=recorder)
        with torch.no_grad():
            self._kernels = EagerKernels(model)
            self._step = DecodeStep(model, self._kernels)
        self._bind()

    def _bind(self) -> None:
        self._kernels.bind(self.cache.n_rows)

    def _decode(self, tokens: Tensor, position: int) -> StepOutput:
        caches = list(self.cache.append_views())
        logits, weights, contexts = self._step(tokens, position, caches)
        if self.recorder is None:
            return StepOutput(logits.float())
        context_LBX = torch.stack(contexts)
        return StepOutput(
            logits.float(),
            torch.stack(weights),
            context_LBX.unflatten(2, (-1, self.config.d_head)),
        )


class EagerKernels:
    """Kernels that write into buffers, which the next step overwrites."""

    def __init__(self, model: GPT) -> None:
        self._model = model
        self._rotary = _Rotary(model) if model.config.family == "llama" else None
        self.bind(1)

    def bind(self, n_rows: int) -> None:
        """Make the buffers for a number of rows."""
        config, dtype = self._model.config, self._model.dtype
        # The residual stream x, with room for -x beside it.
        self.both_B2C = torch.empty(n_rows, 2 * config.d_model, dtype=dtype)
        self.x_BC, self.minus_x_BC = self.both_B2C.chunk(2, dim=1)
        self._logits = torch.empty(n_rows, config.vocab_size, dtype=dtype)
        n_heads = config.n_head + 2 * config.n_kv_head
        self.heads = Heads(self._model, torch.empty(n_rows, n_heads * config.d_head, dtype=dtype))

    def embed(self, tokens: Tensor, position: int) -> Tensor:
        embedded = self._model.embedding(tokens)
        if self._model.config.family == "gpt2":
            return torch.add(embedded, self._model.positions.weight[position], out=self.x_BC)
        return self.x_BC.copy_(embedded)

    def rotary(self, position: int) -> Sequence[tuple[Tensor, Tensor] | None]:
        if self._rotary is None:
            return [None] * self._model.config.n_layer
        return self._rotary.at(position)

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
            torch.neg(x, out=self.minus_x_BC)
            normed = torch.layer_norm(self.both_B2C, weights.shape, weights, None, eps)
            return normed.narrow(1, 0, width)

        return norm

    def attention(self, layer: int, module: Attention) -> Attend:
        project = make_product([module.query, module.key, module.value])
        score, scale = module.score, module.d_head**-0.5
        eps = module.query_norm.eps if isinstance(module.query_norm, nn.RMSNorm) else None

        def attend(
            normed_BC: Tensor,
            position: int,
            rotary: tuple[Tensor, Tensor] | None,
            cache: tuple[Tensor, Tensor, Tensor, Tensor],
        ) -> tuple[Tensor, Tensor]:
            heads = self.heads
            new_k_BGD, new_v_BGD, k_BGSD, v_BGSD = cache
            project.write(normed_BC, heads.qkv_BX)
            if rotary is not None:
                heads.rotate(*rotary, eps)
            new_k_BGD.copy_(heads.k_BGD)
            new_v_BGD.copy_(heads.v_BGD)
            if score.changes_queries:
                heads.q_BHTD.copy_(score.fold(heads.q_BHTD))
            k_NSD, v_NSD = k_BGSD.flatten(0, 1), v_BGSD.flatten(0, 1)  # N = B G; views
            if score.is_dot_product:
                score_NRS = torch.baddbmm(
                    heads.zero, heads.q_NRD.float(), k_NSD.float().mT, beta=0, alpha=scale
                )
                weights_NRS = score_NRS.softmax(-1)
            else:
                weights_BHTS = score.weights(heads.q_BHTD, k_BGSD)
                weights_NRS = weights_BHTS.reshape(len(k_NSD), -1, k_NSD.shape[1])
            context_NRD = torch.bmm(weights_NRS, v_NSD.float())
            context_BX = context_NRD.view(len(normed_BC), -1).to(normed_BC.dtype)
            return context_BX, weights_NRS.view(len(normed_BC), -1, weights_NRS.shape[2])

        return attend

    def hidden(self, module: MLP | GatedMLP) -> Function:
        activation, is_gated = module.activation, isinstance(module, GatedMLP)
        layers = [module.gate, module.up] if isinstance(module, GatedMLP) else [module.up]
        product, width = make_product(layers), len(layers) * module.down.in_features
        buffer = gate = up = torch.empty(0)

        def hidden(normed_BC: Tensor) -> Tensor:
            nonlocal buffer, gate, up
            if len(buffer) != len(normed_BC):
                buffer = normed_BC.new_empty(len(normed_BC), width)
                gate, up = buffer.chunk(2, dim=1)
            product.write(normed_BC, buffer)
            result: Tensor = activation(gate).mul_(up) if is_gated else activation(buffer)
            return result

        return hidden

    def add(self, module: nn.Module) -> Add:
        product = make_product([module])

        def add(x_BC: Tensor, branch: Tensor) -> Tensor:
            product.add(branch, x_BC)
            return x_BC

        return add

    def unembed(self, module: nn.Module) -> Function:
        product = make_product([module])

        def unembed(normed_BC: Tensor) -> Tensor:
            product.write(normed_BC, self._logits)
            return self._logits

        return unembed

    def store(self, x: Tensor) -> Tensor:
        return x


class Heads:
    """The buffer that holds queries, keys and values of the new positions, and views of it."""

    def __init__(self, model: GPT, qkv_BX: Tensor) -> None:
        config, dtype = model.config, model.dtype
        n_query, n_key, d_head = config.n_head, config.n_kv_head, config.d_head
        self.qkv_BX = qkv_BX
        heads = qkv_BX.unflatten(1, (-1, d_head))
        q_BHD, self.k_BGD, self.v_BGD = heads.split([n_query, n_key, n_key], dim=1)
        self.q_BHTD = q_BHD[:, :, None]
        self._q_BGRD = q_BHD.unflatten(1, (n_key, -1))
        self.zero = torch.zeros(1, 1, 1)
        self._qk = heads[:, : n_query + n_key]
        self._qk_alone = self._qk[:, :, None]
        self._signs = torch.tensor([-1.0, 1.0], dtype=dtype)[:, None]
        self._both = torch.empty(*self._qk.shape[:2], 2, d_head, dtype=dtype)  # -x, x
        self._side_by_side = self._both.flatten(2)

    @property
    def q_NRD(self) -> Tensor:
        """The queries that share a key head: (B G, R, D)."""
        return self._q_BGRD.flatten(0, 1)

    def rotate(self, cos: Tensor, sin: Tensor, norm_eps: float | None) -> None:
        """Normalize queries and keys, if there is an eps, and rotate them.

        The norms' weights are in cos and sin; -x beside x makes the RMSNorm a LayerNorm.
        """
        torch.mul(self._qk_alone, self._signs, out=self._both)
        both = self._side_by_side
        if norm_eps is not None:
            both = torch.layer_norm(both, both.shape[2:], eps=norm_eps)
        d_head = self._qk.shape[2]
        crossed = both.narrow(2, d_head // 2, d_head)  # -x's second half, x's first
        torch.mul(both.narrow(2, d_head, d_head), cos, out=self._qk)
        self._qk.addcmul_(crossed, sin)


class _Rotary:
    """Cosines and sines of RoPE, multiplied by the weights of the norms of queries and keys."""

    def __init__(self, model: GPT) -> None:
        self._cos_PD = torch.cat((model.rotary_cos, model.rotary_cos), dim=1)
        self._sin_PD = torch.cat((model.rotary_sin, model.rotary_sin), dim=1)
        self._n_layer = len(model.blocks)
        self._weights: tuple[Tensor, Tensor] | None = None
        if model.config.qk_norm:
            attentions = [block.attention for block in model.blocks if isinstance(block, Block)]
            weight_LXD = torch.stack([_qk_weight(attention) for attention in attentions])
            # What sin multiplies comes from the other half of the head.
            self._weights = weight_LXD, weight_LXD.roll(weight_LXD.shape[2] // 2, 2)

    def at(self, position: int) -> Sequence[tuple[Tensor, Tensor]]:
        """Return cos and sin for each layer; sin is for -x's second half and x's first."""
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
