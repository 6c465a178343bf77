"""Models that llama.cpp would compute or encode differently are not exported as GGUF."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import published_vocabularies as vocabularies
import pytest
from gguf_files import folder_of
from layout_models import OTHER_FAMILIES
from safetensors.torch import load_file, save_file

from minigpt.checkpoint import families
from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json
from minigpt.checkpoint.tools.gguf import export_gguf
from minigpt.checkpoint.tools.gguf_architectures import ARCHITECTURES, architecture_of
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, ResourceError
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BYTES_PATTERN, BytesTokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf to read GGUF files")

REFUSED = {
    "additive": ({"attention": "additive"}, "models of type 'llama, additive'"),
    "lstm": ({"arch": "lstm", "n_head": 1, "d_mlp": 256}, "models of type 'lstm'"),
    "gelu": ({"family": "gpt2", "activation": "gelu"}, "'gelu' in the gpt2 .* always .* gelu_tanh"),
    "relu2": ({"activation": "relu2"}, "'relu2' in the llama layout"),
    "biases": ({"qk_norm": True, "attention_bias": "all"}, "attention_bias all in the qwen3"),
    "rope": (
        {"qk_norm": True, "rope_scaling_factor": 2.0},
        "rope_scaling llama3, by 2, in the qwen3",
    ),
    "heads": ({"attention_bias": "qkv", "d_head": 6}, "4 heads of 6 with a width of 64"),
}

LONG_ROPE = {
    "rope_scaling": {
        "rope_type": "longrope",
        "short_factor": [1.0, 1.0, 1.0, 1.5],
        "long_factor": [2.0, 2.0, 2.0, 2.0],
    }
}
REFUSED_FEATURES = {
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
        "yarn with beta_fast 32, beta_slow 1 and truncate false",
    ),
    "betas": (
        "olmo2-yarn",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32,
                "beta_slow": 0.5,
            }
        },
        "yarn with beta_fast 32, beta_slow 0.5 and truncate true, by 4",
    ),
    "longrope": ("olmo2", LONG_ROPE, "rope_scaling longrope in the olmo2 layout"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 20}, "query_pre_attn_scalar 20"),
    "softcap": ("gemma2", {"attn_logit_softcapping": None}, "without attn_logit_softcapping"),
    "untied": ("gemma", {"tie_word_embeddings": False}, "an output projection that is not tied"),
    "no rope": ("smollm3", {"no_rope_layer_interval": 3}, "no_rope_layers"),
    "biases": ("gpt_neox", {"attention_bias": False}, "attention_bias none"),
    "width": ("olmo2", {"head_dim": 16}, "4 heads of 16 with a width of 32"),
}


@pytest.mark.parametrize("kind", REFUSED_FEATURES)
def test_features_that_llama_cpp_computes_differently_in_other_families_are_refused(
    kind: str, tmp_path: Path
) -> None:
    layout, change, message = REFUSED_FEATURES[kind]
    config = model_config_from_hf(OTHER_FAMILIES[layout] | {"vocab_size": 257} | change)
    with pytest.raises(CheckpointError, match=f"does not support .*{message}"):
        architecture_of(config)


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_llama_cpp_computes_differently_are_refused(kind: str, tmp_path: Path) -> None:
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
        "(strips|adds a space before a text)",
    ),
    "lowercase": (
        vocabularies.qwen3,
        lambda data: data.update(normalizer={"type": "Lowercase"}),
        "normalizer is Lowercase",
    ),
    "ignored merges": (
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
    "normalized": (
        vocabularies.llama2,
        lambda data: data["added_tokens"].append(
            vocabularies.special(len(data["model"]["vocab"]), "Foo", is_special=False)
            | {"normalized": True}
        ),
        "the added token 'Foo' is found after spaces only",
    ),
    "merges": (
        vocabularies.llama2,
        lambda data: data["model"]["merges"].pop(),
        "it never merges",
    ),
}


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_vocabularies_that_llama_cpp_encodes_differently_are_refused(
    kind: str, tmp_path: Path
) -> None:
    make, change, message = VOCABULARIES[kind]
    tokenizer = tokenizer_from_json(changed(make, change), "x", end_of_text_ids=(2,))
    folder = folder_of(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=f"not give the same ids .*{message}"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_a_vocabulary_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer("endless", make_encoding("endless", BYTES_PATTERN, ranks, {}))
    folder = folder_of(tmp_path / "model", tokenizer)
    with pytest.raises(CheckpointError, match=r"no end-of-text token.*Name one as eos_token_id"):
        export_gguf(folder, tmp_path / "m.gguf", "f32")


def test_values_out_of_range_for_a_tensor_type_are_refused(tmp_path: Path) -> None:
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
    """An unknown field may change the model, so it must be refused until the export supports it."""
    from minigpt.checkpoint.tools import gguf_architectures as module

    config = ModelConfig(vocab_size=9, context_length=8, n_layer=1, n_head=1, d_model=8)
    monkeypatch.setattr(module, "_WRITTEN", module._WRITTEN.replace("norm_eps", ""))
    assert module.architecture_of(config).name == "llama"
    with pytest.raises(CheckpointError, match=r"norm_eps 0.5 in the llama layout"):
        module.architecture_of(replace(config, norm_eps=0.5))


def test_a_full_disk_leaves_no_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_missing_gguf_package_is_reported_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the package gguf.*pip install '\S+\[gguf\]'"):
        export_gguf(tmp_path, tmp_path / "m.gguf", "f32")


def test_the_documents_name_the_families_that_are_not_exported() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/export.md").read_text()
    named = re.search("are exported except (.*?), which", page, re.DOTALL)
    assert named, page
    known = {path.stem for path in Path(families.__file__).parent.glob("[!_]*.py")}
    assert set(re.findall(r"`(\w+)`", named[1])) == known - ARCHITECTURES.keys()
