"""llama.cpp's architecture for each of our model types, and the features that it supports.

A feature that llama.cpp would compute differently is an error that names it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.families import hf_fields
from minigpt.checkpoint.long_rope import ORIGINAL_CONTEXT
from minigpt.checkpoint.sliding_windows import SLIDING
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.layers import rotary_table

_WRITTEN = """
    vocab_size context_length n_layer n_head d_model arch family n_kv_head d_head d_mlp activation
    attention qk_norm attention_bias mlp_bias rope_theta norm_eps tie_embeddings dropout model_type
    hf_fields
"""  # other fields must have their defaults, except those of RoPE
_WINDOWS = ("sliding_window", "layer_types", "use_sliding_window")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Features of a model type that an architecture of llama.cpp supports."""

    name: str
    activations: tuple[str, ...] = ("silu",)
    """Supported values of ModelConfig.activation."""
    biases: tuple[str, ...] = ("none",)
    """Supported values of ModelConfig.attention_bias."""
    has_mlp_biases: bool = False
    hf_fields: tuple[str, ...] = ()
    """Supported ``hf_fields`` besides those of sliding windows."""
    has_windows: bool = False
    """Whether sliding windows per layer are supported."""
    has_divisors: bool = False
    """Whether divisors of the RoPE frequencies are read."""
    has_long_rope: bool = False
    """Whether the factors of LongRoPE are read."""
    has_free_width: bool = True
    """Whether n_head * d_head may differ from d_model."""
    interleaved_rope: bool = False
    """Whether RoPE rotates adjacent dimensions instead of two halves."""
    head: str = "optional"
    """Output projection in the file: ``optional`` if tied, or always ``needed`` or ``tied``."""
    norm_shift: float = 0.0
    """Constant added to the weights of norms."""
    check: Callable[[ModelConfig], None] = lambda _: None
    """Function that raises CheckpointError if one of ``hf_fields`` has an unsupported value."""


def _refusal(what: str, why: str = "") -> CheckpointError:
    why = f"{why}. " if why else ""
    return CheckpointError(
        f"export to GGUF does not support {what}. {why}Export another model, or use this one with "
        "minigpt or transformers."
    )


def _check_gemma2(config: ModelConfig) -> None:
    _check_scale(config)
    if SLIDING not in hf_fields(config)["layer_types"]:
        raise _refusal("a gemma2 layout without sliding layers", "llama.cpp always has some")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if not hf_fields(config).get(name):
            raise _refusal(f"a gemma2 layout without {name}", "llama.cpp always applies it")


def _check_gemma3(config: ModelConfig) -> None:
    _check_scale(config)
    if config.rope_scaling == "yarn" and config.rope_scaling_factor != 1:
        raise _refusal(
            "rope_scaling yarn in the gemma3 layout", "llama.cpp would scale sliding layers too"
        )


def _check_scale(config: ModelConfig) -> None:
    """Check the scale of the scores, which llama.cpp derives from the shape of a model."""
    is_27b = config.n_layer == (46 if config.model_type == "gemma2" else 62)
    expected = config.d_model // config.n_head if is_27b else config.d_head
    found = hf_fields(config).get("query_pre_attn_scalar", 256)
    if found != expected:
        raise _refusal(
            f"query_pre_attn_scalar {found} in the {config.model_type} layout",
            f"llama.cpp always uses {expected} for a model of this shape",
        )


def _check_smollm3(config: ModelConfig) -> None:
    has_rope = list(map(bool, hf_fields(config).get("no_rope_layers", [1])))
    if has_rope[: config.n_layer] != [(i + 1) % 4 != 0 for i in range(config.n_layer)]:
        raise _refusal(
            f"no_rope_layers {str(has_rope)[:60]} in the smollm3 layout",
            "llama.cpp always omits RoPE in every fourth layer",
        )


_LLAMA = Architecture(
    name="llama",
    biases=("none", "qkv", "all"),
    has_mlp_biases=True,
    has_divisors=True,
    has_long_rope=True,
    interleaved_rope=True,
)
_GEMMA = Architecture(name="gemma", activations=("gelu_tanh",), head="tied", norm_shift=1.0)
_GEMMA_FIELDS = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping")
ARCHITECTURES = {
    "gpt2": Architecture(
        name="gpt2", activations=("gelu_tanh",), biases=("none", "qkv", "all"), has_mlp_biases=True
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(name="qwen2", biases=("qkv",), has_free_width=False),
    "qwen3": Architecture(name="qwen3"),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA, name="gemma2", has_windows=True, hf_fields=_GEMMA_FIELDS, check=_check_gemma2
    ),
    "gemma3_text": replace(
        _GEMMA,
        name="gemma3",
        head="optional",
        has_windows=True,
        hf_fields=(*_GEMMA_FIELDS, "rope_local_base_freq"),
        check=_check_gemma3,
    ),
    "gpt_neox": Architecture(
        name="gptneox",
        activations=("gelu", "gelu_tanh"),
        biases=("all",),
        has_mlp_biases=True,
        has_free_width=False,
        head="needed",
        hf_fields=("rotary_pct", "use_parallel_residual", "attention_bias"),
    ),
    "olmo2": Architecture(name="olmo2", has_free_width=False, head="needed"),
    "phi3": Architecture(
        name="phi3", has_free_width=False, has_long_rope=True, hf_fields=("partial_rotary_factor",)
    ),
    "smollm3": Architecture(
        name="smollm3", interleaved_rope=True, hf_fields=("no_rope_layers",), check=_check_smollm3
    ),
}
"""Model type -> architecture."""


def architecture_of(config: ModelConfig) -> Architecture:
    """Return the architecture of llama.cpp that computes a model.

    Raises: CheckpointError if there is none.
    """
    if config.model_type not in ARCHITECTURES:
        raise _refusal(f"models of type {config.kind!r}")
    architecture = ARCHITECTURES[config.model_type]
    layout = f"in the {architecture.name} layout"
    if config.activation not in architecture.activations:
        raise _refusal(
            f"the activation {config.activation!r} {layout}",
            f"llama.cpp always computes {architecture.activations[-1]}",
        )
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name.startswith("rope_") or f.name in _WRITTEN.split() or value == f.default:
            continue
        raise _refusal(
            f"{f.name} {', '.join(value) if isinstance(value, tuple) else value} {layout}"
        )
    for name, value in hf_fields(config).items():
        if name not in (*architecture.hf_fields, *_WINDOWS, "rope_scaling"):
            raise _refusal(f"config.json with {name}={value} {layout}")
    if not architecture.has_free_width and config.n_head * config.d_head != config.d_model:
        raise _refusal(
            f"{config.n_head} heads of {config.d_head} with a width of {config.d_model} {layout}"
        )
    if config.family == "llama" and config.attention_bias not in architecture.biases:
        raise _refusal(f"attention_bias {config.attention_bias} {layout}")
    if config.mlp_bias and not architecture.has_mlp_biases:
        raise _refusal(f"biases of the MLP {layout}")
    if architecture.head == "tied" and not config.tie_embeddings:
        raise _refusal(f"an output projection that is not tied to the embedding {layout}")
    _check_rope(config, architecture)
    architecture.check(config)
    return architecture


def _check_rope(config: ModelConfig, architecture: Architecture) -> None:
    kind = config.rope_scaling
    layout = f"in the {architecture.name} layout"
    if "rope_scaling" in hf_fields(config) and not architecture.has_long_rope:
        raise _refusal(f"rope_scaling longrope {layout}", "llama.cpp does not read its factors")
    if config.family == "gpt2" or config.rope_scaling_factor == 1 or architecture.has_divisors:
        if kind == "dynamic" and config.rope_scaling_factor != 1:
            raise _refusal(
                "rope_scaling dynamic", "llama.cpp does not change frequencies with the length"
            )
        return
    if not _is_native(config):
        what: str = kind
        if kind == "yarn":
            what += f" with beta_fast {config.rope_beta_fast:g}, beta_slow "
            what += f"{config.rope_beta_slow:g} and truncate {str(config.rope_truncate).lower()}"
        raise _refusal(
            f"rope_scaling {what}, by {config.rope_scaling_factor:g}, {layout}",
            "llama.cpp does not support it",
        )


def _context_of(config: ModelConfig, architecture: Architecture) -> tuple[int, list[str]]:
    """Return the context length to write, and notes on how llama.cpp's results differ.

    If llama.cpp has no windows, the context is as long as the window, which then hides nothing.
    """
    hf, notes = hf_fields(config), []
    window = hf.get("sliding_window") or config.context_length
    original = hf.get("rope_scaling", {}).get(ORIGINAL_CONTEXT, config.context_length)
    length = min(original, config.context_length)
    types = hf.get("layer_types") or [SLIDING]
    if not architecture.has_windows and SLIDING in types and window < length:
        length = window
        notes.append(
            f"the context in the file is {window} tokens, the length of the sliding window, "
            f"because llama.cpp has no windows in the {architecture.name} layout"
        )
    if config.model_type == "gpt_neox" and config.activation == "gelu":
        notes.append("llama.cpp computes the tanh form of GELU, which differs by up to 0.0005")
    if original < config.context_length:
        notes.append(
            f"the context in the file is the original one, {original} tokens; with a larger -c, "
            "llama.cpp uses the long factors of LongRoPE for short texts too"
        )
    return length, notes


def add_metadata(writer: Any, config: ModelConfig, architecture: Architecture) -> list[str]:
    """Write a model's metadata; return notes on how llama.cpp's results differ."""
    context_length, notes = _context_of(config, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.d_mlp)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    if config.family == "gpt2" or config.model_type == "gpt_neox":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.family != "gpt2":
        _add_rope_and_scores(writer, config, architecture)
    return notes


def _add_rope_and_scores(writer: Any, config: ModelConfig, architecture: Architecture) -> None:
    hf = hf_fields(config)
    writer.add_key_length(config.d_head)
    writer.add_value_length(config.d_head)
    share = hf.get("rotary_pct", hf.get("partial_rotary_factor", 1.0))
    writer.add_rope_dimension_count(int(config.d_head * share))
    writer.add_rope_freq_base(config.rope_theta)
    _add_rope_scaling(writer, config)
    if config.model_type == "gpt_neox":
        writer.add_parallel_residual(hf.get("use_parallel_residual", True))
    if "attn_logit_softcapping" in hf:
        writer.add_attn_logit_softcapping(hf["attn_logit_softcapping"])
    if hf.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(hf["final_logit_softcapping"])
    types = hf.get("layer_types") or [SLIDING] * config.n_layer
    if architecture.has_windows and hf.get("sliding_window") and SLIDING in types:
        writer.add_sliding_window(hf["sliding_window"])
        writer.add_sliding_window_pattern([kind == SLIDING for kind in types])
    if "rope_local_base_freq" in hf:
        writer.add_rope_freq_base_swa(hf["rope_local_base_freq"])


def _add_rope_scaling(writer: Any, config: ModelConfig) -> None:
    from gguf import RopeScalingType

    hf, factor = hf_fields(config), config.rope_scaling_factor
    if "rope_scaling" in hf:
        writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
        writer.add_rope_scaling_attn_factors(hf["rope_scaling"]["attention_factor"])
        writer.add_rope_scaling_orig_ctx_len(hf["rope_scaling"][ORIGINAL_CONTEXT])
    elif config.rope_scaling == "linear" and factor != 1:
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    elif config.rope_scaling == "yarn" and not _is_by_divisors(config):
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_context)
        usual = 1 + 0.1 * math.log(factor) if factor > 1 else 1.0  # llama.cpp multiplies by it
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor / usual)
    elif config.rope_scaling == "yarn":
        writer.add_rope_scaling_attn_factors(config.rope_attention_factor)


def _is_by_divisors(config: ModelConfig) -> bool:
    """Return whether RoPE is written as divisors of the frequencies, (D / 2,)."""
    return config.family != "gpt2" and config.rope_scaling_factor != 1 and not _is_native(config)


def _is_native(config: ModelConfig) -> bool:
    """Return whether llama.cpp computes this RoPE scaling itself.

    It reads the two betas of YaRN from the file for other architectures only.
    """
    is_usual = config.rope_truncate and (config.rope_beta_fast, config.rope_beta_slow) == (32, 1)
    return config.rope_scaling == "linear" or (config.rope_scaling == "yarn" and is_usual)


def extra_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the RoPE tensors that exist only in a GGUF file, by their names there."""
    scaling = hf_fields(config).get("rope_scaling")
    if scaling is not None:
        return {
            f"rope_factors_{kind}.weight": torch.tensor(scaling[f"{kind}_factor"])
            for kind in ("long", "short")
        }
    if not _is_by_divisors(config):
        return {}

    def frequencies(**changes: Any) -> Tensor:
        cos, sin = rotary_table(replace(config, context_length=2, **changes))
        return torch.atan2(sin[1], cos[1])  # the angles of position 1, which are at most 1

    return {"rope_freqs.weight": frequencies(rope_scaling_factor=1.0) / frequencies()}


def to_gguf(tensor: Tensor, name: str, config: ModelConfig, architecture: Architecture) -> Tensor:
    """Convert a tensor, given by its Hugging Face name, to llama.cpp's layout."""
    if architecture.norm_shift and name.endswith("norm.weight"):
        return tensor.float() + architecture.norm_shift
    if "query_key_value" in name:  # grouped by head -> q, k, v
        return tensor.unflatten(0, (config.n_head, 3, -1)).transpose(0, 1).flatten(0, 2)
    if architecture.interleaved_rope and (".q_proj." in name or ".k_proj." in name):
        halves = tensor.unflatten(0, (-1, 2, config.d_head // 2))  # (H, 2, D / 2, ...)
        return halves.transpose(1, 2).flatten(0, 2)
    return tensor
