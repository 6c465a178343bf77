"""Model configuration with the settings that only Hugging Face model types use.

Import ModelConfig from ``config``, which finds it here. This module does not import torch, because
--help needs it.
"""

from dataclasses import dataclass
from typing import Literal

from minigpt.errors import require_choice
from minigpt.fields import require, setting
from minigpt.model_config import ACTIVATIONS, OWN_TYPE, PlainModelConfig
from minigpt.rings import has_ring

HF_LAYOUTS = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
"""Hugging Face model types that GPT implements; files in checkpoint/families/ add more."""


def has_family(model_type: str) -> bool:
    """Return whether checkpoint/families/ of this installation has a file for a model type."""
    is_name = model_type.isidentifier() and not model_type.startswith("_")
    return is_name and has_ring(f"checkpoint.families.{model_type}")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(PlainModelConfig):
    """Architecture of a language model: enough to build it and to write its config.json."""

    rope_scaling: Literal["llama3", "linear", "dynamic", "yarn"] = "llama3"
    """RoPE scaling method: llama3 and yarn stretch long wavelengths, linear stretches all, dynamic
    none within context_length."""
    rope_scaling_factor: float = setting(1.0, "(0, inf)")
    """Factor by which RoPE wavelengths are stretched. 1 for no scaling."""
    rope_low_freq_factor: float = setting(1.0, "(0, inf)")
    """Divisor of rope_original_context: longer wavelengths are fully stretched (llama3)."""
    rope_high_freq_factor: float = setting(4.0, "(0, inf)")
    """Divisor of rope_original_context: shorter wavelengths are not stretched, and those between
    the two limits partly (llama3)."""
    rope_beta_fast: float = setting(32.0, "(0, inf)")
    """Turns in rope_original_context above which a wavelength is not stretched (yarn)."""
    rope_beta_slow: float = setting(1.0, "(0, inf)")
    """Turns in rope_original_context below which a wavelength is fully stretched (yarn)."""
    rope_attention_factor: float = setting(1.0, "(0, inf)")
    """Factor that multiplies rotated queries and keys (yarn)."""
    rope_truncate: bool = True
    """Whether the dimensions at the two limits are rounded outwards to integers (yarn)."""
    rope_original_context: int = setting(8192, "[1, inf)")
    """Context length before RoPE scaling, in tokens."""
    hf_fields: tuple[str, ...] = ()
    """Fields of config.json that only the model type's own class reads, each as NAME=JSON."""

    @property
    def has_own_class(self) -> bool:
        """Whether the model is built by the class of its family, if it has one, not of ``arch``."""
        return bool(self.hf_fields) or self.model_type not in (*HF_LAYOUTS, OWN_TYPE)

    def _layout(self) -> str:
        if self.arch != "gpt" or self.attention != "scaled_dot":
            return OWN_TYPE
        if self.family == "gpt2":
            return "gpt2"
        return "qwen3" if self.qk_norm else "qwen2" if self.attention_bias == "qkv" else "llama"

    def _check_layout(self) -> None:
        require(
            not self.hf_fields or self.model_type != OWN_TYPE,
            "hf_fields needs a model_type of Hugging Face. Leave it out.",
        )
        is_known = self.model_type in (*HF_LAYOUTS, OWN_TYPE) or not has_family(self.model_type)
        if is_known:  # else the family checks whether it supports the settings
            self._check_known_layout()
        require(
            self.rope_low_freq_factor < self.rope_high_freq_factor,
            f"rope_high_freq_factor must be above rope_low_freq_factor: it is "
            f"{self.rope_high_freq_factor}, not above {self.rope_low_freq_factor}.",
        )
        require(
            self.rope_scaling != "yarn"
            or (self.rope_beta_slow < self.rope_beta_fast and self.rope_theta > 1),
            "rope_scaling yarn needs rope_beta_fast above rope_beta_slow and rope_theta above 1: "
            f"they are {self.rope_beta_fast}, {self.rope_beta_slow} and {self.rope_theta}.",
        )

    def _check_known_layout(self) -> None:
        require_choice("activation", self.activation, ACTIVATIONS)
        layout = self._layout()
        known = {"llama": ("llama", "mistral")}.get(layout, (layout,))
        if self.model_type not in (*HF_LAYOUTS, OWN_TYPE):
            require_choice("model_type", self.model_type, known)
        require(
            self.model_type in known,
            f"model_type {self.model_type!r} does not fit the other settings, which are those of "
            f"{' or '.join(known)}. Change arch, attention, family, qk_norm or attention_bias.",
        )
        # No Hugging Face model type has these, so other programs could not open the model.
        require(
            not (self.qk_norm and self.attention_bias == "qkv"),
            "no published layout has qk_norm and biases of qkv only. Use attention_bias all.",
        )
        require(
            not self.mlp_bias or self.model_type in ("llama", OWN_TYPE),
            f"the layout {self.model_type} has no MLP biases. Set mlp_bias to false.",
        )
