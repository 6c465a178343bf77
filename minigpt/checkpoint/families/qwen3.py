"""Qwen3: Llama with RMSNorm on the queries and keys of each head, and sliding windows."""

from dataclasses import replace

from minigpt.checkpoint.families import llama

DEFAULTS = llama.DEFAULTS | {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
"""Defaults that Qwen2 shares."""

FAMILY = replace(
    llama.FAMILY,
    architecture="Qwen3ForCausalLM",
    fields=llama.FIELDS | {"attention_bias": "attention_bias"},
    defaults=DEFAULTS | {"head_dim": 128},
    fixed=llama.FIXED | {"mlp_bias": False},
    constants={"family": "llama", "qk_norm": True},
    written={"use_sliding_window": False, "sliding_window": None},
    windows=("sliding_window", "use_sliding_window", "layer_types", "max_window_layers"),
    model="checkpoint.sliding_windows:WindowedGPT",
)
