"""Qwen3: Llama with RMSNorm on the queries and keys of each head."""

from dataclasses import replace

from minigpt.checkpoint.families import llama, qwen2

FAMILY = replace(
    qwen2.FAMILY,
    architecture="Qwen3ForCausalLM",
    fields=llama.FIELDS | {"attention_bias": "attention_bias"},
    defaults={**qwen2.FAMILY.defaults, "head_dim": 128},
    fixed=llama.FIXED | {"mlp_bias": False},
    constants={"family": "llama", "qk_norm": True},
)
