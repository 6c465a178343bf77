"""Models for comparison: LSTMs, and attention scores other than the scaled dot product."""

from typing import TYPE_CHECKING

from minigpt.fields import require

if TYPE_CHECKING:
    from minigpt.config import ModelConfig


def check_lstm(config: "ModelConfig") -> None:
    """Check that a config's settings are valid for its architecture, one of the LSTMs.

    Raises: ConfigError for a setting that is not.
    """
    has_none = config.arch == "lstm"
    require(
        has_none == (config.attention == "none"),
        f"attention {config.attention} does not go with arch {config.arch}. Leave attention out, "
        f"or choose arch {'lstm-attention' if has_none else 'lstm'}.",
    )
    fixed = {"family": "llama", "n_head": 1, "n_kv_head": 1, "d_head": config.d_model}
    fixed |= {"d_mlp": 4 * config.d_model, "qk_norm": False, "attention_bias": "none"}
    for name, only in (fixed | {"mlp_bias": False}).items():
        require(
            getattr(config, name) == only,
            f"with arch {config.arch}, {name} can only be {only}: it is {getattr(config, name)}. "
            "Leave it out.",
        )
