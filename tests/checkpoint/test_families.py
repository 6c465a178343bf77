"""Conversion of config.json and tensor names of GPT-2, Llama and Qwen3 in both directions."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published_configs import GPT2, LLAMA3, MISTRAL, QWEN2, QWEN3, ROPE, SMOLLM2

from minigpt.checkpoint.config_json import read_config_json
from minigpt.checkpoint.families import model_config_from_hf, model_config_to_hf
from minigpt.checkpoint.published_models import canonical_names
from minigpt.checkpoint.weights import tensors_from_hf, tensors_to_hf
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.model.gpt import GPT


def test_published_configs_are_read() -> None:
    assert model_config_from_hf(GPT2) == ModelConfig(
        vocab_size=50257,
        context_length=1024,
        n_layer=12,
        n_head=12,
        d_model=768,
        family="gpt2",
        tie_embeddings=True,
        dropout=0.1,
    )
    assert model_config_from_hf(QWEN3) == ModelConfig(
        vocab_size=151936,
        context_length=40960,
        n_layer=28,
        n_head=16,
        d_model=1024,
        n_kv_head=8,
        d_head=128,
        d_mlp=3072,
        qk_norm=True,
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=True,
    )
    llama = {"n_layer": 32, "n_head": 32, "d_model": 4096, "n_kv_head": 8, "d_mlp": 14336}
    assert model_config_from_hf(LLAMA3) == ModelConfig(
        **llama,
        vocab_size=128256,
        context_length=131072,
        rope_theta=500_000.0,
        rope_scaling_factor=8.0,
        rope_low_freq_factor=1.0,
        rope_high_freq_factor=4.0,
        rope_original_context=8192,
    )
    mistral = {"vocab_size": 32000, "context_length": 32768, "model_type": "mistral"}
    assert model_config_from_hf(MISTRAL) == ModelConfig(**llama, **mistral)
    assert model_config_from_hf(SMOLLM2) == ModelConfig(
        vocab_size=49152,
        context_length=8192,
        n_layer=30,
        n_head=9,
        d_model=576,
        n_kv_head=3,
        d_mlp=1536,
        rope_theta=100_000.0,
        tie_embeddings=True,
    )
    assert model_config_from_hf(QWEN2) == ModelConfig(
        vocab_size=151936,
        context_length=32768,
        n_layer=24,
        n_head=14,
        d_model=896,
        n_kv_head=2,
        d_mlp=4864,
        attention_bias="qkv",
        rope_theta=1e6,
        norm_eps=1e-6,
        tie_embeddings=True,
    )


def test_a_sliding_window_as_long_as_the_context_is_accepted() -> None:
    full = model_config_from_hf(MISTRAL)
    assert model_config_from_hf(MISTRAL | {"sliding_window": 32768}) == full
    short = model_config_from_hf(MISTRAL | {"max_position_embeddings": 4096})
    absent = {k: v for k, v in MISTRAL.items() if k != "sliding_window"}
    # transformers assumes 4096 if the field is missing.
    assert model_config_from_hf(absent | {"max_position_embeddings": 4096}) == short
    assert model_config_from_hf(absent).hf_fields == ("sliding_window=4096",)


def test_sliding_windows_are_read_for_each_layer() -> None:
    def fields(**change: Any) -> tuple[str, ...]:
        return model_config_from_hf(QWEN2 | {"num_hidden_layers": 3} | change).hf_fields

    some = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}
    types = ["full_attention", "full_attention", "sliding_attention"]
    expected = (f"layer_types={json.dumps(types)}", "sliding_window=9", "use_sliding_window=true")
    assert fields(**some) == fields(**some, layer_types=types) == expected
    assert fields(**some | {"max_window_layers": 3}) == ()
    assert fields(**some | {"sliding_window": 32768}) == ()
    assert fields(**some | {"use_sliding_window": False}) == ()
    assert fields(**some, layer_types=["full_attention"] * 3) == ()


def test_layer_types_must_match_the_attention_of_a_family_that_ignores_them() -> None:
    for config, kind in ((LLAMA3, "full"), (MISTRAL | {"sliding_window": 9}, "sliding")):
        types = [f"{kind}_attention"] * config["num_hidden_layers"]
        assert model_config_from_hf(config | {"layer_types": types}) == model_config_from_hf(config)
        with pytest.raises(CheckpointError, match="layer_types is"):
            model_config_from_hf(config | {"layer_types": ["linear_attention", *types[1:]]})


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 123.0},
        {"rope_theta": 123.0, "rope_scaling": {"type": "default"}},
        {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}, "rope_theta": None},
        {"rope_parameters": {"rope_theta": 123.0}, "rope_theta": 9.0},
    ],
)
def test_rope_theta_is_read_from_configs_of_any_transformers_version(
    rope: dict[str, Any],
) -> None:
    assert model_config_from_hf(QWEN3 | rope).rope_theta == 123.0


HARMLESS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GPT2, {"keys_to_ignore_at_inference": ["past_key_values"], "max_new_tokens": 50}),
    (GPT2, {"attn_implementation": "sdpa", "_attn_implementation": "eager", "min_p": 0.1}),
    (GPT2, {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": None}),
    (QWEN3, {"rope_scaling": {"type": "default", "factor": 1.0}}),
    (QWEN3, {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}),
    (QWEN3, {"layer_types": ["full_attention"] * 28}),
    (LLAMA3, {"output_router_logits": False, "neftune_noise_alpha": None, "stop_strings": None}),
    (LLAMA3, {"training_data": {"mix": [1, 2]}, "tags": ["a"], "n_ctx": 5, "is_mine": True}),
    (GPT2, {"num_key_value_heads": 4, "head_dim": 7, "rlhf": {"kl": 0.1}}),
    (GPT2, {"guidance_scale": 1.5, "low_memory": False, "temperature": 0.7}),
    (GPT2, {"local_rank": 0, "caption": "x", "shard_size": 5, "converted_from": "y"}),
    (LLAMA3, {"max_grad_norm": 1.0, "mixed_precision": "bf16", "label_smoothing_factor": 0.1}),
    (QWEN3, {"router_aux_loss_coef": 0.01, "output_attentions": True, "activity": "chat"}),
]


@pytest.mark.parametrize(("config", "change"), HARMLESS)
def test_config_fields_that_change_no_logits_are_ignored(
    config: dict[str, Any], change: dict[str, Any]
) -> None:
    assert model_config_from_hf(config | change) == model_config_from_hf(config)


def test_a_config_survives_the_round_trip(model: GPT) -> None:
    assert model_config_from_hf(model_config_to_hf(model.config, None)) == model.config


UNSUPPORTED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (GPT2, {"model_type": None}, "the field model_type is missing"),
    (GPT2, {"model_type": "mamba"}, "unsupported model_type 'mamba'"),
    (GPT2, {"model_type": ["gpt2"]}, "unsupported model_type"),
    (GPT2, {"model_type": "__init__"}, "unsupported model_type '__init__'"),
    (GPT2, {"activation_function": "tanh"}, "activation_function is 'tanh'"),
    (GPT2, {"scale_attn_weights": 0.5}, "scale_attn_weights is 0.5"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention is True"),
    (GPT2, {"quantization_config": {"bits": 4}}, "weights are stored quantized"),
    (GPT2, {"n_layer": None}, "n_layer is missing"),
    (GPT2, {"n_layer": "12"}, "n_layer must be of type int"),
    (GPT2, {"n_head": 7}, "n_head must divide"),
    (GPT2, {"resid_pdrop": 1.5}, "dropout must be"),
    (QWEN2, {"attention_bias": True}, "attention_bias is True"),
    (QWEN3, {"mlp_bias": True}, "mlp_bias is True"),
    (QWEN2, {"use_sliding_window": True, "max_window_layers": "x"}, "max_window_layers is 'x'"),
    (QWEN3, {"rope_theta": 1.0, "rope_scaling": ROPE | {"rope_type": "yarn"}}, "high_freq_factor"),
    (MISTRAL, {"sliding_window": "x"}, "sliding_window is 'x'"),
    (MISTRAL, {"sliding_window": 0}, "sliding_window is 0"),
    (QWEN3, {"use_mrope": True}, "use_mrope is True"),
    (LLAMA3, {"rope_interleaved": True}, "rope_interleaved is True"),
    (LLAMA3, {"logit_scale": 0.5}, "unknown field 'logit_scale' with value 0.5"),
    (GPT2, {"n_norm\x1b": 5}, r"'n_norm\\x1b' with value 5"),
    (GPT2, {"alibi": True}, "unknown field 'alibi' with value True"),
    (LLAMA3, {"new_rope_rule": {"a": 1}}, "unknown field 'new_rope_rule' with value {'a': 1}"),
    (MISTRAL, {"attn_temperature_tuning": 4}, "unknown field 'attn_temperature_tuning'"),
    (QWEN2, {"embedding_multiplier": 12.0}, "unknown field 'embedding_multiplier'"),
    (LLAMA3, {"rms_norm_eps": None, "num_hidden_layers": None}, "num_hidden_layers is missing"),
    (LLAMA3, {"attention_bias": 1}, "attention_bias is 1"),
    (LLAMA3, {"attention_bias": True, "mlp_bias": "x"}, "mlp_bias must be of type bool"),
    (QWEN3, {"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]"),
    (QWEN3, {"layer_types": ["sliding_attention"] * 28}, "sliding_window is None"),
    (QWEN3, {"layer_types": ["chunked_attention"] * 28}, r"layer_types is \['chunked_attention'"),
    (QWEN3, {"layer_types": 5}, "layer_types is 5"),
    (LLAMA3, {"layer_types": [5], "num_hidden_layers": "two"}, "n_layer must be of type int"),
    (LLAMA3, {"layer_types": ["full_attention"], "num_hidden_layers": 10**9}, "layer_types is"),
    (QWEN3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5.* transformers ignores"),
    (LLAMA3, {"shared_layers": 2}, "unknown field 'shared_layers'"),
    (LLAMA3, {"logit_cap": 30.0}, "unknown field 'logit_cap'"),
    (QWEN3, {"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling.short_factor is None"),
    (QWEN3, {"rope_scaling": {"rope_type": "longrape"}}, "rope_scaling.rope_type is 'longrape'"),
    (QWEN3, {"rope_scaling": {"rope_type": ["yarn"]}}, "rope_scaling.rope_type is"),
    (QWEN3, {"rope_scaling": {"type": "default", "factor": 4.0}}, "rope_scaling.factor is 4.0"),
    (QWEN3, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
    (QWEN3, {"rope_scaling": {"type": "yarn", "factor": "4"}}, "rope_scaling.factor, .* is '4'"),
    (QWEN3, {"rope_scaling": {"type": "yarn", "factor": 10**400}}, "rope_scaling.factor, .* is 1"),
    (
        QWEN3,
        {"rope_scaling": {"type": "yarn", "factor": math.e, "mscale": 1, "mscale_all_dim": -10}},
        "rope_scaling.factor, .* is -10",
    ),
    (
        QWEN3,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "truncate": "no"}},
        "rope_scaling.truncate is 'no'",
    ),
    (
        QWEN3,
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0.5}},
        "rope_scaling yarn needs",
    ),
    (QWEN3, {"rope_parameters": {"rope_type": "llama3"}}, "rope_parameters.factor is missing"),
    (QWEN3, {"rope_parameters": {"full_attention": {}}}, "rope_parameters.full_attention is"),
    (LLAMA3, {"rope_scaling": ROPE | {"factor": 0}}, "rope_scaling_factor must be"),
    (LLAMA3, {"rope_scaling": ROPE | {"low_freq_factor": 4.0}}, "rope_high_freq_factor must be"),
    (
        LLAMA3,
        {"rope_scaling": ROPE | {"attention_factor": 2.0}},
        "rope_scaling.attention_factor is",
    ),
    (QWEN3, {"rope_parameters": "yarn"}, "rope_parameters is 'yarn'"),
    (QWEN3, {"rope_theta": "big"}, "rope_theta must be of type float"),
    (QWEN3, {"rope_theta": float("nan")}, "rope_theta must be a finite number: it is nan"),
    (QWEN3, {"hidden_act": "\x1b[31m" * 99}, r"hidden_act is '\\x1b"),
]


@pytest.mark.parametrize(("config", "change", "says"), UNSUPPORTED)
def test_an_unsupported_config_field_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        read_config_json(config | change)
    assert len(str(caught.value)) < 300


def test_gpt2_tensors_are_split_and_transposed(make: Callable[[int, str], GPT]) -> None:
    model = make(50, "gpt2-untied")
    ours = model.state_dict()
    theirs = tensors_to_hf(model.config, ours)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    # Hugging Face's Conv1D: x @ weight + bias, with query, key and value concatenated.
    weight, bias = (theirs[f"transformer.h.1.attn.c_attn.{name}"] for name in ("weight", "bias"))
    query, key, value = (x @ weight + bias).split(16, dim=1)
    attention = model.blocks[1].attention
    for got, layer in ((query, attention.query), (key, attention.key), (value, attention.value)):
        torch.testing.assert_close(got, layer(x), rtol=1e-5, atol=1e-5)  # order of float32 sums
    assert theirs["lm_head.weight"].shape == (50, 16)
    assert theirs["transformer.wpe.weight"] is ours["positions.weight"]


def test_tensors_survive_the_round_trip_bit_for_bit(model: GPT) -> None:
    ours = model.state_dict()
    again = tensors_from_hf(model.config, tensors_to_hf(model.config, ours))
    assert again.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(again[name], tensor)


def test_a_missing_name_prefix_and_old_buffers_are_accepted(
    make: Callable[[int, str], GPT],
) -> None:
    config = make(50, "gpt2-tied").config
    found = ["wte.weight", "h.0.attn.bias", "h.0.attn.masked_bias", "h.0.attn.c_attn.bias"]
    assert canonical_names(config, found) == {
        "transformer.wte.weight": "wte.weight",
        "transformer.h.0.attn.c_attn.bias": "h.0.attn.c_attn.bias",
    }
    config = make(50, "llama-grouped").config
    found = ["norm.weight", "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert canonical_names(config, found) == {
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "lm_head.weight",
    }
