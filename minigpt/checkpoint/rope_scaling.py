"""RoPE scaling of published models: convert between config.json and ModelConfig."""

import math
from collections.abc import Mapping
from typing import Any

from minigpt.checkpoint.families import is_positive, unsupported
from minigpt.checkpoint.long_rope import LONGROPE, ORIGINAL_CONTEXT, read_long_rope
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError

_ROPE_FIELDS = {
    "linear": {},
    "dynamic": {},
    "llama3": {
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_context": ORIGINAL_CONTEXT,
    },
    "yarn": {
        "rope_beta_fast": "beta_fast",
        "rope_beta_slow": "beta_slow",
        "rope_attention_factor": "attention_factor",
        "rope_original_context": ORIGINAL_CONTEXT,
    },
}
"""Method of RoPE scaling -> ModelConfig field -> config.json key, without the factor."""


def read_scaling(
    rope: Mapping[str, Any], name: str, config: Mapping[str, Any], share: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the ModelConfig fields of scaled RoPE, and the supported value of each key.

    Args: rope, the field ``name`` of config.json; share, rotated fraction of each head.
    Raises: CheckpointError for an unknown method, or a missing key.
    """
    kind = rope.get("rope_type", rope.get("type"))
    if kind == LONGROPE:
        scaling = read_long_rope(rope, name, config, share)
        return {"hf_fields": {"rope_scaling": scaling}}, dict(rope)
    if not isinstance(kind, str) or kind not in _ROPE_FIELDS:
        raise unsupported(
            f"{name}.rope_type", kind, f"default, longrope, {', '.join(_ROPE_FIELDS)}"
        )
    context = config.get("max_position_embeddings")
    given = {ORIGINAL_CONTEXT: context, **rope}
    # transformers prefers the top-level field of config.json.
    given |= (
        {ORIGINAL_CONTEXT: config[ORIGINAL_CONTEXT]}
        if config.get(ORIGINAL_CONTEXT) is not None
        else {}
    )
    keys = {"rope_scaling_factor": "factor"} | _ROPE_FIELDS[kind]
    known = {key: rope.get(key) for key in keys.values()}
    values: dict[str, Any] = {"rope_scaling": kind}
    if kind == "dynamic":
        known[ORIGINAL_CONTEXT] = context
    if kind == "yarn":
        given = _yarn_defaults(name, given)
        values["rope_truncate"] = bool(rope.get("truncate", True))
        known |= {key: rope.get(key) for key in ("mscale", "mscale_all_dim")}
        known |= {"truncate": values["rope_truncate"]}
    for ours, theirs in keys.items():
        if given.get(theirs) is None:
            raise CheckpointError(f"{name}.{theirs} is missing. Download config.json again.")
        values[ours] = given[theirs]
    return values, known


def _yarn_defaults(name: str, rope: dict[str, Any]) -> dict[str, Any]:
    """Add YaRN's defaults as in transformers: attention factor, and the paper's two betas."""
    rope = {"beta_fast": 32.0, "beta_slow": 1.0} | {k: v for k, v in rope.items() if v}
    factor = rope.get("factor")
    if rope.get("attention_factor") is not None or factor is None:
        return rope
    scales = [rope[key] for key in ("mscale", "mscale_all_dim") if key in rope]
    for value in (factor, *scales):
        if not is_positive(value):
            raise unsupported(
                f"{name}.factor, mscale or mscale_all_dim", value, "a positive number"
            )
    scales = scales if len(scales) == 2 else [1.0, 0.0]
    above, below = (1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1 for scale in scales)
    return rope | {"attention_factor": above / below}


def write_scaling(config: ModelConfig) -> dict[str, Any]:
    """Return the rope_scaling field of config.json."""
    keys = {"rope_scaling_factor": "factor"} | _ROPE_FIELDS[config.rope_scaling]
    scaling = {theirs: getattr(config, ours) for ours, theirs in keys.items()}
    scaling |= {} if config.rope_truncate else {"truncate": False}
    return {"rope_type": config.rope_scaling} | scaling
