"""A small config of each model family with its own class."""

from typing import Any

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}

GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 16}

GEMMA2 = GROUPED | {"model_type": "gemma2", "sliding_window": 5, "attn_logit_softcapping": 2.0}

CONFIGS: dict[str, dict[str, Any]] = {
    "gpt_neox": SHAPE | {"model_type": "gpt_neox"},
    "gemma": GROUPED | {"model_type": "gemma"},
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA2 | {"model_type": "gemma3_text", "attn_logit_softcapping": None},
    "smollm3": SHAPE | {"model_type": "smollm3", "no_rope_layer_interval": 2},
    "phi3": SHAPE | {"model_type": "phi3", "sliding_window": 5, "partial_rotary_factor": 0.5},
    "olmo2": SHAPE | {"model_type": "olmo2"},
    "mistral": GROUPED | {"model_type": "mistral", "sliding_window": 5},
    "opt": {
        "model_type": "opt",
        "vocab_size": 61,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
    },
    "gpt_neo": {
        "model_type": "gpt_neo",
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 40,
        "attention_types": [[["local", "global"], 1], [["local"], 1]],
        "window_size": 5,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 40,
        "scale_attn_by_inverse_layer_idx": True,
    },
}
