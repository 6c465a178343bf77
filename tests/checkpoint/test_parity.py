"""Tiny random models saved by transformers give the same results in minigpt."""

import functools
import itertools
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.model_folder import WEIGHTS, LoadedModel, read_model, write_model
from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.model.cache import KVCache
from minigpt.tracing.recorder import RowRecorder

CONTEXT, NEW = 96, 64
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


@pytest.fixture(scope="module")
def open_both() -> Iterator[Callable[[str], Pair]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by its imports
        transformers = pytest.importorskip(
            "transformers", reason="needs transformers as the oracle"
        )
    transformers.logging.set_verbosity_error()

    with tempfile.TemporaryDirectory() as root:

        @functools.cache
        def open_kind(kind: str) -> Pair:
            settings = {"vocab_size": 61, "bos_token_id": 1, "eos_token_id": 2} | KINDS[kind]
            config = transformers.AutoConfig.for_model(**settings)
            theirs = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation="eager"
            )
            generator = torch.Generator().manual_seed(3)
            with torch.no_grad():  # no zero biases and no norms of one
                for parameter in theirs.parameters():
                    parameter.normal_(std=0.3, generator=generator)
            theirs.eval().save_pretrained(folder := Path(root) / kind)
            return Pair(folder, theirs, read_model(folder))

        yield open_kind


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, open_both: Callable[[str], Pair]) -> Pair:
    return open_both(request.param)


TOKENS = torch.randint(61, (2, CONTEXT), generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_logits_equal_those_of_transformers_at_every_position(pair: Pair) -> None:
    expected = pair.theirs(TOKENS).logits
    assert expected.std() > 0.3  # otherwise any model would agree
    torch.testing.assert_close(pair.ours.model(TOKENS), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def assert_greedy_tokens_agree(pair: Pair, prompt: list[int], n_new: int = NEW) -> None:
    """Check that each of our greedy tokens is the most probable one in transformers."""
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_new)
    steps = Decoder(pair.ours.model, prompt).generate(sampling, seed=0)
    tokens = prompt + [step.token for step in steps]
    assert len(tokens) == len(prompt) + n_new
    if has_long_rope(pair):  # the length of the text determines the frequencies
        prefixes = (torch.tensor([tokens[:n]]) for n in range(len(prompt), len(tokens)))
        best = [int(pair.theirs(prefix).logits[0, -1].argmax()) for prefix in prefixes]
    else:
        best = pair.theirs(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        best = best[len(prompt) - 1 : -1]
    assert tokens[len(prompt) :] == best


def has_long_rope(pair: Pair) -> bool:
    return any("longrope" in field for field in pair.ours.model.config.hf_fields)


@pytest.mark.integration
def test_greedy_tokens_equal_those_of_transformers(pair: Pair) -> None:
    n_new = NEW if has_long_rope(pair) else 24  # past the longest short window
    assert_greedy_tokens_agree(pair, TOKENS[0, :1].tolist(), n_new)
    assert_greedy_tokens_agree(pair, TOKENS[0, : CONTEXT - NEW].tolist())  # to the last position


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_transformers_from_every_length(pair: Pair) -> None:
    for length in range(1, CONTEXT - NEW + 1):
        assert_greedy_tokens_agree(pair, TOKENS[1, :length].tolist())
    if has_long_rope(pair) and pair.ours.model.config.model_type != "phi3":
        return  # transformers keeps cached keys that were rotated with the other frequencies
    generated = pair.theirs.generate(
        TOKENS[:1, :3], do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=NEW)
    steps = Decoder(pair.ours.model, TOKENS[0, :3].tolist()).generate(sampling, seed=0)
    assert [step.token for step in steps] == generated[0, 3:].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama-long", "gemma3-long", "phi3-long"])
def test_longrope_logits_with_a_cache_equal_a_full_forward(
    open_both: Callable[[str], Pair], kind: str
) -> None:
    pair = open_both(kind)
    model, original = pair.ours.model, pair.ours.model.original_context
    cache = KVCache(model.config, batch_size=2)
    lengths = [original - 3, original, original + 1, original + 4, original, original + 2]
    for start, end in itertools.pairwise([0, *lengths]):
        cache.truncate(min(start, end - 2))  # at least two tokens are fed
        cached = model(TOKENS[:, cache.length : end], cache)
        expected = pair.theirs(TOKENS[:, :end]).logits[:, -cached.shape[1] :]
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)
        cache.select([1, 0])
        cache.select([1, 0])


@torch.inference_mode()
def test_traced_rows_equal_the_attention_of_transformers(pair: Pair) -> None:
    tokens = TOKENS[:1, :20]
    layers = pair.theirs(tokens, output_attentions=True).attentions
    recorder = RowRecorder(pair.ours.model)
    for n in (1, 2, 13, 20):
        pair.ours.model(tokens[:, :n], recorder=recorder)
        expected = torch.stack([layer[0, :, n - 1, :n] for layer in layers])
        torch.testing.assert_close(recorder.weights_LHS, expected, rtol=0, atol=1e-5)


def test_a_loaded_and_saved_model_has_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    write_model(tmp_path, pair.ours.model, None)
    before, after = load_file(pair.folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
    assert read_model(tmp_path).model.config == pair.ours.model.config


OMITTED_FIELDS = {
    "_name_or_path",
    "_sliding_window_pattern",  # layer_types and no_rope_layers are written instead
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "pad_token_id",
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",  # belongs to the tokenizer, which these models do not have
    "eos_token_id",
    "max_window_layers",
    "resid_pdrop",
    "embd_pdrop",
    "transformers_version",
}


def test_a_loaded_and_saved_config_is_equal(pair: Pair, tmp_path: Path) -> None:
    write_model(tmp_path, pair.ours.model, None)
    again = type(pair.theirs.config).from_pretrained(tmp_path).to_dict()
    expected = pair.theirs.config.to_dict()
    if expected.get("sliding_window") == CONTEXT or pair.folder.name == "qwen2-window-nowhere":
        # A window as long as the context, or in no layer, has no effect and is not written.
        expected |= {"sliding_window": None, "use_sliding_window": again.get("use_sliding_window")}
    if has_long_rope(pair) or pair.ours.model.config.rope_scaling == "yarn":
        # Derived values are written explicitly.
        given, written = expected["rope_parameters"], again["rope_parameters"]
        if "full_attention" in given:
            given, written = given["full_attention"], written["full_attention"]
        given |= written | {k: given[k] for k in given if "mscale" not in k}
        for key in [key for key in given if "mscale" in key]:
            del given[key]
    for width, of in (("n_inner", "n_embd"), ("intermediate_size", "hidden_size")):
        if expected.get(width, 0) is None:
            expected[width] = 4 * expected[of]
    different = {key for key in expected if expected[key] != again.get(key)}
    assert different <= OMITTED_FIELDS


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2-tied", "llama-tied", "opt"])
def test_a_base_model_without_a_head_is_read(
    open_both: Callable[[str], Pair], tmp_path: Path, kind: str
) -> None:
    pair = open_both(kind)
    pair.theirs.base_model.save_pretrained(tmp_path)  # its tensor names have no prefix
    assert not any(name.startswith(("model.", "transformer.")) for name in names_in(tmp_path))
    expected = pair.ours.model(TOKENS)
    assert torch.equal(read_model(tmp_path).model(TOKENS), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neox", "neox-serial", "opt-untied", "llama-2"])
def test_a_state_dict_of_transformers_is_read(
    open_both: Callable[[str], Pair], tmp_path: Path, kind: str
) -> None:
    pair = open_both(kind)
    pair.theirs.config.save_pretrained(tmp_path)
    # The output projection of GPT-NeoX is lm_head.weight here, and embed_out.weight in files.
    tensors = {name: tensor.clone() for name, tensor in pair.theirs.state_dict().items()}
    assert "lm_head.weight" in tensors
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(read_model(tmp_path).model(TOKENS), pair.ours.model(TOKENS))


def names_in(folder: Path) -> list[str]:
    return [name for path in folder.glob("*.safetensors") for name in load_file(path)]


@torch.no_grad()
def test_sharded_weights_saved_by_transformers_are_read(
    open_both: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = open_both("qwen3")
    pair.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(read_model(tmp_path).model(TOKENS), pair.ours.model(TOKENS))


WINDOW = {"sliding_window": 7}
OTHER_FIELDS = [
    ("neox", {"num_key_value_heads": 2, "training": {"data": ["a"]}}),
    # As transformers 4.46 to 4.57 saves a Pythia model.
    ("neox", {"rotary_emb_base": 10000, "rope_theta": 10000, "partial_rotary_factor": 0.25}),
    ("olmo2", {"rotary_dims": None, "n_ctx": 5, "tags": ["a"], "head_count": 3}),
    ("llama-2", WINDOW),
    ("llama-2", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    ("olmo2", WINDOW | {"use_sliding_window": True, "max_window_layers": 0}),
    ("mistral-short-window", {"use_sliding_window": False, "max_window_layers": 2}),
    ("mistral-short-window", {"use_sliding_window": True, "max_window_layers": 1}),
    ("phi3-window", {"use_sliding_window": False, "max_window_layers": 2}),
    ("qwen2-short-window", {"use_sliding_window": False}),
    ("gemma3-yarn", {"original_max_position_embeddings": 5}),
    ("gemma3-long", {"original_max_position_embeddings": 5}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), OTHER_FIELDS)
def test_a_field_is_read_where_transformers_reads_it_and_ignored_elsewhere(
    kind: str, change: dict[str, Any], open_both: Callable[[str], Pair], tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(open_both(kind).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | change))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(
        read_model(folder).model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-4
    )
