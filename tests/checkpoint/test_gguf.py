"""GGUF files hold the model that they were made from; gguf.GGUFReader reads them back.

tests/checkpoint/test_llama_cpp.py compares with llama.cpp itself.
"""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import published_vocabularies as vocabularies
import pytest
import torch
from fuzzed_texts import SAMPLE
from layout_models import FOREIGN, LAYOUTS
from live_bytes import LiveBytes
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import write_model
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json
from minigpt.checkpoint.tools.gguf import export_gguf
from minigpt.checkpoint.tools.gguf_architectures import architecture_of
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, ResourceError
from minigpt.model.language_model import model_class
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BYTES_PATTERN, BytesTokenizer, Tokenizer

gguf = pytest.importorskip("gguf", reason="reads GGUF files with the package gguf")

EXPORTED = {
    "gpt2-tied": LAYOUTS["gpt2-tied"],
    "gpt2-untied": LAYOUTS["gpt2-untied"] | {"activation": "gelu_tanh"},
    **{name: LAYOUTS[name] for name in ("llama-grouped", "llama-biased", "mistral", "qwen2")},
    "qwen3": LAYOUTS["qwen3"],
}
BLOCK = {
    "gpt2": {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "llama": {
        "input_layernorm": "attn_norm",
        **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
        **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    },
}
OUTSIDE = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
"""Names of tensors: Hugging Face's -> GGUF's, as their specifications list them."""


def folder_of(path: Path, tokenizer: Tokenizer | None = None, **shape: Any) -> Path:
    small = {"context_length": 32, "n_layer": 2, "n_head": 4, "d_model": 64, "d_mlp": 40}
    rows = {"vocab_size": tokenizer.vocab_size if tokenizer else 259}
    config = ModelConfig(**(small | rows | shape))
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5, generator=generator)
    write_model(path, model.eval(), tokenizer)
    return path


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the metadata and the tensors of a GGUF file."""
    reader = gguf.GGUFReader(path)
    facts = {name: part.contents() for name, part in reader.fields.items()}
    return facts, {tensor.name: tensor for tensor in reader.tensors}


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{suffix}"
    family = "gpt2" if module.startswith("transformer") else "llama"
    _, _, number, rest = module.split(".", 3)
    return f"blk.{number}.{BLOCK[family][rest]}.{suffix}"


def expected_tensor(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Transpose a Conv1D, and pair neighbours in the queries and keys of the llama architecture."""
    if ".c_" in name and tensor.dim() == 2:
        return tensor.t().contiguous()
    if config["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        width = config["head_dim"]
        order = [
            head * width + half * width // 2 + i
            for head in range(len(tensor) // width)
            for i in range(width // 2)
            for half in range(2)
        ]
        return tensor[order]
    return tensor


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("layout", EXPORTED)
def test_tensors_equal_those_of_the_folder_within_their_type(
    layout: str, type_: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer(), **EXPORTED[layout])
    exported = export_gguf(folder, tmp_path / "m.gguf", type_)
    assert exported.n_bytes == (tmp_path / "m.gguf").stat().st_size
    config = json.loads((folder / "config.json").read_text())
    _, tensors = read(tmp_path / "m.gguf")
    stored = load_file(folder / "model.safetensors")
    assert tensors.keys() - {"rope_freqs.weight"} == set(map(gguf_name, stored))
    for name, tensor in stored.items():
        expected = expected_tensor(name, tensor, config)
        written = tensors[gguf_name(name)]
        assert tuple(written.shape[::-1]) == tuple(expected.shape), name
        is_exact = expected.dim() == 1 or "wpe" in name
        fits = expected.shape[-1] % 32 == 0
        kind = "f32" if is_exact else type_ if fits or type_ != "q8_0" else "f16"
        assert written.tensor_type.name.lower() == kind, name
        values = torch.from_numpy(gguf.dequantize(written.data, written.tensor_type).copy())
        values = values.view_as(expected)
        if kind == "q8_0":
            scale = expected.view(-1, 32).abs().amax(1, keepdim=True) / 127
            error = (values - expected).view(-1, 32).abs()
            assert (error <= scale * 0.51 + 1e-3 * scale * 127).all(), name
        else:
            dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(values, expected.to(dtype).float()), name


def test_scaled_rope_is_written_as_divisors_of_the_frequencies(tmp_path: Path) -> None:
    scaling = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_theta": 500_000.0}
    scaling |= {"rope_original_context": 64, "rope_high_freq_factor": 4.0}
    folder = folder_of(tmp_path / "model", BytesTokenizer(), d_head=32, **scaling)
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    factors = read(tmp_path / "m.gguf")[1]["rope_freqs.weight"].data
    for i, factor in enumerate(factors):  # as Llama 3.1's reference implementation
        wavelength = 2 * math.pi * 500_000.0 ** (2 * i / 32)
        if wavelength < 64 / 4.0:
            expected = 1.0
        elif wavelength > 64 / 1.0:
            expected = 8.0
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected = 1 / ((1 - smooth) / 8.0 + smooth)
        assert factor == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("type_", ["f32", "q8_0"])
def test_export_holds_one_tensor_at_a_time(type_: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer(), n_layer=20, d_mlp=640)
    stored = load_file(folder / "model.safetensors")
    with LiveBytes() as live:
        export_gguf(folder, tmp_path / "m.gguf", type_)
    largest = max(tensor.nbytes for tensor in stored.values())
    assert largest <= live.peak < 4 * largest < sum(t.nbytes for t in stored.values()) / 8


def test_metadata_has_the_shape_of_the_model(tmp_path: Path) -> None:
    shape = {"n_kv_head": 2, "rope_theta": 500.0, "d_head": 24, "norm_eps": 1e-4}
    folder = folder_of(tmp_path / "tales" / "step-000500", BytesTokenizer(), **shape)
    export_gguf(folder, tmp_path / "m.gguf", "q8_0")
    facts, _ = read(tmp_path / "m.gguf")
    assert facts["general.architecture"] == "llama"
    assert facts["general.name"] == "tales"
    assert facts["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    expected = {
        "vocab_size": 257,
        "context_length": 32,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 40,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 24,
        "attention.value_length": 24,
        "rope.dimension_count": 24,
        "rope.freq_base": 500.0,
    }
    assert {name: facts[f"llama.{name}"] for name in expected} == expected
    assert facts["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-4)
    folder = folder_of(tmp_path / "gpt2", BytesTokenizer(), family="gpt2", norm_eps=1e-3)
    export_gguf(folder, tmp_path / "gpt2.gguf", "f32")
    facts, _ = read(tmp_path / "gpt2.gguf")
    assert facts["gpt2.attention.layer_norm_epsilon"] == pytest.approx(1e-3)
    assert facts["general.file_type"] == gguf.LlamaFileType.ALL_F32


@pytest.mark.parametrize(
    ("name", "written"),
    [("My-Phi-3-mini", "My-phi 3-mini"), ("phi3", "phi 3"), ("phi4", "phi4")],
)
def test_a_model_named_phi3_without_the_tokens_of_phi3_gets_another_name(
    name: str, written: str, tmp_path: Path
) -> None:
    """llama.cpp looks for those tokens in every model of that name, and fails without them."""
    exported = export_gguf(folder_of(tmp_path / name, BytesTokenizer()), tmp_path / "m", "f32")
    assert read(tmp_path / "m")[0]["general.name"] == written
    assert any("expects the tokens of Phi-3" in note for note in exported.notes) == (
        name != written
    )


def vocabulary(path: Path, tokenizer: Tokenizer | None, **shape: Any) -> dict[str, Any]:
    """Return the metadata of a vocabulary, without the prefix of its names."""
    folder_of(path, tokenizer, **shape)
    export_gguf(path, path / "m.gguf", "f32")
    prefix = "tokenizer.ggml."
    facts, _ = read(path / "m.gguf")
    return {n.removeprefix(prefix): part for n, part in facts.items() if prefix in n}


def test_vocabulary_of_bytes_has_a_merge_that_never_applies(tmp_path: Path) -> None:
    facts = vocabulary(tmp_path / "model", BytesTokenizer(), vocab_size=260)
    assert (facts["model"], facts["pre"]) == ("gpt2", "gpt-2")
    assert facts["tokens"][97:100] == ["a", "b", "c"]
    assert facts["tokens"][256:] == ["<|endoftext|>", "<unused 0>", "<unused 1>", "<unused 2>"]
    assert facts["token_type"] == [1] * 256 + [3, 5, 5, 5]
    [merge] = facts["merges"]
    assert all(len(part) > 1 for part in merge.split(" "))
    assert (facts["bos_token_id"], facts["eos_token_id"], facts["add_bos_token"]) == (
        256,
        256,
        False,
    )


def test_trained_vocabulary_has_its_merges_and_the_pattern_of_llama_3(tmp_path: Path) -> None:
    facts = vocabulary(tmp_path / "model", train_bpe([SAMPLE], 400))
    written = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]
    assert facts["pre"] == "llama-bpe"
    assert facts["merges"] == written["merges"]
    assert facts["tokens"] == list(written["vocab"])


def test_split_names_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    names = {"gpt2": "gpt-2", "smollm": "smollm", "llama3": "llama-bpe", "qwen3": "qwen2"}
    names |= {"gpt4": "dbrx", "unordered": "gpt-2"}
    for kind, name in names.items():
        data, _ = vocabularies.published(getattr(vocabularies, kind))
        tokenizer = tokenizer_from_json(data, kind, end_of_text_ids=(300,))
        assert vocabulary(tmp_path / kind, tokenizer)["pre"] == name
    facts = vocabulary(tmp_path / "model", tokenizer_from_json(published_llama3(), "x"))
    begin = published_llama3()["added_tokens"][0]["id"]
    assert (facts["add_bos_token"], facts["bos_token_id"]) == (True, begin)


def published_llama3() -> dict[str, Any]:
    data, _ = vocabularies.published(vocabularies.llama3)
    return json.loads(json.dumps(data).replace("<|eot_id|>", "<|endoftext|>"))


def test_sentencepiece_vocabulary_has_scores_bytes_and_a_space_prefix(tmp_path: Path) -> None:
    data, _ = vocabularies.published(vocabularies.llama2)
    facts = vocabulary(tmp_path / "model", tokenizer_from_json(data, "x", end_of_text_ids=(2,)))
    assert (facts["model"], facts["add_space_prefix"]) == ("llama", True)
    assert facts["token_type"][:4] == [2, 3, 3, 6]
    assert facts["token_type"][259] == 1
    merged = [token for token in facts["tokens"][259:] if len(token) > 1]
    scores = dict(zip(facts["tokens"], facts["scores"], strict=True))
    assert scores[merged[0]] == 0 > scores[merged[1]] > scores[merged[-1]]
    assert "merges" not in facts


def test_chat_template_and_special_ids_come_from_the_folder(tmp_path: Path) -> None:
    specials = {"<|im_start|>": 256, "<|im_end|>": 257, "<pad>": 258, "<|endoftext|>": 259}
    ranks = {bytes([b]): b for b in range(256)}
    encoding = make_encoding("chat", BYTES_PATTERN, ranks, specials)
    folder = folder_of(tmp_path / "model", TiktokenTokenizer("chat", encoding, (259, 257)))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}
    config |= {"chat_template": "{{ messages[0]['content'] }} of the config"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def facts() -> dict[str, Any]:
        (tmp_path / "m.gguf").unlink(missing_ok=True)
        assert export_gguf(folder, tmp_path / "m.gguf", "f32").is_chat
        return read(tmp_path / "m.gguf")[0]

    found = facts()
    roles = ("eos", "eot", "padding")  # two end a text; that of the tokenizer comes first
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [257, 259, 258]
    assert found["tokenizer.chat_template"].endswith("of the config")
    (folder / "chat_template.jinja").write_text("{{ 'of the file' }}")
    assert facts()["tokenizer.chat_template"] == "{{ 'of the file' }}"


def test_model_without_vocabulary_is_written_without_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", None, vocab_size=7)
    exported = export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert "no vocabulary" in exported.notes[0]
    facts, _ = read(tmp_path / "m.gguf")
    assert facts["tokenizer.ggml.model"] == "none"
    assert facts["llama.vocab_size"] == 7


REFUSED = {
    "additive": ({"attention": "additive"}, "models of the kind 'llama, additive'"),
    "lstm": ({"arch": "lstm", "n_head": 1, "d_mlp": 256}, "models of the kind 'lstm'"),
    "gelu": ({"family": "gpt2", "activation": "gelu"}, "'gelu' in the gpt2 .* always .* gelu_tanh"),
    "relu2": ({"activation": "relu2"}, "'relu2' in the llama layout"),
    "biases": ({"qk_norm": True, "attention_bias": "all"}, "attention_bias all in the qwen3"),
    "rope": (
        {"qk_norm": True, "rope_scaling_factor": 2.0},
        "rope_scaling llama3, by 2, in the qwen3",
    ),
    "heads": ({"attention_bias": "qkv", "d_head": 6}, "4 heads of 6 with a width of 64"),
}


@pytest.mark.parametrize("layout", FOREIGN)
def test_every_tensor_of_a_foreign_family_has_a_place(layout: str, tmp_path: Path) -> None:
    """tests/checkpoint/test_llama_cpp.py compares the logits of these."""
    config = model_config_from_hf(FOREIGN[layout] | {"vocab_size": 257})
    model = model_class(config)(config)
    model.init_weights(torch.Generator().manual_seed(7))
    write_model(tmp_path / "model", model.eval(), BytesTokenizer())
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    facts, tensors = read(tmp_path / "m.gguf")
    architecture = facts["general.architecture"]
    stored = load_file(tmp_path / "model" / "model.safetensors")
    extra = {name for name in tensors if name.startswith("rope_f")}
    copies = int(config.tie_embeddings and architecture in ("gptneox", "olmo2"))
    assert len(tensors) - len(extra) - copies == len(stored)
    assert facts[f"{architecture}.context_length"] <= config.context_length
    if architecture.startswith("gemma"):
        norm = torch.from_numpy(tensors["output_norm.weight"].data.copy())
        assert torch.equal(norm, stored["model.norm.weight"] + 1)
    if architecture == "gptneox":
        theirs = stored["gpt_neox.layers.1.attention.query_key_value.weight"]
        value_of_head_2 = theirs[2 * 24 + 16 : 2 * 24 + 24]
        written = torch.from_numpy(tensors["blk.1.attn_qkv.weight"].data.copy())
        assert torch.equal(written[64 + 16 : 64 + 24], value_of_head_2)


REFUSED_FOREIGN = {
    "dynamic": ("llama-linear", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "truncate": (
        "qwen2-yarn",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "truncate": False,
            }
        },
        "yarn with truncate false",
    ),
    "scale": ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar 20"),
    "softcap": ("gemma2", {"attn_logit_softcapping": None}, "without attn_logit_softcapping"),
    "untied": ("gemma", {"tie_word_embeddings": False}, "an output projection beside"),
    "no rope": ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers"),
    "biases": ("gpt_neox", {"attention_bias": False}, "attention_bias none"),
    "width": ("olmo2", {"head_dim": 16}, "4 heads of 16 with a width of 32"),
}


@pytest.mark.parametrize("kind", REFUSED_FOREIGN)
def test_what_llama_cpp_computes_otherwise_in_a_foreign_family_is_refused(
    kind: str, tmp_path: Path
) -> None:
    layout, change, message = REFUSED_FOREIGN[kind]
    config = model_config_from_hf(FOREIGN[layout] | {"vocab_size": 257} | change)
    with pytest.raises(CheckpointError, match=f"does not support .*{message}"):
        architecture_of(config)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_llama_cpp_computes_otherwise_are_refused(kind: str, tmp_path: Path) -> None:
    shape, message = REFUSED[kind]
    folder = folder_of(tmp_path / "model", BytesTokenizer(), **shape)
    with pytest.raises(CheckpointError, match=f"export to GGUF does not support .*{message}"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.glob("*.gguf"))


def changed(make: Callable[[], dict[str, Any]], change: Callable[[Any], Any]) -> dict[str, Any]:
    data = json.loads(json.dumps(vocabularies.published(make)[0]))
    change(data)
    return data


VOCABULARIES = {
    "bert": (vocabularies.bert, lambda data: None, "kind WordPiece"),
    "unigram": (vocabularies.unigram, lambda data: None, "kind Unigram"),
    "nemo": (vocabularies.nemo, lambda data: None, "split pattern is not one of"),
    "prefixed": (
        vocabularies.prefixed,
        lambda data: None,
        "(strips|space before a text)",
    ),
    "lowercase": (
        vocabularies.qwen3,
        lambda data: data.update(normalizer={"type": "Lowercase"}),
        "normalizer is Lowercase",
    ),
    "kept words": (
        vocabularies.smollm,
        lambda data: data["model"].update(ignore_merges=True),
        "split pattern",
    ),
    "words": (
        vocabularies.mistral,
        lambda data: data["pre_tokenizer"].update(split=True),
        "splits a text into words",
    ),
    "no bytes": (
        vocabularies.llama2,
        lambda data: data["model"].update(byte_fallback=False),
        "no byte fallback",
    ),
    "merges": (
        vocabularies.llama2,
        lambda data: data["model"]["merges"].pop(),
        "it never merges",
    ),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_vocabularies_that_llama_cpp_encodes_otherwise_are_refused(
    kind: str, tmp_path: Path
) -> None:
    make, change, message = VOCABULARIES[kind]
    tokenizer = tokenizer_from_json(changed(make, change), "x", end_of_text_ids=(2,))
    folder = folder_of(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=f"not give the same ids .*{message}"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_vocabulary_without_an_end_is_refused(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer("endless", make_encoding("endless", BYTES_PATTERN, ranks, {}))
    folder = folder_of(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=r"no end-of-text token.*Name one as eos_token_id"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer())
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e5
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.up_proj.weight' holds .* 100000"):
        export_gguf(folder, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.glob("*m.gguf*"))
    for type_ in ("f32", "bf16", "q8_0"):
        export_gguf(folder, tmp_path / f"{type_}.gguf", type_)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' holds NaN or inf"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_an_unknown_feature_of_a_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A field that a later version adds changes the model unless it is known to be written."""
    from minigpt.checkpoint.tools import gguf_architectures as module

    config = ModelConfig(vocab_size=9, context_length=8, n_layer=1, n_head=1, d_model=8)
    monkeypatch.setattr(module, "_WRITTEN", module._WRITTEN.replace("norm_eps", ""))
    assert module.architecture_of(config).name == "llama"
    with pytest.raises(CheckpointError, match=r"norm_eps 0.5 in the llama layout"):
        module.architecture_of(replace(config, norm_eps=0.5))


def test_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer())
    quantize = gguf.quantize

    def full(rows: Any, kind: Any) -> Any:
        if rows.ndim == 2:
            raise OSError(28, "No space left on device")
        return quantize(rows, kind)

    monkeypatch.setattr(gguf, "quantize", full)
    with pytest.raises(ResourceError, match="No space left"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf.*pip install '\S+\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "f32")


def test_large_matrices_are_converted_some_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer())
    export_gguf(folder, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("minigpt.checkpoint.tools.gguf._VALUES_AT_ONCE", 200)
    quantize, sizes = gguf.quantize, []
    monkeypatch.setattr(gguf, "quantize", lambda r, k: sizes.append(r.size) or quantize(r, k))
    export_gguf(folder, tmp_path / "parts.gguf", "q8_0")
    assert max(sizes) <= 200
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


def test_names_and_templates_that_are_not_utf_8_are_written_as_replaced(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / os.fsdecode(b"tales\xff"), BytesTokenizer())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "a\ud800"}, {"name": "tool", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    facts, _ = read(tmp_path / "m.gguf")
    assert facts["general.name"] == "tales\ufffd"
    assert facts["tokenizer.chat_template"] == "a\ufffd"
    assert facts["tokenizer.chat_template.tool"] == "b"
