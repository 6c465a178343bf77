"""Norms, MLPs and rotary positions: the parts of a block that are not attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig

_ACTIVATIONS = {
    "silu": F.silu,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


class RMSNorm(nn.RMSNorm):
    """torch's, in the dtype of what it norms: under autocast that is not the weight's."""

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
    """Two layers around an activation, at every position by itself: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_mlp)
        self.down = nn.Linear(config.d_mlp, config.d_model)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.activation(self.up(x)))
        return output


class GatedMLP(nn.Module):
    """An MLP whose hidden layer is multiplied by an activated gate: (B, T, C) -> (B, T, C).

    Source: Shazeer 2020, arXiv:2002.05202 (with silu: SwiGLU).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down = nn.Linear(config.d_mlp, config.d_model, bias=False)
        self.activation = _ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return output


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x frequency, each (context_length, D / 2), float32.

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    # On the CPU whatever the default device is: a model that is built on the meta device to
    # receive loaded weights still needs real tables.
    exponent = torch.arange(0, config.d_head, 2, device="cpu", dtype=torch.float32) / config.d_head
    frequency = 1.0 / config.rope_theta**exponent
    position = torch.arange(config.context_length, device="cpu", dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (T, D / 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_i, x_{i + D/2}) by its position's angle.

    The halves are paired as in Hugging Face, not neighbours as in the paper; the two differ by a
    fixed permutation of the head's dimensions.

    Args: x (B, H, T, D); cos, sin (T, D / 2).
    Returns: (B, H, T, D).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
