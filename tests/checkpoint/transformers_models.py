"""Configs of tiny models that transformers makes, and pairs of them opened by both programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.model_folder import LoadedModel

CONTEXT = 96
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
QWEN2 = LLAMA | {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 8}
QWEN3 = LLAMA | {"model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16}
MISTRAL = LLAMA | {"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": None}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
KINDS: dict[str, dict[str, Any]] = {
    "gpt2-tied": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 40},
    "gpt2-gelu": GPT2 | {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "llama-1": LLAMA | {"num_key_value_heads": 1, "rms_norm_eps": 1e-3},
    "llama-2": LLAMA | {"num_key_value_heads": 2, "rope_theta": 50.0},
    "llama-4": LLAMA | {"num_key_value_heads": 4, "hidden_act": "gelu_pytorch_tanh"},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "llama-tied": LLAMA | {"tie_word_embeddings": True},
    "llama-3": LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 12},
    "mistral": MISTRAL,
    "mistral-window": MISTRAL | {"sliding_window": CONTEXT, "head_dim": 12},
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | {"tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": QWEN3,
    "gpt2-relu": GPT2 | {"activation_function": "relu"},
    "gpt2-quick-gelu": GPT2 | {"activation_function": "quick_gelu"},
    "gpt2-unscaled": GPT2 | {"scale_attn_weights": False},
    "gpt2-by-layer": GPT2 | {"scale_attn_by_inverse_layer_idx": True},
    "llama-linear": LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "llama-dynamic": LLAMA | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    "llama-yarn": LLAMA | {"rope_parameters": YARN | {"rope_theta": 500.0}, "head_dim": 16},
    "llama-yarn-not-truncated": LLAMA
    | {"rope_parameters": YARN | {"truncate": False}, "head_dim": 16},
    "qwen3-yarn": QWEN3 | {"rope_parameters": YARN | {"beta_fast": 8.0, "attention_factor": 1.3}},
    "qwen3-yarn-mscale": QWEN3 | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}},
    "mistral-short-window": MISTRAL | {"sliding_window": 7},
    "qwen2-short-window": QWEN2 | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2-window-nowhere": QWEN2 | {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3-biases": QWEN3 | {"attention_bias": True, "tie_word_embeddings": True},
}
# Families with their own class.
DEEP = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
    "num_hidden_layers": 3,
    "pad_token_id": 0,
}
NEOX = DEEP | {"model_type": "gpt_neox"}
GEMMA = DEEP | {"model_type": "gemma", "num_key_value_heads": 2, "head_dim": 16}
GEMMA2 = GEMMA | {"model_type": "gemma2", "sliding_window": 9, "query_pre_attn_scalar": 9}
GEMMA3 = GEMMA2 | {"model_type": "gemma3_text"}
SMOLLM3 = DEEP | {"model_type": "smollm3", "num_key_value_heads": 2}
PHI3 = DEEP | {"model_type": "phi3", "num_key_value_heads": 2}
OLMO2 = DEEP | {"model_type": "olmo2", "num_key_value_heads": 2}
OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
NEO = {
    "model_type": "gpt_neo",
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": CONTEXT,
    "attention_types": [[["global", "local"], 1], [["local"], 1]],
    "window_size": 9,
}
ORIGINAL_CONTEXT = {"original_max_position_embeddings": CONTEXT // 2}
LONG = {"rope_type": "longrope", "short_factor": [1.1, 2.0], "long_factor": [3.0, 9.0]}
KINDS |= {
    "neox": NEOX,
    "neox-half": NEOX | {"rotary_pct": 0.5, "rotary_emb_base": 500, "hidden_act": "relu"},
    "neox-serial": NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True},
    "neox-unbiased": NEOX | {"attention_bias": False, "rotary_pct": 1.0},
    "neox-linear": NEOX | {"rope_parameters": {"rope_type": "linear", "factor": 3.0}},
    "gemma": GEMMA,
    "gemma-biased": GEMMA | {"attention_bias": True, "tie_word_embeddings": False},
    "gemma2": GEMMA2 | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2-uncapped": GEMMA2
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 200},
    "gemma3": GEMMA3 | {"sliding_window_pattern": 3},
    "gemma3-by-layer": GEMMA3
    | {
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        "final_logit_softcapping": 3.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "gemma3-yarn": GEMMA3
    | {
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "smollm3": SMOLLM3 | {"no_rope_layer_interval": 2},
    "smollm3-window": SMOLLM3
    | {"no_rope_layers": [0, 1, 0], "use_sliding_window": True, "sliding_window": 9},
    "phi3": PHI3,
    "phi3-window": PHI3 | {"sliding_window": 9, "num_key_value_heads": 4},
    "phi3-partial": PHI3 | {"rope_parameters": {"partial_rotary_factor": 0.75}},
    "phi3-long": PHI3
    | {
        "rope_parameters": LONG | {"partial_rotary_factor": 0.5},
        "original_max_position_embeddings": CONTEXT - 5,
        "max_position_embeddings": 4 * CONTEXT,
    },
    "phi3-short": PHI3 | {"rope_parameters": LONG | {"partial_rotary_factor": 0.5}},
    "llama-long": LLAMA
    | {"head_dim": 4, "rope_parameters": LONG | {"rope_theta": 50.0} | ORIGINAL_CONTEXT},
    "llama-long-factor": LLAMA
    | {
        "head_dim": 4,
        "rope_parameters": LONG | ORIGINAL_CONTEXT | {"factor": 3.0, "attention_factor": 1.5},
    },
    "mistral-long": MISTRAL
    | {"head_dim": 4, "sliding_window": 7, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "qwen3-long": QWEN3 | {"head_dim": 4, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "olmo2-long": OLMO2 | {"head_dim": 4, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "smollm3-long": SMOLLM3 | {"head_dim": 4, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "gemma2-long": GEMMA2 | {"head_dim": 4, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "gemma3-long": GEMMA3
    | {
        "head_dim": 4,
        "sliding_window_pattern": 2,
        "rope_parameters": {
            "full_attention": LONG | ORIGINAL_CONTEXT | {"rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "neox-long": NEOX | {"rotary_pct": 0.5, "rope_parameters": LONG | ORIGINAL_CONTEXT},
    "neo": NEO,
    "neo-local": NEO | {"attention_types": [[["local"], 3]], "tie_word_embeddings": False},
    "neo-wide": NEO | {"intermediate_size": 40, "activation_function": "relu", "window_size": 1},
    "opt": OPT,
    "opt-untied": OPT | {"tie_word_embeddings": False, "activation_function": "gelu"},
    "olmo2": OLMO2,
    "olmo2-biased": OLMO2 | {"attention_bias": True, "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Pair:
    """A model folder opened by minigpt and by transformers."""

    folder: Path
    theirs: Any
    ours: LoadedModel


def has_long_rope(pair: Pair) -> bool:
    return any("longrope" in field for field in pair.ours.model.config.hf_fields)


TOKENS = torch.randint(61, (2, CONTEXT), generator=torch.Generator().manual_seed(9))
