"""The training loss of a GPT on a CPU, in fewer operations than its modules use.

A step of a small model has hundreds of short operations, which take longer than its matrix
products. Here, weights are cast once per pass, one product computes queries, keys and values, one
gate and up projections, and norms, RoPE, SwiGLU and cross-entropy have custom backward passes.

Shapes: B batch, T positions, C model dim, H query heads, G key/value heads, D head dim, F MLP dim,
N = B T, V vocabulary.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import RunConfig
from minigpt.errors import MinigptWarning
from minigpt.model.gpt import GPT, Block
from minigpt.model.language_model import model_class
from minigpt.model.layers import MLP, GatedMLP
from minigpt.text.batches import NO_TARGET
from minigpt.training.run import Run

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
BLOCK = 1 << 17
"""Logits per block of the cross-entropy: few enough for a core's cache, but at least 32 rows."""


def is_fused(config: RunConfig, device_type: str, n_ranks: int) -> bool:
    """Return whether a run uses the fused loss, unless its step is compiled.

    It must be a plain GPT on the CPU, on one rank and without activation checkpointing.
    """
    model = config.model
    is_plain = model_class(model) is GPT and model.attention == "scaled_dot"
    return is_plain and device_type == "cpu" and n_ranks == 1 and not config.training.recompute


def fused_loss(run: Run, loss: nn.Module) -> Any:
    """Return the fused loss of a run, which equals that of the model's modules except for rounding.

    None if it is not supported, or, with a warning, if the model's code was changed.

    Args: loss, a ``TrainingLoss``.
    """
    if type(run.model) is not GPT or not is_fused(run.config, run.device.type, run.world.size):
        return None
    if not _agrees(loss):
        warnings.warn(
            "the code of the model computes another loss than training/fused.py. Training uses "
            "the model's code, which is slower unless it is compiled.",
            MinigptWarning,
            stacklevel=2,
        )
        return None
    return FusedLoss(run.model, run.dtype, loss)


def _agrees(loss: nn.Module) -> bool:
    """Return whether the fused loss and its gradients equal those of a loss on a few tokens.

    The weights are random, because a zero-initialized one would hide errors in earlier layers.
    """
    twin: Any = copy.deepcopy(loss).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            parameter.normal_(std=std, generator=generator)
    config = twin.model.config
    tokens = torch.arange(min(64, config.context_length) + 1)[None] % config.vocab_size

    def backward(loss_of: Any) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(0)  # equal dropout masks
        value = loss_of(tokens[:, :-1], tokens[:, 1:])
        value.backward()
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters()]
        twin.zero_grad(set_to_none=True)
        return value.detach(), found

    with torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        right, theirs = backward(twin)
        try:
            value, ours = backward(FusedLoss(twin.model, torch.float32, twin))
        except Exception:  # the model has other modules or shapes
            return False
    # Rounding affects gradients more than the loss: it can switch single units of a ReLU.
    rounding = 1e-3 * torch.stack([gradient.norm() for gradient in theirs]).norm()
    return bool((value - right).abs() <= 2e-5 * right.abs()) and all(
        (mine - gradient).norm() <= 1e-2 * gradient.norm() + rounding
        for mine, gradient in zip(ours, theirs, strict=True)
    )


class FusedLoss:
    """The loss of a GPT with scaled dot-product attention."""

    def __init__(self, model: GPT, dtype: torch.dtype, loss: nn.Module) -> None:
        """Args: dtype, that of the products; loss, the ``TrainingLoss`` of the model."""
        self._model, self._dtype, self._loss = model, dtype, loss
        self._blocks = cast(list[Block], list(model.blocks))
        products: list[list[Any]] = []
        for block in self._blocks:
            own, mlp = block.attention, block.mlp
            hidden = [mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) else [mlp.up]
            products += [[own.query, own.key, own.value], [own.output], hidden, [mlp.down]]
        products.append([model.unembedding or model.embedding])
        self._weights = [[layer.weight for layer in group] for group in products]
        """Weights of each matrix product, in order."""
        biases = [[getattr(layer, "bias", None) for layer in group] for group in products]
        self._biases = [group if group[0] is not None else [] for group in biases]
        # Modules other than dropout are not called, unless one has hooks.
        self._bypassed = [
            module
            for module in model.modules()
            if module is not model and module.__class__ is not nn.Dropout
        ]

    def __call__(self, inputs: Tensor, targets: Tensor, **options: bool) -> Tensor:
        """Return the loss of a batch. Args: those of ``TrainingLoss.forward``."""
        if any(getattr(module, kind) for module in self._bypassed for kind in _HOOKS):
            return self._loss(inputs, targets, **options)
        with torch.autocast("cpu", enabled=False):
            self._model.__dict__["forward"] = self._logits  # so that the model's hooks are called
            try:
                logits_NV = self._model(inputs).flatten(0, 1)
            finally:
                del self._model.__dict__["forward"]
            is_sum = options.get("is_sum", False)
            loss: Tensor = _CrossEntropy.apply(logits_NV, targets.flatten(), is_sum)
        return loss

    def _logits(self, tokens: Tensor) -> Tensor:
        model, config, n_time = self._model, self._model.config, tokens.shape[1]
        counts = [config.n_head, config.n_kv_head, config.n_kv_head]
        linears = self._linears()
        x = model.embedding(tokens)
        if config.family == "gpt2":
            x = x + model.positions.weight[:n_time]
        else:
            cos, sin = model.rotary_cos[:n_time, None], model.rotary_sin[:n_time, None]
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)  # (T, 1, D)
        x, branch = model.dropout(x), None
        for block in self._blocks:
            x, normed = self._norm(x, branch, block.attention_norm)
            qkv = F.linear(normed, *next(linears)).unflatten(-1, (-1, config.d_head))
            if config.family == "gpt2":
                q, k, v = qkv.transpose(1, 2).split(counts, 1)
            else:
                gains = None
                if config.qk_norm:
                    norms: Any = block.attention.query_norm, block.attention.key_norm
                    pairs = zip(norms, counts[:2], strict=True)
                    gains = torch.cat([norm.weight.expand(n, -1) for norm, n in pairs])
                q, k, v = _Heads.apply(qkv, gains, cos, sin, config.n_head, config.norm_eps)
            context = block.attention.score.attend(q, k, v).transpose(1, 2).flatten(2)
            branch = block.dropout(F.linear(context, *next(linears)))
            x, normed = self._norm(x, branch, block.mlp_norm)
            hidden = _hidden(block.mlp, F.linear(normed, *next(linears)))
            branch = block.dropout(F.linear(hidden, *next(linears)))
        return F.linear(self._norm(x, branch, model.final_norm)[1], *next(linears))

    def _linears(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield the weight and bias of each product, in its dtype."""
        groups = self._weights + [group for group in self._biases if group]
        joined = _Join.apply(
            self._dtype, [len(group) for group in groups], *itertools.chain(*groups)
        )
        biases = iter(joined[len(self._weights) :])
        for weight, group in zip(joined, self._biases, strict=False):
            yield weight, next(biases) if group else None

    def _norm(self, x: Tensor, branch: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        """Return the residual stream with a branch added, and its norm."""
        if not isinstance(norm, nn.LayerNorm):
            pair: Any = _AddNorm.apply(x, branch, norm.weight, norm.eps, self._dtype)
            return pair[0], pair[1]
        x = x if branch is None else x + branch
        return x, norm(x).to(self._dtype)


def _hidden(mlp: MLP | GatedMLP, x: Tensor) -> Tensor:
    """Return the hidden layer of an MLP, (B, T, F), from its up, or gate and up, projections."""
    hidden: Tensor
    if isinstance(mlp, MLP):
        hidden = mlp.activation(x)
    elif mlp.activation is F.silu:
        hidden = _SwiGLU.apply(x)
    else:
        gate, up = x.chunk(2, -1)
        hidden = mlp.activation(gate) * up
    return hidden


class _Join(torch.autograd.Function):
    """Concatenate the tensors of each group along their rows, cast to a dtype."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, sizes: list[int], *tensors: Tensor) -> Any:
        ctx.sizes, ctx.n_rows = sizes, [len(tensor) for tensor in tensors]
        rest, joined = iter(tensors), []
        for size in sizes:
            group = [next(rest) for _ in range(size)]
            if size == 1:
                joined.append(group[0].to(dtype))
            else:
                out = group[0].new_empty(sum(map(len, group)), *group[0].shape[1:], dtype=dtype)
                joined.append(torch.cat(group, out=out))
        return tuple(joined)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        n_rows, split = iter(ctx.n_rows), []
        for size, gradient in zip(ctx.sizes, gradients, strict=True):
            split += gradient.float().split([next(n_rows) for _ in range(size)])
        return None, None, *split


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the rows of x divided by their RMS, and the scale of each row."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return x * scale, scale


def _normalize_backward(
    gradient: Tensor, normed: Tensor, scale: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of an RMSNorm's input, and the terms that sum to that of its gain."""
    terms = gradient * normed
    dots = (terms * gain).sum(-1, keepdim=True).div_(-gain.shape[-1])
    return (gradient * gain).addcmul_(normed, dots).mul_(scale), terms


class _AddNorm(torch.autograd.Function):
    """Add a branch to the residual stream; return the stream, and its RMSNorm in a dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, gain: Tensor, eps: float, dtype: torch.dtype
    ) -> Any:
        if branch is not None:
            x = x + branch
        normed, scale = _normalize(x, eps)
        ctx.save_for_backward(normed, scale, gain)
        ctx.dtype = None if branch is None else branch.dtype
        return x, (normed * gain).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        normed, scale, gain = ctx.saved_tensors
        dx, terms = _normalize_backward(gradients[1].float(), normed, scale, gain)
        dx += gradients[0]
        dbranch = None if ctx.dtype is None else dx.to(ctx.dtype)
        return dx, dbranch, terms.flatten(0, -2).sum(0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class _Heads(torch.autograd.Function):
    """Normalize and rotate queries and keys: (B, T, H + 2 G, D) to q_BHTD, k_BGTD and v_BGTD."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        gains: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        n_head: int,
        eps: float,
    ) -> Any:
        n_group = (qkv.shape[2] - n_head) // 2
        qk, v = qkv.split([n_head + n_group, n_group], 2)
        y, normed, scale = qk.float(), None, None
        if gains is not None:
            normed, scale = _normalize(y, eps)
            y = normed * gains
        ctx.save_for_backward(normed, scale, gains, cos, sin)
        y = _rotate(y, cos, sin).to(qkv.dtype)
        return *y.transpose(1, 2).split([n_head, n_group], 1), v.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        normed, scale, gains, cos, sin = ctx.saved_tensors
        dq, dk, dv = (gradient.transpose(1, 2) for gradient in gradients)
        dx, dgains = _rotate(torch.cat([dq, dk], 2).float(), cos, -sin), None
        if gains is not None:
            dx, terms = _normalize_backward(dx, normed, scale, gains)
            dgains = terms.sum((0, 1))
        return torch.cat([dx.to(dv.dtype), dv], 2), dgains, None, None, None, None


class _SwiGLU(torch.autograd.Function):
    """The hidden layer of an MLP from its gate and up projections: (B, T, 2 F) to (B, T, F)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, -1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, -1)
        torch.mul(gradients[0], F.silu(gate), out=dup)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=dgate)
        return dx


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of logits (N, V): its sum, or its mean over tokens with a target.

    The gradient is computed with the loss, and is the only allocation as large as the logits.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, is_sum: bool) -> Tensor:
        is_counted = targets_N[:, None] != NO_TARGET
        targets = targets_N[:, None].where(is_counted, 0)
        weights = is_counted.float() if is_sum else is_counted / is_counted.sum()
        gradient, losses = torch.empty_like(logits_NV), torch.empty_like(weights)
        n_rows = max(32, BLOCK // logits_NV.shape[1])
        # One buffer for all blocks: allocating one for each would fragment the heap.
        buffer = torch.empty_like(logits_NV[:n_rows], dtype=torch.float32)
        parts = (part.split(n_rows) for part in (logits_NV, targets, weights, gradient, losses))
        for logits, target, weight, out, loss in zip(*parts, strict=True):
            x = buffer[: len(logits)].copy_(logits)
            x -= x.amax(1, keepdim=True)
            target_logit = x.gather(1, target)
            total = x.exp_().sum(1, keepdim=True)
            torch.mul(total.log() - target_logit, weight, out=loss)
            x *= weight / total
            out.copy_(x.scatter_add_(1, target, -weight))
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient if gradients[0] == 1 else gradient * gradients[0], None, None
