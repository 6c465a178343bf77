"""One token a row, as a pure function of tensors: what --compile makes one graph of.

Shapes: B rows, C model dim, V vocabulary, L layers, H query heads, G key/value heads, R = H / G, D
head dim, S positions in view, P positions that the caches have room for, I inputs and O outputs of
a product.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import MLP, GatedMLP, rotate

# Places of a weight that are read in turn: measured 1, 2, 4 and 8. 4 read float32 and bfloat16 a
# fifth faster than 1, and int8 by half.
_SIDES = 4


class DecodeStep(nn.Module):
    """The logits after one more token in every row, as GPT.forward computes them.

    Activations are float32 whatever the weights are: a weight is converted on its way into the
    product, so that fewer bytes are read and nothing but the weights and the cache is rounded.
    """

    def __init__(self, model: GPT, *, shows_rows: bool = False) -> None:
        super().__init__()
        self.model, self.shows_rows = model, shows_rows

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        in_view: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Write the tokens' keys and values into the caches, and look at all up to them.

        Args: tokens (B,); position (1,), theirs; in_view (S,), of which only the shape is read: no
            position from S on is looked at; keys and values, for each layer (B, G, P, D), finite.
        Returns: logits (B, V), float32; if it shows rows, also the weights (L, B, H, S)
            and the heads' outputs (L, B, H, D).
        """
        model, config = self.model, self.model.config
        x = _embedded(model.embedding, tokens)
        rotary = None
        if config.family == "gpt2":
            x = x + model.positions.weight[position].float()
        else:
            rotary = model.rotary_cos[position].float(), model.rotary_sin[position].float()
        is_filled_S = torch.arange(in_view.shape[0], device=x.device) <= position
        weights, contexts = [], []
        for layer, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            normed = _kept(_norm(block.attention_norm, x))
            context, weights_BHS = _attend(
                block.attention, normed, rotary, position, is_filled_S, keys[layer], values[layer]
            )
            if self.shows_rows:
                weights.append(weights_BHS)
                contexts.append(context.unflatten(1, (-1, config.d_head)))
            x = x + _product(block.attention.output, _kept(context))
            x = x + _mlp(block.mlp, _kept(_norm(block.mlp_norm, x)))
            x = _kept(x)
        logits = _product(model.unembedding or model.embedding, _kept(_norm(model.final_norm, x)))
        if not self.shows_rows:
            return (logits,)
        return logits, torch.stack(weights), torch.stack(contexts)


def _attend(
    attention: Attention,
    x: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    position: Tensor,
    is_filled_S: Tensor,
    keys_BGPD: Tensor,
    values_BGPD: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the heads' outputs (B, H D) and weights (B, H, S) of queries made of x (B, C)."""

    def heads(projection: nn.Linear, norm: nn.Module) -> Tensor:
        projected = _product(projection, x).unflatten(-1, (-1, 1, attention.d_head))
        return _norm(norm, projected)  # (B, H or G, 1, D)

    q_BHTD = heads(attention.query, attention.query_norm)
    k_BGTD = heads(attention.key, attention.key_norm)
    v_BGTD = heads(attention.value, nn.Identity())
    if rotary is not None:
        q_BHTD, k_BGTD = rotate(q_BHTD, *rotary), rotate(k_BGTD, *rotary)
    keys_BGPD.index_copy_(2, position, k_BGTD.to(keys_BGPD.dtype))
    values_BGPD.index_copy_(2, position, v_BGTD.to(values_BGPD.dtype))
    n_group, n_view = keys_BGPD.shape[1], is_filled_S.shape[0]
    # Sums of products and no matmul: see _product.
    q_BGRTD = _kept(q_BHTD * attention.d_head**-0.5).unflatten(1, (n_group, -1))
    score_BGRS = (q_BGRTD * keys_BGPD[:, :, None, :n_view].float()).sum(-1)
    weights_BGRS = _kept(torch.where(is_filled_S, score_BGRS, -torch.inf).softmax(-1))
    context_BGRD = (weights_BGRS[..., None] * values_BGPD[:, :, None, :n_view].float()).sum(-2)
    return context_BGRD.flatten(1), weights_BGRS.flatten(1, 2)


def _mlp(mlp: MLP | GatedMLP, x: Tensor) -> Tensor:
    if isinstance(mlp, GatedMLP):
        hidden = mlp.activation(_product(mlp.gate, x)) * _product(mlp.up, x)
    else:
        hidden = mlp.activation(_product(mlp.up, x))
    return _product(mlp.down, _kept(hidden))


def _embedded(embedding: nn.Embedding, tokens: Tensor) -> Tensor:
    x = embedding.weight[tokens].float()  # (B, C)
    scale = getattr(embedding, "scale", None)
    return x if scale is None else x * scale[tokens].float()[:, None]


def _product(linear: nn.Module, x: Tensor) -> Tensor:
    """Return what a linear layer, or an embedding the other way round, makes of x (B, I).

    A sum of products fuses, with the conversion of the weight before it and the bias and residual
    after it, into one loop that reads each weight once for all rows; a matmul is a call to a
    library, which is made for many rows. The weight is read at several places in turn, as one sum
    would wait for its own last addition, and more is under way from memory.
    """
    weight = linear.weight
    assert isinstance(weight, Tensor)
    n_together = len(weight) // _SIDES * _SIDES
    parts = [*weight[:n_together].chunk(_SIDES), weight[n_together:]]
    y_OB = torch.cat([(part.float()[:, None] * x).sum(-1) for part in parts if len(part)])
    y = y_OB.mT  # (B, O)
    if (scale := getattr(linear, "scale", None)) is not None:
        y = y * scale.float()
    if (bias := getattr(linear, "bias", None)) is not None:
        y = y + bias.float()
    return y


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.LayerNorm):
        weight, bias = norm.weight.float(), norm.bias.float()
        return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)
    if isinstance(norm, nn.RMSNorm):
        return F.rms_norm(x, norm.normalized_shape, norm.weight.float(), norm.eps)
    return x


def _kept(x: Tensor) -> Tensor:
    """Return x as one that the compiler must store, not compute again for each row of a weight."""
    return torch.as_strided(x, x.shape, x.stride())
