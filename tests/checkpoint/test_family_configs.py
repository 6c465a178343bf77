"""Published configs have the published number of parameters; unknown fields are refused."""

import json
from dataclasses import replace
from typing import Any

import pytest
from family_configs import CONFIGS

from minigpt.checkpoint.config_json import read_config_json
from minigpt.checkpoint.published_models import canonical
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.model.cost import parameter_count

SCALED = {"rope_type": "yarn", "factor": 1.0, "attention_factor": 0.5}
FACTORS = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [1.0, 1.0]}
LONG = {"rope_scaling": FACTORS, "original_max_position_embeddings": 8}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gpt_neox", {"rotary_pct": 0.4}, "rotary_pct is 0.4, .* even part of the 8 dimensions"),
    ("gpt_neox", {"rotary_pct": "x"}, "rotary_pct is 'x'"),
    ("gpt_neox", {"use_parallel_residual": 3}, "use_parallel_residual is 3"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ("gemma2", {"query_pre_attn_scalar": None}, "query_pre_attn_scalar is None"),
    ("gemma2", {"final_logit_softcapping": -1.0}, "final_logit_softcapping is -1.0"),
    ("gemma2", {"sliding_window": None}, "sliding_window is None"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters is"),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": 5}}, "sliding_attention is 5"),
    ("gemma3_text", {"rope_parameters": 7}, "rope_parameters is 7"),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
        "sliding_attention.rope_type is 'linear'",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"sliding_attention": SCALED}},
        "sliding_attention.rope_type is 'yarn'",
    ),
    ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "full_attention is 3"),
    ("gemma3_text", {"rope_scaling": 2.0}, "rope_scaling is 2.0"),
    ("gemma3_text", {"rope_scaling": 2.0, "rope_parameters": {}}, "full_attention is 2.0"),
    ("gpt_neox", {"rotary_emb_base": 500, "rope_theta": 10_000.0}, "rope_theta is 10000.0"),
    ("gpt_neox", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but only 0.25"),
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is None"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, r"short_factor is \[1.0\]"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("phi3", LONG | {"max_position_embeddings": "x"}, "context_length must be of type int"),
    ("phi3", {"rope_scaling": {"type": "su", "surprise": 2.0}}, "surprise"),
    ("phi3", {"rope_scaling": 7}, "rope_scaling is 7"),
    ("olmo2", {"clip_qkv": 8.0}, "unknown field 'clip_qkv' with value 8.0"),
    ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layer_types is"),
    ("gpt_neo", {"attention_types": [[["global"], 2]]}, "attention_types is .*3 layers"),
    ("gpt_neo", {"attention_types": [[["sparse"], 3]]}, "attention_types is"),
    ("gpt_neo", {"attention_types": [[["global"], -3]]}, "attention_types is"),
    ("gpt_neo", {"attention_types": ["global"] * 3}, "attention_types is"),
    ("gpt_neo", {"attention_types": "global"}, "attention_types is 'global'"),
    ("gpt_neo", {"window_size": 0}, "window_size is 0"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False"),
    ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim is 16, but only 32"),
    ("opt", {"enable_bias": False}, "enable_bias is False"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine is False"),
]


@pytest.mark.parametrize(("kind", "change", "says"), REFUSED)
def test_a_config_field_unsupported_by_its_family_is_refused_by_name(
    kind: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        read_config_json(CONFIGS[kind] | change)
    assert len(str(caught.value)) < 300


def test_a_new_model_that_its_family_cannot_represent_is_refused() -> None:
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 3, "n_head": 4, "d_model": 32}
    new = ModelConfig(**shape, model_type="gemma2", activation="gelu_tanh")
    read = canonical(new)
    assert json.loads(read.hf_fields[2].removeprefix("layer_types="))[1] == "full_attention"
    assert canonical(read) == read
    assert replace(read, hf_fields=()) == new
    with pytest.raises(
        ConfigError, match=r"gemma2 always has qk_norm False, not True.* model.qk_norm"
    ):
        canonical(replace(new, qk_norm=True))
    with pytest.raises(ConfigError, match=r"olmo2 always has qk_norm True, not False"):
        canonical(replace(new, model_type="olmo2"))
    with pytest.raises(ConfigError, match="hf_fields must be a list of NAME=JSON"):
        canonical(replace(new, hf_fields=("sliding_window",)))
    with pytest.raises(ConfigError, match="sliding_window is 'x'"):
        canonical(replace(new, hf_fields=('sliding_window="x"',)))
    with pytest.raises(ConfigError, match="hf_fields needs a model_type of Hugging Face"):
        replace(new, model_type="minigpt", hf_fields=("sliding_window=3",))
    mistral = replace(new, model_type="mistral", hf_fields=("sliding_window=3",))
    assert canonical(mistral) == mistral
    llama = replace(new, model_type="llama", activation="silu", hf_fields=("sliding_window=3",))
    with pytest.raises(
        ConfigError, match="sliding_window changes nothing in a model of type llama"
    ):
        canonical(llama)


USUAL = {"attention_dropout": 0.0, "hidden_act": "silu", "use_cache": True, "rope_scaling": None}

PHI3 = USUAL | {
    "model_type": "phi3",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "embd_pdrop": 0.0,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "original_max_position_embeddings": 4096,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
}

PUBLISHED: list[tuple[int, dict[str, Any]]] = [
    (
        125_198_592,  # GPT-Neo 125M
        {
            "activation_function": "gelu_new",
            "architectures": ["GPTNeoForCausalLM"],
            "attention_dropout": 0,
            "attention_layers": ["global", "local"] * 6,
            "attention_types": [[["global", "local"], 6]],
            "embed_dropout": 0,
            "hidden_size": 768,
            "intermediate_size": None,
            "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 2048,
            "model_type": "gpt_neo",
            "num_heads": 12,
            "num_layers": 12,
            "resid_dropout": 0,
            "summary_first_dropout": 0.1,
            "vocab_size": 50257,
            "window_size": 256,
        },
    ),
    (
        125_239_296,  # OPT-125M
        {
            "_remove_final_layer_norm": False,
            "activation_dropout": 0.0,
            "activation_function": "relu",
            "architectures": ["OPTForCausalLM"],
            "attention_dropout": 0.0,
            "do_layer_norm_before": True,
            "dropout": 0.1,
            "ffn_dim": 3072,
            "hidden_size": 768,
            "init_std": 0.02,
            "layerdrop": 0.0,
            "max_position_embeddings": 2048,
            "model_type": "opt",
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "prefix": "</s>",
            "vocab_size": 50272,
            "word_embed_proj_dim": 768,
        },
    ),
    (
        3_821_079_552,  # Phi-3-mini-4k-instruct
        PHI3
        | {
            "max_position_embeddings": 4096,
            "num_key_value_heads": 32,
            "sliding_window": 2047,
            "tie_word_embeddings": False,
            "vocab_size": 32064,
        },
    ),
    (
        3_836_021_760,  # Phi-4-mini-instruct
        PHI3
        | {
            "full_attn_mod": 1,
            "interpolate_factor": 1,
            "lm_head_bias": False,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "partial_rotary_factor": 0.75,
            "rope_scaling": {
                "long_factor": [1.0 + n for n in range(48)],
                "short_factor": [1.0] * 48,
                "type": "longrope",
            },
            "sliding_window": 262144,
            "tie_word_embeddings": True,
            "vocab_size": 200064,
        },
    ),
    (
        3_075_098_624,  # SmolLM3-3B
        USUAL
        | {
            "model_type": "smollm3",
            "attention_bias": False,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536,
            "max_window_layers": 28,
            "mlp_bias": False,
            "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "pretraining_tp": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 5000000.0,
            "sliding_window": None,
            "use_sliding_window": False,
            "vocab_size": 128256,
        },
    ),
    (
        1_484_916_736,  # OLMo-2-0425-1B
        USUAL
        | {
            "model_type": "olmo2",
            "attention_bias": False,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "rms_norm_eps": 1e-06,
            "rope_theta": 500000,
            "tie_word_embeddings": False,
            "vocab_size": 100352,
        },
    ),
    (
        2_614_341_888,  # gemma-2-2b
        USUAL
        | {
            "model_type": "gemma2",
            "attention_bias": False,
            "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": 30.0,
            "head_dim": 256,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 26,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 256000,
        },
    ),
    (
        2_506_172_416,  # gemma-2b
        USUAL
        | {
            "model_type": "gemma",
            "attention_bias": False,
            "head_dim": 256,
            "hidden_act": "gelu",
            "hidden_activation": None,
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "max_position_embeddings": 8192,
            "num_attention_heads": 8,
            "num_hidden_layers": 18,
            "num_key_value_heads": 1,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0,
            "vocab_size": 256000,
        },
    ),
]


@pytest.mark.parametrize(("n_parameters", "config"), PUBLISHED)
def test_a_published_config_has_the_published_number_of_parameters(
    n_parameters: int, config: dict[str, Any]
) -> None:
    assert parameter_count(read_config_json(config)) == n_parameters


def test_published_pythia_and_gemma3_configs_are_read() -> None:
    pythia = {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "initializer_range": 0.02,
        "intermediate_size": 2048,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    }
    assert parameter_count(read_config_json(pythia)) == 70_426_624
    gemma3 = {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    }
    config = read_config_json(gemma3)
    assert parameter_count(config) == 999_885_952
    types = json.loads(config.hf_fields[1].removeprefix("layer_types="))
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == [5, 11, 17, 23]
