"""Mistral: Llama without biases."""

from dataclasses import replace

from minigpt.checkpoint.families import llama

FAMILY = replace(
    llama.FAMILY,
    architecture="MistralForCausalLM",
    fields=llama.FIELDS,
    defaults=llama.DEFAULTS | {"num_key_value_heads": 8, "sliding_window": 4096},
    fixed=llama.FIXED | llama.NO_BIASES,
    written={"sliding_window": None},
    windows=("sliding_window",),
    model="checkpoint.sliding_windows:WindowedGPT",
)
