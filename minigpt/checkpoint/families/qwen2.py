"""Qwen2: Llama with biases on queries, keys and values."""

from dataclasses import replace

from minigpt.checkpoint.families import llama, qwen3

FAMILY = replace(
    qwen3.FAMILY,
    architecture="Qwen2ForCausalLM",
    fields=llama.FIELDS,
    defaults=qwen3.DEFAULTS,
    fixed=llama.FIXED | llama.NO_BIASES,
    constants={"family": "llama", "attention_bias": "qkv"},
)
