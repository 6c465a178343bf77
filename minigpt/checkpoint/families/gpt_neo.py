"""GPT-Neo, used by TinyStories: GPT-2 with sliding windows in some layers and unscaled scores."""

from collections.abc import Iterator, Mapping
from typing import Any

from minigpt.checkpoint.families import (
    BOTH,
    Family,
    TensorName,
    check_count,
    gpt2,
    hf_fields,
    same,
    unsupported,
)
from minigpt.checkpoint.rescaled_attention import ScaledScore
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT

_NO_EFFECT = """
    attention_dropout attention_layers attention_types classifier_dropout embd_pdrop embed_dropout
    intermediate_size window_size
"""
GLOBAL, LOCAL = KINDS = ("global", "local")
_WINDOW = 256  # transformers' default
_MANY_LAYERS = 10_000


def layer_kinds(types: Any) -> list[str]:
    """Return the kind of each layer, global or local (a sliding window).

    Args: types, pairs of a list of kinds and its number of repetitions, as in
        ``[[["global", "local"], 6]]``.
    Raises: CheckpointError if it has another form.
    """
    kinds: list[str] = []
    for pair in types if isinstance(types, list) else [None]:
        match pair:
            case [list(names), int(times)] if all(name in KINDS for name in names):
                kinds += names * min(times, _MANY_LAYERS)
            case _:
                raise unsupported("attention_types", types, [[[*KINDS], 6]])
    return kinds


class NeoAttention(Attention):
    """Attention with unscaled scores, no biases of q, k and v, and windows in local layers."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        for projection in (self.query, self.key, self.value):
            projection.register_parameter("bias", None)
        self.score = ScaledScore(config, 1.0)
        fields = hf_fields(config)
        kinds = layer_kinds(fields.get("attention_types", [[[GLOBAL], 1]]))
        if kinds[layer % len(kinds)] == LOCAL:
            self.score.window = fields.get("window_size", _WINDOW)


class NeoGPT(GPT):
    """GPT-Neo.

    Source: Black et al. 2021, doi:10.5281/zenodo.5297715.
    """

    attention_class = NeoAttention


class NeoFamily(Family):
    """The GPT-Neo layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        types = config.get("attention_types")
        types = [[[*KINDS], 12]] if types is None else types
        window = config.get("window_size", _WINDOW)
        check_count("window_size", window)
        n_layer = config.get("num_layers")
        if len(layer_kinds(types)) != n_layer:
            raise unsupported("attention_types", types, f"kinds for {str(n_layer)[:20]} layers")
        width = config.get("intermediate_size")
        own = {"hf_fields": {"attention_types": types, "window_size": window}}
        return own if width is None else own | {"d_mlp": width}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "intermediate_size": config.d_mlp,
            "attention_types": [[[GLOBAL], config.n_layer]],
            "window_size": _WINDOW,
        }

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        block, attention = "blocks.{i}", "blocks.{i}.attention"
        yield from same("wte", "embedding")
        yield from same("wpe", "positions")
        yield from same("h.{i}.ln_1", f"{block}.attention_norm", *BOTH)
        for name in ("query", "key", "value"):
            yield from same(f"h.{{i}}.attn.attention.{name[0]}_proj", f"{attention}.{name}")
        yield from same("h.{i}.attn.attention.out_proj", f"{attention}.output", *BOTH)
        yield from same("h.{i}.ln_2", f"{block}.mlp_norm", *BOTH)
        yield from same("h.{i}.mlp.c_fc", f"{block}.mlp.up", *BOTH)
        yield from same("h.{i}.mlp.c_proj", f"{block}.mlp.down", *BOTH)
        yield from same("ln_f", "final_norm", *BOTH)


FAMILY = NeoFamily(
    architecture="GPTNeoForCausalLM",
    prefix="transformer.",
    fields={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "n_layer": "num_layers",
        "n_head": "num_heads",
        "d_model": "hidden_size",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_dropout",
    },
    activations=gpt2.FAMILY.activations,
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_dropout": 0.0,
    },
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "gpt2"},
    written={"attention_dropout": 0.0, "embed_dropout": 0.0},
    model=NeoGPT,
)
