"""Attention scores, the weights made of them, and attention by scores that are no dot product.

Every score is a function of queries (B, H, T, D), keys (B, G, S, D) and, by name, its parameters,
which each query head has for itself; query heads share key heads in groups of H / G, neighbours
together. It returns (B, H, T, S), float32 (float64 of such), before mask and softmax.

Shapes: B batch, H query heads, G key/value heads, T queries, S keys, D head dim, A hidden units.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt.config import ModelConfig

ScoreFunction = Callable[..., Tensor]
"""(q (B, H, T, D), k (B, G, S, D), **parameters) -> (B, H, T, S)."""

_HIDDEN_AT_ONCE = 2**22
"""Hidden values of a tanh score that are computed together: measured from 2**18 to 2**24."""
_HIDDEN_AT_ONCE_ON_GPU = 2**26
"""A quarter of a GiB: few launches, each of enough to do."""


def scaled_dot_score(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """Score each query against each key by their dot product over sqrt(D).

    Args: q (B, H, T, D); k (B, G, S, D), G dividing H.
    Returns: (B, H, T, S), float32, before mask and softmax.
    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; groups: Ainslie et al. 2023,
        arXiv:2305.13245.
    """
    return dot_score(_wide(q_BHTD) * q_BHTD.shape[-1] ** -0.5, k_BGSD)


def dot_score(q_BHTD: Tensor, k_BGSD: Tensor) -> Tensor:
    """Score each query against each key by their dot product.

    score(q, k) = q . k

    Args, Returns: as ``scaled_dot_score``.
    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """
    n_batch, n_head, n_query, d_head = q_BHTD.shape
    n_group, n_key = k_BGSD.shape[1], k_BGSD.shape[2]
    # Folding the group into the rows of one product reads each key once and repeats none.
    q_BGRD = _wide(q_BHTD).reshape(n_batch, n_group, -1, d_head)
    score = q_BGRD @ _wide(k_BGSD).mT  # (B, G, H / G * T, S)
    return score.reshape(n_batch, n_head, n_query, n_key)


def general_score(q_BHTD: Tensor, k_BGSD: Tensor, *, w: Tensor) -> Tensor:
    """Score each query against each key by a learned bilinear form.

    score(q, k) = q^T W k

    Args: as ``scaled_dot_score``; w (H, D, D).
    Returns: (B, H, T, S), float32, before mask and softmax.
    Raises: ValueError if W does not fit the heads.
    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """
    n_head, d_head = q_BHTD.shape[1], q_BHTD.shape[3]
    _require_shapes({"w": w}, {"w": (n_head, d_head, d_head)})
    return dot_score(_wide(q_BHTD) @ _wide(w), k_BGSD)


def concat_score(q_BHTD: Tensor, k_BGSD: Tensor, *, w: Tensor, v: Tensor) -> Tensor:
    """Score each query against each key by a tanh network over the two, one after the other.

    score(q, k) = v . tanh(W [q; k])

    Args: as ``scaled_dot_score``; w (H, A, 2 D); v (H, A).
    Returns: (B, H, T, S), float32, before mask and softmax.
    Raises: ValueError if the parameters do not fit the heads or each other.
    Source: Luong et al. 2015, arXiv:1508.04025, section 3.1.
    """
    n_head, d_head = q_BHTD.shape[1], q_BHTD.shape[3]
    _require_shapes({"w": w, "v": v}, {"w": (n_head, v.shape[-1], 2 * d_head), "v": (n_head, -1)})
    # The product of a matrix and two vectors in one is the sum of two products.
    w_q, w_k = w.chunk(2, dim=-1)
    return additive_score(q_BHTD, k_BGSD, w_q=w_q, w_k=w_k, v=v)


def additive_score(
    q_BHTD: Tensor, k_BGSD: Tensor, *, w_q: Tensor, w_k: Tensor, v: Tensor
) -> Tensor:
    """Score each query against each key by a small tanh network.

    score(q, k) = v . tanh(W q + U k)

    All B H T S A hidden values are there at once: ``Score`` asks for some queries at a time.

    Args: as ``scaled_dot_score``; w_q, the W, and w_k, the U, each (H, A, D); v (H, A).
    Returns: (B, H, T, S), float32, before mask and softmax.
    Raises: ValueError if the parameters do not fit the heads or each other.
    Source: Bahdanau et al. 2014, arXiv:1409.0473, appendix A.1.2.
    """
    n_head, d_head = q_BHTD.shape[1], q_BHTD.shape[3]
    matrix = (n_head, v.shape[-1], d_head)
    _require_shapes(
        {"w_q": w_q, "w_k": w_k, "v": v}, {"w_q": matrix, "w_k": matrix, "v": (n_head, -1)}
    )
    return _tanh_score(_projected(q_BHTD, w_q), _projected(k_BGSD, w_k), _wide(v))


def _projected(x_BGTD: Tensor, w_HAD: Tensor) -> Tensor:
    """Return what each query head's matrix makes of its queries or keys: (H, B, T, A)."""
    x_GBTD = _wide(x_BGTD).transpose(0, 1)
    w_GRAD = _wide(w_HAD).unflatten(0, (len(x_GBTD), -1))
    return (x_GBTD[:, None] @ w_GRAD.mT[:, :, None]).flatten(0, 1)


def _tanh_score(q_HBTA: Tensor, k_HBSA: Tensor, v_HA: Tensor) -> Tensor:
    # Heads first, so that the product with v needs no second copy of the hidden values.
    hidden_HBTSA = (q_HBTA[:, :, :, None] + k_HBSA[:, :, None]).tanh_()
    score_H = hidden_HBTSA.flatten(1, 3) @ v_HA[:, :, None]  # (H, B T S, 1)
    return score_H.view(hidden_HBTSA.shape[:4]).transpose(0, 1)


SCORES: Mapping[str, ScoreFunction] = {
    "scaled_dot": scaled_dot_score,
    "dot": dot_score,
    "general": general_score,
    "concat": concat_score,
    "additive": additive_score,
}
"""The scores by the names that ModelConfig.attention has for them."""

PARAMETERS: Mapping[str, Mapping[str, int]] = {
    "scaled_dot": {},
    "dot": {},
    "general": {"w": 1},
    "concat": {"w": 2, "v": 0},
    "additive": {"w_q": 1, "w_k": 1, "v": 0},
}
"""Each score's parameters, and how often D goes into their inputs; 0 for vectors. A is D."""


def score_parameter_count(config: ModelConfig) -> int:
    """Return the number of a layer's score parameters."""
    d_hidden = config.n_head * config.d_head
    return sum(
        d_hidden * max(1, n_inputs * config.d_head)
        for n_inputs in PARAMETERS[config.attention].values()
    )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _require_shapes(
    parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        found = tuple(parameters[name].shape)
        if len(found) != len(shape) or any(
            n != wanted for n, wanted in zip(found, shape, strict=True) if wanted >= 0
        ):
            wanted = ["any" if n < 0 else n for n in shape]
            raise ValueError(f"{name} has the shape {list(found)}, and must have {wanted}")


def causal_mask(n_query: int, n_key: int, device: torch.device | str = "cpu") -> Tensor:
    """Return (T, S), true where a query may look, the last query aligned with the last key."""
    mask = torch.ones(n_query, n_key, dtype=torch.bool, device=device)
    return mask.tril(n_key - n_query)


def visibility(
    n_query: int, n_key: int, device: torch.device | str, visible_BS: Tensor | None
) -> Tensor | None:
    """Return (T, S) or (B, 1, 1 or T, S), true where a query may look; None if that is all."""
    mask = causal_mask(n_query, n_key, device) if n_query > 1 else None
    if visible_BS is None:
        return mask
    visible_B1TS = visible_BS[:, None, None]
    return visible_B1TS if mask is None else visible_B1TS & mask


class Weights(Protocol):
    """Attention weights of queries (B, H, T, D) and keys (B, G, S, D): (B, H, T, S), float32."""

    def __call__(self, q_BHTD: Tensor, k_BGSD: Tensor, /) -> Tensor:
        """Return the weights; the last query is that of the last key."""


def attention_weights(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    score: ScoreFunction = scaled_dot_score,
    visible_BS: Tensor | None = None,
) -> Tensor:
    """Return softmax over the keys of the causal score: (B, H, T, S), float32.

    Args: visible_BS, false for keys that no query of a sequence may look at; a query that may look
        at none has weights of 0.
    """
    score_BHTS = score(q_BHTD, k_BGSD)
    n_query, n_key = score_BHTS.shape[-2:]
    mask = visibility(n_query, n_key, score_BHTS.device, visible_BS)
    if mask is None:
        return score_BHTS.softmax(dim=-1)
    weights_BHTS = score_BHTS.masked_fill(~mask, -torch.inf).softmax(dim=-1)
    if visible_BS is not None:
        weights_BHTS = weights_BHTS.masked_fill(~mask.any(dim=-1, keepdim=True), 0)
    return weights_BHTS


class Score(nn.Module):
    """One of the SCORES, with its parameters for every query head of a layer.

    dot and general are folded into the query, so that its scaled dot product, which has a fast
    kernel, is their score: every other method takes queries that went through ``fold``.

    The parameters are kept as projections keep theirs, with the heads' outputs below each other:
    matrices (H A, n D), which Muon moves as it does the query projection, and vectors (H A,).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.name = config.attention
        self.n_head, self.d_head = config.n_head, config.d_head
        self.is_dot_product = "v" not in PARAMETERS[self.name]
        """Whether the scaled dot product of folded queries and keys is the score."""
        for name, n_inputs in PARAMETERS[self.name].items():
            inputs = [n_inputs * self.d_head] if n_inputs else []
            values = torch.zeros(self.n_head * self.d_head, *inputs)
            self.register_parameter(name, nn.Parameter(values))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Draw initial weights in place, for queries and keys with entries of about 1.

        general: W = I / sqrt(D), which begins as the scaled dot product. concat and additive:
        normal, so that hidden values have a variance of 1 before the tanh, and scores are of the
        size of scaled dot's. The sources begin near 0, where every matrix waits for another one to
        have a gradient.
        """
        for name, parameter in self.named_parameters():
            if self.name == "general":
                identity = torch.eye(self.d_head) * self.d_head**-0.5
                parameter.copy_(identity.repeat(self.n_head, 1))
            else:
                fan_in = self.d_head if name == "v" else 2 * self.d_head
                nn.init.normal_(parameter, std=fan_in**-0.5, generator=generator)

    def parameters_by_head(self) -> dict[str, Tensor]:
        """Return what the score's function takes beside queries and keys."""
        return {
            name: parameter.unflatten(0, (self.n_head, -1))
            for name, parameter in self.named_parameters()
        }

    def fold(self, q_BHTD: Tensor) -> Tensor:
        """Return queries whose scaled dot product is the score; as they are, if there are none."""
        scale = self.d_head**0.5
        if self.name == "dot":
            return q_BHTD * scale
        if self.name == "general":
            return q_BHTD @ (self.parameters_by_head()["w"] * scale).to(q_BHTD.dtype)
        return q_BHTD

    def weights(self, q_BHTD: Tensor, k_BGSD: Tensor, visible_BS: Tensor | None = None) -> Tensor:
        """Return softmax over the keys of the causal score: (B, H, T, S), float32."""
        # Autocast would round scores to bfloat16, as the fused kernel does not.
        with torch.autocast(q_BHTD.device.type, enabled=False):
            if self.is_dot_product:
                return attention_weights(q_BHTD, k_BGSD, visible_BS=visible_BS)
            n_key = k_BGSD.shape[2]
            q_HBTA, k_HBSA, v_HA = self._projected(q_BHTD, k_BGSD)
            score = partial(_tanh_score, v_HA=v_HA)
            parts = []
            for q, k in _chunks(q_HBTA, k_HBSA):
                n_view = k.shape[2]
                visible = None if visible_BS is None else visible_BS[:, :n_view]
                parts.append(F.pad(attention_weights(q, k, score, visible), (0, n_key - n_view)))
            return torch.cat(parts, dim=2)

    def attend(
        self, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None = None
    ) -> Tensor:
        """Return each head's output: (B, H, T, D).

        Of a tanh score, some queries after each other, whose hidden values are let go at once and
        computed again for the backward pass (Chen et al. 2016, arXiv:1604.06174): memory beyond
        inputs and outputs does not grow with T, forward or backward.

        Args: visible_BS, false for keys that no query of a sequence may look at; None for none.
        """
        if self.is_dot_product:
            return _dot_product_attention(q_BHTD, k_BGSD, v_BGSD, visible_BS)
        # Autocast would round scores to bfloat16, as the fast kernel does not.
        with torch.autocast(q_BHTD.device.type, enabled=False):
            q_HBTA, k_HBSA, v_HA = self._projected(q_BHTD, k_BGSD)
            contexts = []
            for q, k in _chunks(q_HBTA, k_HBSA):
                n_view = k.shape[2]
                visible = None if visible_BS is None else visible_BS[:, :n_view]
                chunk = q, k, v_HA, v_BGSD[:, :, :n_view], visible
                if torch.is_grad_enabled():
                    context = checkpoint(
                        _tanh_attention, *chunk, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    context = _tanh_attention(*chunk)
                contexts.append(context)
        return torch.cat(contexts, dim=2)

    def _projected(self, q_BHTD: Tensor, k_BGSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what a tanh score makes of queries and keys before they meet, and its v (H, A)."""
        by_head = self.parameters_by_head()
        if self.name == "concat":
            w_q, w_k = by_head["w"].chunk(2, dim=-1)
        else:
            w_q, w_k = by_head["w_q"], by_head["w_k"]
        return _projected(q_BHTD, w_q), _projected(k_BGSD, w_k), _wide(by_head["v"])


def _chunks(q_HBTA: Tensor, k_HBSA: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some queries at a time, and the keys that the last of them may look at."""
    n_query, n_key = q_HBTA.shape[2], k_HBSA.shape[2]
    hidden_of_one = k_HBSA.numel()
    at_once = _HIDDEN_AT_ONCE if q_HBTA.device.type == "cpu" else _HIDDEN_AT_ONCE_ON_GPU
    n_at_once = max(1, at_once // hidden_of_one)
    for first in range(0, n_query, n_at_once):
        last = min(first + n_at_once, n_query)
        yield q_HBTA[:, :, first:last], k_HBSA[:, :, : n_key - n_query + last]


def _tanh_attention(
    q_HBTA: Tensor, k_HBSA: Tensor, v_HA: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None
) -> Tensor:
    weights_BHTS = attention_weights(q_HBTA, k_HBSA, partial(_tanh_score, v_HA=v_HA), visible_BS)
    return weighted_sum(weights_BHTS, v_BGSD)


def weighted_sum(weights_BHTS: Tensor, v_BGSD: Tensor) -> Tensor:
    """Return each head's output, (B, H, T, D), in the dtype of the values."""
    with torch.autocast(v_BGSD.device.type, enabled=False):
        n_group = v_BGSD.shape[1]
        weights_BGRS = weights_BHTS.unflatten(1, (n_group, -1)).flatten(2, 3)  # R = H / G * T
        context_BGRD = weights_BGRS @ _wide(v_BGSD)
    return context_BGRD.reshape(*weights_BHTS.shape[:3], -1).to(v_BGSD.dtype)


def _dot_product_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, visible_BS: Tensor | None
) -> Tensor:
    n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
    mask = None
    # SDPA's own causal mask is aligned upper-left; after a cached prefix it must be
    # lower-right, so that the last query sees every key.
    if visible_BS is not None or n_query != n_key:
        mask = visibility(n_query, n_key, q_BHTD.device, visible_BS)
    return F.scaled_dot_product_attention(
        q_BHTD,
        k_BGSD,
        v_BGSD,
        attn_mask=mask,
        is_causal=mask is None and n_query > 1,
        enable_gqa=k_BGSD.shape[1] != q_BHTD.shape[1],
    )
