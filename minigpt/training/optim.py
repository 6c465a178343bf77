"""The optimizers: Muon on the matrices, AdamW on everything else."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.config import TrainingConfig
from minigpt.training.world import ALONE, World


def orthogonalize(
    matrices: Tensor, *, steps: int, coefficients: tuple[float, float, float], dtype: torch.dtype
) -> Tensor:
    """Push the singular values of each matrix towards 1 with a quintic Newton-Schulz iteration.

    Args: matrices (N, rows, columns); steps, number of iterations; dtype, of the products.
    Returns: (N, rows, columns) in ``dtype``, singular values in about [0.7, 1.2].
    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the coefficients are torch's.
    """
    a, b, c = coefficients
    x = matrices.to(dtype)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:  # the Gram matrix of the shorter side is smaller
        x = x.mT
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    for _ in range(steps):
        gram = x @ x.mT
        update = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, update, x, beta=a)
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch's Muon with a batched orthogonalization of equal shapes, in a chosen dtype.

    torch's own orthogonalizes one matrix at a time and always in bfloat16, which a CPU without
    bfloat16 instructions computes several times more slowly than float32 (see
    docs/training.md). Update rule, options and state are torch's. On several ranks, each
    orthogonalizes some of the matrices and receives the others.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon; the scale of the update: Liu et
        al. 2025, arXiv:2502.16982, equation 4.
    """

    def __init__(
        self, params: Any, *, product_dtype: torch.dtype, world: World = ALONE, **options: Any
    ) -> None:
        """Args: product_dtype, of the matrix products in the orthogonalization."""
        super().__init__(params, **options)
        self.product_dtype = product_dtype
        self.world = world

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the orthogonalized momentum."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters)

    def _step_shape(
        self, group: dict[str, Any], shape: torch.Size, parameters: list[Tensor]
    ) -> None:
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        to_local = self.world.to_local
        weights = [to_local(p) for p in parameters]
        gradients = [to_local(p.grad) for p in parameters if p.grad is not None]
        momenta = [to_local(self.state[p]["momentum_buffer"]) for p in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"])
        newton_schulz = partial(
            orthogonalize,
            steps=group["ns_steps"],
            coefficients=group["ns_coefficients"],
            dtype=self.product_dtype,
        )
        stack = torch.stack(list(directions)).to(self.product_dtype)
        updates = self.world.map_matrices(newton_schulz, stack, parameters[0])
        # An orthogonal matrix has entries of RMS 1 / sqrt(longer side); 0.2 is AdamW's usual RMS.
        scale = 0.2 * max(shape) ** 0.5
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, list(updates.float().unbind()), alpha=-group["lr"] * scale)


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates a parameter: a matrix of a block, not an embedding or norm."""
    return parameter.ndim == 2 and name.startswith(("blocks.", "attention."))


def make_optimizers(
    model: nn.Module,
    config: TrainingConfig,
    product_dtype: torch.dtype,
    world: World = ALONE,
) -> list[Optimizer]:
    """Return the optimizers, which together hold every parameter once.

    Each parameter group has ``peak_lr``, which the schedule scales into ``lr``.

    Args: product_dtype and world, of Muon.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if is_muon_parameter(n, p)]
    others = [p for n, p in named if not is_muon_parameter(n, p)]
    matrix_options = {"lr": config.lr, "weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": others, "lr": config.embedding_lr, "weight_decay": 0.0}
    ]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        optimizers.append(
            Muon(
                matrices,
                **matrix_options,
                momentum=config.momentum,
                ns_steps=config.newton_schulz_steps,
                adjust_lr_fn="match_rms_adamw",
                product_dtype=product_dtype,
                world=world,
            )
        )
    else:
        groups.append({"params": matrices, **matrix_options})
    optimizers.append(AdamW(groups, betas=(config.beta1, config.beta2), eps=1e-10, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def scale_learning_rates(optimizers: Iterable[Optimizer], scale: float) -> None:
    """Set the learning rate of each parameter group to a fraction of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
