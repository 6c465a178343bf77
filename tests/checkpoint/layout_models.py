"""Small models of every layout, with random weights so that no initial value hides a bug."""

from small_models import randomized

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT

LAYOUTS = {
    "gpt2-tied": {"family": "gpt2", "tie_embeddings": True, "dropout": 0.1},
    "gpt2-untied": {"family": "gpt2", "d_mlp": 40, "activation": "gelu", "norm_eps": 1e-3},
    "llama-grouped": {"n_kv_head": 2, "rope_theta": 500.0},
    "llama-tied": {"tie_embeddings": True, "activation": "relu2"},
    "llama-biased": {
        "attention_bias": "all",
        "mlp_bias": True,
        "d_head": 6,
        "rope_scaling_factor": 4.0,
        "rope_low_freq_factor": 1.5,
        "rope_original_context": 16,
    },
    "mistral": {"model_type": "mistral", "n_kv_head": 2},
    "qwen2": {"attention_bias": "qkv", "n_kv_head": 2, "rope_theta": 1e6},
    "qwen3": {"qk_norm": True, "n_kv_head": 1, "d_head": 6, "norm_eps": 1e-4},
    "qwen3-biased": {"qk_norm": True, "attention_bias": "all", "tie_embeddings": True},
}


def make_model(vocab_size: int, layout: str) -> GPT:
    config = ModelConfig(
        vocab_size=vocab_size,
        context_length=32,
        n_layer=2,
        n_head=4,
        d_model=16,
        **LAYOUTS[layout],
    )
    model = GPT(config)
    return randomized(model, std=0.5)


_SHAPE = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_LLAMA = _SHAPE | {"model_type": "llama", "head_dim": 8}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 3.0, 4.0],
}
_GEMMA2 = _SHAPE | {
    "model_type": "gemma2",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 9,
}
_GEMMA3 = _SHAPE | {
    "model_type": "gemma3_text",
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 9,
    "sliding_window_pattern": 2,
    "rope_local_base_freq": 100.0,
    "rope_theta": 5000.0,
}
_NEOX = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"} | {"model_type": "gpt_neox"}
_PHI3 = _SHAPE | {"model_type": "phi3", "sliding_window": None}
OTHER_FAMILIES = {
    "gemma": _SHAPE | {"model_type": "gemma", "head_dim": 12, "tie_word_embeddings": True},
    "gemma2": _GEMMA2 | {"tie_word_embeddings": True},
    "gemma2-types": _GEMMA2
    | {
        "tie_word_embeddings": True,
        "layer_types": ["full_attention"] + 3 * ["sliding_attention"],
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 4.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "gemma3": _GEMMA3 | {"tie_word_embeddings": True},
    "gemma3-linear": _GEMMA3
    | {
        "tie_word_embeddings": False,
        "final_logit_softcapping": 5.0,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
    "gemma3-full": _GEMMA3 | {"tie_word_embeddings": True, "sliding_window_pattern": 1},
    "gpt_neox": _NEOX | {"rotary_pct": 0.5, "hidden_act": "gelu_new"},
    "gpt_neox-serial": _NEOX
    | {
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "linear", "factor": 3.0},
    },
    "olmo2": _SHAPE | {"model_type": "olmo2", "rope_theta": 500.0},
    "olmo2-yarn": _SHAPE
    | {"model_type": "olmo2", "tie_word_embeddings": True, "rope_scaling": _YARN},
    "phi3": _PHI3,
    "phi3-partial": _PHI3 | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    "phi3-long": _PHI3
    | {
        "partial_rotary_factor": 0.75,
        "rope_scaling": _LONG,
        "original_max_position_embeddings": 256,
        "max_position_embeddings": 1024,
    },
    "smollm3": _SHAPE | {"model_type": "smollm3", "rope_theta": 500.0},
    "smollm3-untied": _SHAPE
    | {
        "model_type": "smollm3",
        "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "llama-linear": _LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama-long": _LLAMA
    | {
        "rope_scaling": _LONG
        | {
            "short_factor": [1.0, 1.5, 2.0, 3.0],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
            "original_max_position_embeddings": 256,  # llama.cpp rounds contexts up to 256
        },
        "max_position_embeddings": 1024,
    },
    "llama-yarn": _LLAMA | {"rope_scaling": _YARN | {"beta_slow": 0.1, "attention_factor": 1.3}},
    "llama-yarn-exact": _LLAMA | {"rope_scaling": _YARN | {"truncate": False, "factor": 8.0}},
    "qwen2-yarn": _SHAPE
    | {"model_type": "qwen2", "rope_scaling": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    "qwen3-linear": _SHAPE
    | {
        "model_type": "qwen3",
        "head_dim": 16,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "mistral-window": _SHAPE | {"model_type": "mistral", "sliding_window": 100},
}
"""config.json without vocab_size, of other model families that GGUF supports."""
