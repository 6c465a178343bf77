"""Families with a class of their own: trained, traced, knocked out, quantized, counted, refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from knocking_out import knock_out

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.published_models import canonical
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import supports
from minigpt.generation.fast.quantize import quantize_int8
from minigpt.model.attention import AttentionPass
from minigpt.model.cache import KVCache
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.head_lists import select_heads

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
TOKENS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return model_config_from_hf(CONFIGS[request.param])


@pytest.fixture
def model(config: ModelConfig) -> LanguageModel:
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def test_fast_decode_step_leaves_a_family_of_its_own_to_the_plain_one(
    model: LanguageModel,
) -> None:
    assert not supports(model)
    assert not supports(model, compiles=True)
    assert type(Decoder(model, TOKENS[0].tolist()).forward).__name__ == "PlainForward"


def test_fresh_model_is_trained_and_read_again(config: ModelConfig, tmp_path: Path) -> None:
    model = model_class(config)(config)
    model.init_weights(torch.Generator().manual_seed(1))
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())

    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before / 2
    assert all(parameter.grad is not None for parameter in model.parameters())
    write_model(tmp_path, model, None)
    again = read_model(tmp_path).model
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS), model.eval()(TOKENS))


def test_activation_checkpointing_gives_the_same_gradients(model: LanguageModel) -> None:
    def gradients(**options: bool) -> list[torch.Tensor]:
        model.zero_grad()
        model(TOKENS, **options).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(), gradients(recompute=True), strict=True):
        torch.testing.assert_close(recomputed, plain)


class Keeper:
    """Keeps what a recorder receives."""

    needs_queries = True
    needs_residual = True

    def record(self, attention: AttentionPass) -> None:
        self.attention = attention


@torch.no_grad()
def test_recorded_rows_times_values_are_the_heads_outputs(model: LanguageModel) -> None:
    keeper = Keeper()
    model(TOKENS[:1], recorder=keeper)
    seen = keeper.attention
    assert seen.queries is not None
    assert seen.keys is not None
    for layer, attention in enumerate(model.attentions):
        weights = attention.score.weights(seen.queries[layer], seen.keys[layer])[0]  # (H, T, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(weights[:, -1], seen.weights_LBHS[layer, 0])
        values = seen.values_LBGSD[layer, 0]
        values = values.repeat_interleave(len(weights) // len(values), dim=0)
        torch.testing.assert_close(weights[:, -1:] @ values, seen.context_LBHD[layer, 0][:, None])
        if window := attention.score.window:
            place = torch.arange(20)
            hidden = place[None] <= place[:, None] - window
            assert (weights[:, hidden] == 0).all()
            assert (weights[:, ~hidden & (place[None] <= place[:, None])] > 0).all()


@torch.no_grad()
def test_recorded_residual_stream_is_what_the_blocks_pass_on(model: LanguageModel) -> None:
    states = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        block.register_forward_hook(lambda *call: states.append(call[-1]))
    model(TOKENS, recorder=(keeper := Keeper()))
    residual_NBC = keeper.attention.residual_NBC
    assert residual_NBC is not None
    assert torch.equal(residual_NBC[0::2], torch.stack([states[0], *states[1::2]])[:, :, -1])
    for layer, attention in enumerate(model.attentions):
        branch = attention.output(keeper.attention.context_LBHD[layer].flatten(1))
        branch = model.blocks[layer].attention_post_norm(branch)
        added = residual_NBC[2 * layer + 1] - residual_NBC[2 * layer]
        torch.testing.assert_close(added, branch, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_watching_changes_no_logits_and_a_rollout_is_the_product_of_the_rows(
    model: LanguageModel,
) -> None:
    n_layer, n_head = model.config.n_layer, model.config.n_head
    rollout = Rollout(select_heads(n_layer=n_layer, n_head=n_head), 20)
    recorder = MeasureRecorder(model, measures=("weight", "norm"), watchers=[rollout])
    keeper = Keeper()
    cache = KVCache(model.config)
    parts = [model(TOKENS[:1, :15], cache, recorder)]
    parts += [model(TOKENS[:1, i : i + 1], cache, recorder) for i in range(15, 20)]
    plain = model(TOKENS[:1], recorder=keeper)
    torch.testing.assert_close(torch.cat(parts, dim=1), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain, model(TOKENS[:1]))
    product = torch.eye(20)
    assert keeper.attention.queries is not None
    assert keeper.attention.keys is not None
    for attention, q, k in zip(
        model.attentions, keeper.attention.queries, keeper.attention.keys, strict=True
    ):
        product = (0.5 * attention.score.weights(q, k)[0].mean(0) + 0.5 * torch.eye(20)) @ product
    torch.testing.assert_close(rollout.row(), product[-1], rtol=1e-4, atol=1e-5)
    assert recorder.product_error is not None
    assert recorder.product_error < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["key", "value"])
def test_knockout_is_the_forward_pass_without_the_source(model: LanguageModel, kind: Any) -> None:
    cache = KVCache(model.config)
    full = model(TOKENS[:1], cache)[0, -1].log_softmax(-1)
    sources = [2, 17]
    changes = knock_out(model, cache, int(TOKENS[0, -1]), 7, sources, kind)
    for source, change in zip(sources, changes, strict=True):
        without = KVCache(model.config)
        model(TOKENS[:1, :-1], without)
        visible = None
        if kind == "key":
            visible = torch.ones(1, 20, dtype=torch.bool)
            visible[0, source] = False
        else:
            without.values_LBGSD[:, :, :, source] = 0
        logits = model(TOKENS[:1, -1:], without, visible_BS=visible)[0, -1]
        expected = (logits.log_softmax(-1) - full)[7].item()
        assert change == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_int8_weights_give_nearly_the_same_logits(model: LanguageModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.3)
    before = model(TOKENS)
    quantize_int8(model)
    after = model(TOKENS)
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


def test_parameters_and_flops_are_those_of_the_model(
    config: ModelConfig, model: LanguageModel
) -> None:
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    multiplied = sum(p.numel() for n, p in model.named_parameters() if n != "positions.weight")
    multiplied -= 0 if config.tie_embeddings else model.embedding.weight.numel()
    # Six per parameter; twelve per weight and dimension, for the positions in view on average.
    flops = 6 * multiplied
    for attention in model.attentions:
        window = attention.score.window or 40
        n_seen = sum(min(i + 1, window) for i in range(40)) / 40
        flops += 12 * config.n_head * config.d_head * n_seen
    assert training_flops_per_token(config) == pytest.approx(flops, rel=0.02)


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
    ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers is \[1\]"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ("phi3", {"rope_scaling": {"type": "longrope"}}, "short_factor is None"),
    ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0]}}, r"short_factor is \[1.0\]"),
    ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
    ("phi3", {"rope_scaling": {"type": "su", "surprise": 2.0}}, "surprise"),
    ("phi3", {"rope_scaling": 7}, "rope_parameters is 7"),
    ("olmo2", {"clip_qkv": 8.0}, "unknown field 'clip_qkv' with value 8.0"),
    ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layer_types is"),
]


@pytest.mark.parametrize(("kind", "change", "says"), REFUSED)
def test_field_that_a_family_does_not_compute_is_refused_by_name(
    kind: str, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        model_config_from_hf(CONFIGS[kind] | change)
    assert len(str(caught.value)) < 300


def test_new_model_that_its_family_could_not_read_again_is_refused() -> None:
    shape = {"vocab_size": 61, "context_length": 24, "n_layer": 3, "n_head": 4, "d_model": 32}
    new = ModelConfig(**shape, model_type="gemma2", activation="gelu_tanh")
    read = canonical(new)
    assert json.loads(read.hf_fields[2].removeprefix("layer_types="))[1] == "full_attention"
    assert canonical(read) == read
    assert replace(read, hf_fields=()) == new
    with pytest.raises(ConfigError, match=r"gemma2 always has qk_norm False: .* model.qk_norm"):
        canonical(replace(new, qk_norm=True))
    with pytest.raises(ConfigError, match=r"olmo2 always has qk_norm True: it is False"):
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
def test_published_config_has_the_published_number_of_parameters(
    n_parameters: int, config: dict[str, Any]
) -> None:
    assert parameter_count(model_config_from_hf(config)) == n_parameters


def test_published_configs_are_read() -> None:
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
    assert parameter_count(model_config_from_hf(pythia)) == 70_426_624
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
    config = model_config_from_hf(gemma3)
    assert parameter_count(config) == 999_885_952
    types = json.loads(config.hf_fields[1].removeprefix("layer_types="))
    assert [i for i, kind in enumerate(types) if kind == "full_attention"] == [5, 11, 17, 23]
