"""Norms, MLPs and rotary positions: the parts of a block that are not attention."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig

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
    """nn.RMSNorm in the dtype of its input, which under autocast is not that of the weight."""

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
        output: Tensor = self.down(self.activation(self.up(x)))
        return output


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
        output: Tensor = self.down(self.activation(self.gate(x)) * self.up(x))
        return output


def dense_weight(linear: nn.Module) -> Tensor:
    """Return the weight of a linear layer, (O, I), float32.

    A quantized layer, which is not an ``nn.Linear``, has a method of this name.
    """
    dense: Any = linear
    weight: Tensor = dense.weight if isinstance(linear, nn.Linear) else dense.dense_weight()
    return weight.float()


def rotary_table(config: ModelConfig, divisor: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position x frequency, each (context_length, D / 2), float32.

    With YaRN, both are multiplied by its attention factor.

    Args: divisor, of each frequency (D / 2,).

    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2.
    """
    # Always computed on the CPU, so that all devices use the same angles.
    exponent = torch.arange(0, config.d_head, 2, device="cpu", dtype=torch.float32) / config.d_head
    frequency = _scale_frequencies(1.0 / config.rope_theta**exponent, config)
    if divisor is not None:
        frequency = frequency / divisor
    position = torch.arange(config.context_length, device="cpu", dtype=torch.float32)
    angle = torch.outer(position, frequency)  # (T, D / 2)
    if config.rope_scaling != "yarn":
        return angle.cos(), angle.sin()
    return angle.cos() * config.rope_attention_factor, angle.sin() * config.rope_attention_factor


def _scale_frequencies(frequency: Tensor, config: ModelConfig) -> Tensor:
    """Scale RoPE frequencies (D / 2,) for a longer context than the original one.

    llama3 and yarn divide low frequencies by the factor, keep high ones and interpolate between;
    linear divides all. dynamic changes only what is longer than the context, so it does nothing.

    Source: llama3: its reference implementation, apply_scaling; Dubey et al. 2024,
        arXiv:2407.21783. yarn: Peng et al. 2023, arXiv:2309.00071, section 3.2. linear: Chen et
        al. 2023, arXiv:2306.15595.
    """
    if config.rope_scaling_factor == 1 or config.rope_scaling == "dynamic":
        return frequency
    scaled = frequency / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return scaled
    if config.rope_scaling == "yarn":
        kept_share = 1 - _yarn_ramp(config)
    else:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_context * frequency / (2 * math.pi)  # in the original context
        kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return kept_share * frequency + (1 - kept_share) * scaled


def _yarn_ramp(config: ModelConfig) -> Tensor:
    """Return how far each frequency is scaled, in [0, 1]: (D / 2,)."""

    def dimension(n_turns: float) -> float:
        """Return the dimension of the frequency with so many turns in the original context."""
        wavelength = config.rope_original_context / (2 * math.pi * n_turns)
        return config.d_head * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension(config.rope_beta_fast), dimension(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.d_head - 1)
    place = torch.arange(config.d_head // 2, device="cpu", dtype=torch.float32)
    return ((place - low) / (high - low or 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by its position's angle.

    The two halves are paired, as in Hugging Face, not neighbours, as in the paper; the results
    differ by a fixed permutation of the head's dimensions.

    Args: x (B, H, T, D); cos, sin (T, D / 2).
    Returns: (B, H, T, D).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1)
