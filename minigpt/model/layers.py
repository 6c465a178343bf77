"""Norms, MLPs and rotary positions: the parts of a block that are not attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.rings import find_ring

Rotary = tuple[Tensor, Tensor]
"""Cos and sin of RoPE, whose first axis is the position."""
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_sigmoid": lambda x: x * (1.702 * x).sigmoid(),  # Hendrycks & Gimpel 2016, section 2
}
"""ModelConfig.activation -> function. A file in checkpoint/families/ may add its own."""


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm in the dtype of its input, which differs from the weight's under autocast."""

    @property
    def gain(self) -> Tensor:
        """Factor of each normalized element (C,), float32."""
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """Return the family's norm over the last axis.

    Source: LayerNorm, Ba et al. 2016, arXiv:1607.06450; RMSNorm, Zhang & Sennrich 2019,
        arXiv:1910.07467.
    """
    if config.family == "gpt2":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, eps=config.norm_eps)


class MLP(nn.Module):
    """Position-wise feed-forward network: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp)
        self.down = nn.Linear(config.d_mlp, config.d_model)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


class GatedMLP(nn.Module):
    """An MLP whose hidden layer is multiplied by an activated gate: (B, T, C) -> (B, T, C).

    Source: Shazeer 2020, arXiv:2002.05202 (with silu: SwiGLU).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


def rotary_table(config: ModelConfig, divisor: Tensor | None = None, scale: float = 1.0) -> Rotary:
    """Return cos and sin of position x frequency, each (context_length, D / 2), float32.

    Args: divisor, one for each frequency (D / 2,); scale, factor of cos and sin.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    # Always computed on the CPU, so that all devices use the same angles.
    exponent = torch.arange(0, config.d_head, 2, device="cpu", dtype=torch.float32) / config.d_head
    frequency = 1.0 / config.rope_theta**exponent
    if scaling := find_ring("model.rope_scaling"):
        frequency, scale = scaling.scaled(frequency, scale, config)
    if divisor is not None:
        frequency = frequency / divisor
    position = torch.arange(config.context_length, device="cpu", dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (T, D / 2)
    return angle.cos() * scale, angle.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by its position's angle.

    Dimensions of the two halves are paired, as in Hugging Face, not adjacent ones, as in the paper;
    the results differ by a fixed permutation of the head's dimensions.

    Args: x (B, H, T, D); cos, sin (T, D / 2).
    Returns: (B, H, T, D).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
