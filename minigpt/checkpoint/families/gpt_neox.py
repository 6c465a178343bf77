"""GPT-NeoX, used by Pythia: LayerNorm, biases, partial RoPE, and attention parallel to the MLP."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minigpt.checkpoint.families import (
    BOTH,
    Family,
    TensorName,
    check_flag,
    head_width,
    hf_fields,
    is_positive,
    llama,
    same,
    unsupported,
)
from minigpt.config import ModelConfig
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import MLP, Rotary, rotary_table, rotate

_NO_EFFECT = """
    attention_bias attention_dropout attention_probs_dropout_prob embd_pdrop hidden_dropout_prob
    original_max_position_embeddings partial_rotary_factor rope_parameters rope_scaling rope_theta
    rotary_emb_base rotary_pct use_parallel_residual
"""


class PartialRotaryAttention(Attention):
    """Attention that rotates only the first dimensions of each head, as many as the table has."""

    def rotate(self, x_BHTD: Tensor, rotary: Rotary) -> Tensor:
        n_rotated = 2 * rotary[0].shape[-1]
        rotated, rest = x_BHTD.tensor_split([n_rotated], dim=-1)
        return torch.cat((rotate(rotated, *rotary), rest), dim=-1)


class PartialRotaryGPT(GPT):
    """GPT with RoPE on a part of each head."""

    attention_class: type[Attention] = PartialRotaryAttention

    def rotary_table(self, divisor: Tensor | None = None, scale: float = 1.0) -> Rotary:
        fields = hf_fields(self.config)
        share = fields.get("rotary_pct", fields.get("partial_rotary_factor", 1.0))
        n_rotated = rotated_width("rotary_pct", self.config.d_head, share)
        return rotary_table(replace(self.config, d_head=n_rotated), divisor, scale)


def rotated_width(name: str, d_head: int, share: Any) -> int:
    """Return the number of rotated dimensions of a head.

    Raises: CheckpointError if it is odd or zero.
    """
    n_rotated = int(d_head * share) if is_positive(share) else 0
    if not 2 <= n_rotated <= d_head or n_rotated % 2:
        raise unsupported(name, share, f"an even part of the {d_head} dimensions")
    return n_rotated


class NeoXBlock(Block):
    """Block whose MLP is parallel to the attention, or sequential as in GPT-2."""

    def __init__(self, config: ModelConfig, attention: Attention) -> None:
        super().__init__(config, attention)
        self.attention_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)
        self.mlp = MLP(config)
        self.is_parallel = hf_fields(config).get("use_parallel_residual", True)


class NeoXGPT(PartialRotaryGPT):
    """GPT-NeoX.

    Source: Black et al. 2022, arXiv:2204.06745, section 2.1.
    """

    block_class = NeoXBlock

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.final_norm = nn.LayerNorm(config.d_model, eps=config.norm_eps)


class NeoXFamily(Family):
    """The GPT-NeoX layout."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        name, rope = llama.rope_field(config)
        own = rope.get("partial_rotary_factor") if isinstance(rope, Mapping) else None
        share = config.get("rotary_pct") if own is None else own
        share = 0.25 if share is None else share
        values = llama.read_rope(rope, name, config, config.get("rotary_emb_base"), partial=share)
        # transformers 4.46 to 4.57 also writes both under these names.
        repeated = {"rope_theta": values["rope_theta"], "partial_rotary_factor": share}
        for name, value in repeated.items():
            if config.get(name) not in (None, value):
                raise unsupported(name, config[name], value)
        fields = {"rotary_pct": share}
        for flag in ("use_parallel_residual", "attention_bias"):
            value = config.get(flag)
            check_flag(flag, value)
            fields[flag] = value is not False
        values["attention_bias"] = "all" if fields["attention_bias"] else "none"
        if d_head := head_width(config):
            rotated_width("rotary_pct", d_head, share)
        return values | {"hf_fields": values.get("hf_fields", {}) | fields}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        scaling, share = llama.write_rope(config), hf_fields(config).get("rotary_pct", 0.25)
        rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": share}
        return {
            "rotary_emb_base": config.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": (scaling or {"rope_type": "default"}) | rope,
            "attention_dropout": 0.0,
        }

    def tensors(self, config: ModelConfig) -> Iterator[TensorName]:
        attention = "blocks.{i}.attention"
        qkv = [f"{attention}.{name}" for name in ("query", "key", "value")]
        biases = ("weight",) if config.attention_bias == "none" else BOTH
        yield from same("embed_in", "embedding")
        yield from same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm", *BOTH)
        yield from same("layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm", *BOTH)
        for kind in biases:
            yield TensorName(
                f"layers.{{i}}.attention.query_key_value.{kind}",
                tuple(f"{name}.{kind}" for name in qkv),
                n_groups=config.n_head,
            )
        yield from same("layers.{i}.attention.dense", f"{attention}.output", *biases)
        yield from same("layers.{i}.mlp.dense_h_to_4h", "blocks.{i}.mlp.up", *BOTH)
        yield from same("layers.{i}.mlp.dense_4h_to_h", "blocks.{i}.mlp.down", *BOTH)
        yield from same("final_layer_norm", "final_norm", *BOTH)


FAMILY = NeoXFamily(
    architecture="GPTNeoXForCausalLM",
    prefix="gpt_neox.",
    head="embed_out.weight",
    fields={
        ours: {"norm_eps": "layer_norm_eps", "dropout": "hidden_dropout"}.get(ours, theirs)
        for ours, theirs in llama.FIELDS.items()
        if ours not in ("n_kv_head", "d_head")
    },
    activations={"gelu": "gelu", **llama.FAMILY.activations},
    defaults={
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_dropout": 0.0,
    },
    no_effect=frozenset(_NO_EFFECT.split()),
    constants={"family": "llama"},
    model=NeoXGPT,
)
