"""Qwen2: Llama with biases of queries, keys and values."""

from dataclasses import replace

from minigpt.checkpoint.families import llama

DEFAULTS = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
"""Defaults that Qwen3 shares."""

FAMILY = replace(
    llama.FAMILY,
    architecture="Qwen2ForCausalLM",
    fields=llama.FIELDS,
    defaults=llama.DEFAULTS | DEFAULTS,
    fixed=llama.FIXED | llama.NO_BIASES,
    constants={"family": "llama", "attention_bias": "qkv"},
    written={"use_sliding_window": False, "sliding_window": None},
    windows=("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    model="checkpoint.sliding_windows:WindowedGPT",
)
