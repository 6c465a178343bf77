"""The optimizers: Muon (Jordan et al. 2024) on matrices of blocks, AdamW on everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.config import TrainingConfig
from minigpt.rings import find_ring
from minigpt.training.world import ALONE, World


def is_muon_parameter(name: str, parameter: Tensor) -> bool:
    """Return whether Muon updates a parameter: a matrix of a block or of an LSTM's attention."""
    return parameter.ndim == 2 and name.startswith(("blocks.", "attention."))


def make_optimizers(
    model: nn.Module, config: TrainingConfig, product_dtype: torch.dtype, world: World = ALONE
) -> list[Optimizer]:
    """Return the optimizers, which together update every trainable parameter once.

    Each parameter group has ``peak_lr``, which the schedule scales into ``lr``.

    Args: product_dtype and world, options of Muon (see muon.py).
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
        options = matrix_options | {
            "momentum": config.momentum,
            "ns_steps": config.newton_schulz_steps,
            "adjust_lr_fn": "match_rms_adamw",
        }
        muon: Any = torch.optim.Muon
        if faster := find_ring("training.muon"):
            muon, options = faster.Muon, options | {"product_dtype": product_dtype, "world": world}
        optimizers.append(muon(matrices, **options))
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


def set_momentum(optimizers: Iterable[Optimizer], momentum: float) -> None:
    """Set the momentum of Muon."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if "momentum" in group:
                group["momentum"] = momentum
