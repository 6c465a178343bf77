"""Scale RoPE frequencies for a longer context than a model was originally trained on."""

import math

import torch
from torch import Tensor

from minigpt.config import ModelConfig


def scaled(frequency: Tensor, scale: float, config: ModelConfig) -> tuple[Tensor, float]:
    """Scale RoPE frequencies (D / 2,), and cos and sin, for a longer context than the original one.

    llama3 and yarn divide low frequencies by the factor, keep high ones and interpolate between;
    linear divides all. dynamic only affects sequences longer than the context, so nothing here.

    Source: llama3: its reference implementation, apply_scaling; Dubey et al. 2024,
        arXiv:2407.21783. yarn: Peng et al. 2023, arXiv:2309.00071, section 3.2. linear: Chen et
        al. 2023, arXiv:2306.15595.
    """
    if config.rope_scaling == "yarn":
        scale = config.rope_attention_factor
    return _scaled_frequency(frequency, config), scale


def _scaled_frequency(frequency: Tensor, config: ModelConfig) -> Tensor:
    if config.rope_scaling_factor == 1 or config.rope_scaling == "dynamic":
        return frequency
    stretched = frequency / config.rope_scaling_factor
    if config.rope_scaling == "linear":
        return stretched
    if config.rope_scaling == "yarn":
        kept_share = 1 - _yarn_ramp(config)
    else:
        low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
        turns = config.rope_original_context * frequency / (2 * math.pi)  # in the original context
        kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return kept_share * frequency + (1 - kept_share) * stretched


def _yarn_ramp(config: ModelConfig) -> Tensor:
    """Return how far each frequency is scaled, in [0, 1]: (D / 2,)."""

    def dimension(n_turns: float) -> float:
        """Return the dimension whose frequency has ``n_turns`` in the original context."""
        wavelength = config.rope_original_context / (2 * math.pi * n_turns)
        return config.d_head * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low, high = dimension(config.rope_beta_fast), dimension(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.d_head - 1)
    place = torch.arange(config.d_head // 2, device="cpu", dtype=torch.float32)
    return ((place - low) / (high - low or 0.001)).clamp(0, 1)
