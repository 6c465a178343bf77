"""OPT: GPT-2 with ReLU, and an offset of 2 in its position embeddings."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from minigpt.checkpoint.families import ACTIVATIONS, BOTH, Family, TensorName, same, unsupported
from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT

_NO_EFFECT = "activation_dropout attention_dropout embd_pdrop layerdrop word_embed_proj_dim"
_OFFSET = 2  # the first rows are for padding


class OffsetEmbedding(nn.Embedding):
    """Position embeddings whose first rows are unused."""

    def forward(self, positions: Tensor) -> Tensor:
        return super().forward(positions + _OFFSET)


class OPTGPT(GPT):
    """OPT, except the 350M model, which is post-norm.

    Source: Zhang et al. 2022, arXiv:2205.01068.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.positions = OffsetEmbedding(config.context_length + _OFFSET, config.d_model)


class OPTFamily(Family):
    """The OPT layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        width, embedded = config.get("hidden_size"), config.get("word_embed_proj_dim")
        if embedded not in (None, width):
            raise unsupported("word_embed_proj_dim", embedded, width)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"word_embed_proj_dim": config.d_model}

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        theirs, ours = "layers.{i}", "blocks.{i}"
        yield from same("embed_tokens", "embedding")
        yield from same("embed_positions", "positions")
        yield from same(f"{theirs}.self_attn_layer_norm", f"{ours}.attention_norm", *BOTH)
        for name in ("query", "key", "value"):
            part = f"{theirs}.self_attn.{name[0]}_proj"
            yield from same(part, f"{ours}.attention.{name}", *BOTH)
        yield from same(f"{theirs}.self_attn.out_proj", f"{ours}.attention.output", *BOTH)
        yield from same(f"{theirs}.final_layer_norm", f"{ours}.mlp_norm", *BOTH)
        yield from same(f"{theirs}.fc1", f"{ours}.mlp.up", *BOTH)
        yield from same(f"{theirs}.fc2", f"{ours}.mlp.down", *BOTH)
        yield from same("final_layer_norm", "final_norm", *BOTH)


FAMILY = OPTFamily(
    architecture="OPTForCausalLM",
    prefix="model.decoder.",
    fields={
        "vocab_size": "vocab_size",
        "context_length": "max_position_embeddings",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "d_model": "hidden_size",
        "d_mlp": "ffn_dim",
        "activation": "activation_function",
        "tie_embeddings": "tie_word_embeddings",
        "dropout": "dropout",
    },
    activations={"relu": "relu", **ACTIVATIONS},
    defaults={
        "activation_function": "relu",
        "ffn_dim": 3072,
        "tie_word_embeddings": True,
        "dropout": 0.1,
    },
    fixed={
        "_remove_final_layer_norm": False,
        "do_layer_norm_before": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
    },
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "gpt2", "norm_eps": 1e-5},
    written={"attention_dropout": 0.0},
    model=OPTGPT,
)
