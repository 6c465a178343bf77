"""GPT-2: LayerNorm, learned positions, fused Conv1D projections."""

from collections.abc import Iterator, Mapping
from typing import Any

from minigpt.checkpoint.families import ACTIVATIONS, BOTH, Family, TensorName, check_flag, same
from minigpt.config import ModelConfig

# Other dropout probabilities only matter in training, where we do not use them.
_NO_EFFECT = """
    attn_pdrop embd_pdrop n_ctx predict_special_tokens reorder_and_upcast_attn scale_attn_weights
    scale_attn_by_inverse_layer_idx summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj
"""


def _conv1d(theirs: str, *ours: str) -> Iterator[TensorName]:
    yield TensorName(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), True)
    yield TensorName(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours))


class GPT2Family(Family):
    """The GPT-2 layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        usual = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
        for name in usual:
            check_flag(name, config.get(name))
        other = {n: config[n] for n in usual if config.get(n) not in (None, usual[n])}
        return {"hf_fields": other}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"n_ctx": config.context_length}  # llama.cpp's converter reads it

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        qkv = [f"blocks.{{i}}.attention.{name}" for name in ("query", "key", "value")]
        yield from same("wte", "embedding")
        yield from same("wpe", "positions")
        yield from same("h.{i}.ln_1", "blocks.{i}.attention_norm", *BOTH)
        yield from _conv1d("h.{i}.attn.c_attn", *qkv)
        yield from _conv1d("h.{i}.attn.c_proj", "blocks.{i}.attention.output")
        yield from same("h.{i}.ln_2", "blocks.{i}.mlp_norm", *BOTH)
        yield from _conv1d("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up")
        yield from _conv1d("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down")
        yield from same("ln_f", "final_norm", *BOTH)


FAMILY = GPT2Family(
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    fields={
        "vocab_size": "vocab_size",
        "context_length": "n_positions",
        "n_layer": "n_layer",
        "n_head": "n_head",
        "d_model": "n_embd",
        "d_mlp": "n_inner",
        "activation": "activation_function",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "resid_pdrop",
    },
    activations={"gelu_new": "gelu_tanh", **ACTIVATIONS},
    defaults={
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
    },
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "gpt2"},
    written={"attn_pdrop": 0.0},
    model="checkpoint.rescaled_attention:RescaledGPT",
)
