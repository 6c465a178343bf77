"""Sliding-window attention: layers whose queries attend only to the nearest positions."""

from collections.abc import Callable, Mapping
from typing import Any

from minigpt.checkpoint.families import check_count, check_fixed, hf_fields, unsupported
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT

SLIDING, _FULL = "sliding_attention", "full_attention"
_MANY_LAYERS = 10_000


class WindowedAttention(Attention):
    """Attention with a sliding window in some layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.score.window = window_of(config, layer)


class WindowedGPT(GPT):
    """GPT with sliding-window attention.

    Source: Child et al. 2019, arXiv:1904.10509; Jiang et al. 2023, arXiv:2310.06825, section 2.
    """

    attention_class: type[Attention] = WindowedAttention


def window_of(config: ModelConfig, layer: int) -> int:
    """Return the width of a layer's sliding window; 0 if it attends to all previous positions."""
    fields = hf_fields(config)
    types = fields.get("layer_types")
    slides = types is None or types[layer % len(types)] == SLIDING
    return int(fields.get("sliding_window") or 0) if slides else 0


def read_windows(config: Mapping[str, Any], window: Any, types: Any) -> dict[str, Any]:
    """Return the config.json fields that ``window_of`` reads; {} if no window hides a position.

    Args: window, width in positions, or None; types, of each layer, or None if all slide.
    Raises: CheckpointError if either is invalid.
    """
    n_layer, context = config.get("num_hidden_layers"), config.get("max_position_embeddings")
    if types is not None:
        is_list = isinstance(types, list) and all(t in (SLIDING, _FULL) for t in types)
        if not is_list or len(types) != n_layer:
            raise unsupported("layer_types", types, f"{SLIDING} or {_FULL} for each layer")
        if SLIDING not in types:
            return {}
        if window is None:
            raise unsupported("sliding_window", window, f"a number for {SLIDING} layers")
    if window is None:
        return {}
    check_count("sliding_window", window)
    if isinstance(context, int) and window >= context:
        return {}
    return {"sliding_window": window} | ({} if types is None else {"layer_types": types})


def sliding_layers(n_layer: Any, slides: Callable[[int], bool]) -> list[str]:
    """Return the layer types: sliding_attention where ``slides`` returns True for the index."""
    n_layer = n_layer if type(n_layer) is int and n_layer <= _MANY_LAYERS else 0
    return [SLIDING if slides(i) else _FULL for i in range(n_layer)]


def read_fields(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Llama-like config.json that ``window_of`` reads.

    Args: given, the sliding-window fields that the family reads, with its defaults.
    """
    n_layer = config.get("num_hidden_layers")
    if "layer_types" not in given and type(n_layer) is int:
        has_window = given.get("sliding_window") is not None
        alike = sliding_layers(n_layer, lambda _: has_window)
        check_fixed("layer_types", config.get("layer_types"), alike)
    if not given:
        return {}
    window, types = given["sliding_window"], given.get("layer_types")
    if "use_sliding_window" not in given:  # as in Mistral, where every layer has the window
        return read_windows(config, window, None)
    if not given["use_sliding_window"]:
        window = None
    elif types is None:
        first = given["max_window_layers"]
        if type(first) is not int:
            raise unsupported("max_window_layers", first, "an integer")
        types = sliding_layers(n_layer, lambda i: i >= first)
    fields = read_windows(config, window, types)
    return fields and fields | {"use_sliding_window": True}
