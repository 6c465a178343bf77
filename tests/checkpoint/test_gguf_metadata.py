"""GGUF metadata: shape, vocabulary and chat template of the model."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published_vocabularies as vocabularies
import pytest
from fuzzed_texts import SAMPLE
from gguf_files import folder_of, read

from minigpt.checkpoint.tokenizer_json import tokenizer_from_json
from minigpt.checkpoint.tools.gguf import export_gguf
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BYTES_PATTERN, BytesTokenizer, Tokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf to read GGUF files")


def test_gguf_metadata_has_the_shape_of_the_model(tmp_path: Path) -> None:
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


def test_a_model_in_the_cache_of_the_hub_has_its_name_and_not_that_of_the_commit(
    tmp_path: Path,
) -> None:
    folder = folder_of(tmp_path / "models--org--tiny-gpt" / "snapshots" / "0f9a", BytesTokenizer())
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert read(tmp_path / "m.gguf")[0]["general.name"] == "tiny-gpt"


@pytest.mark.parametrize(
    ("name", "written"),
    [("My-Phi-3-mini", "My-phi 3-mini"), ("phi3", "phi 3"), ("phi4", "phi4")],
)
def test_a_model_named_phi3_without_its_special_tokens_is_renamed(
    name: str, written: str, tmp_path: Path
) -> None:
    """llama.cpp requires those tokens in every model with that name."""
    exported = export_gguf(folder_of(tmp_path / name, BytesTokenizer()), tmp_path / "m", "f32")
    assert read(tmp_path / "m")[0]["general.name"] == written
    assert any("expects the tokens of Phi-3" in note for note in exported.notes) == (
        name != written
    )


def vocabulary(path: Path, tokenizer: Tokenizer | None, **shape: Any) -> dict[str, Any]:
    """Return the metadata of a vocabulary, without the name prefix."""
    folder_of(path, tokenizer, **shape)
    export_gguf(path, path / "m.gguf", "f32")
    prefix = "tokenizer.ggml."
    facts, _ = read(path / "m.gguf")
    return {n.removeprefix(prefix): part for n, part in facts.items() if prefix in n}


def test_a_byte_vocabulary_is_written_with_a_merge_that_never_applies(tmp_path: Path) -> None:
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


def test_a_trained_vocabulary_has_its_merges_and_the_pattern_of_llama_3(tmp_path: Path) -> None:
    facts = vocabulary(tmp_path / "model", train_bpe([SAMPLE], 400))
    written = json.loads((tmp_path / "model" / "tokenizer.json").read_text())["model"]
    assert facts["pre"] == "llama-bpe"
    assert facts["merges"] == written["merges"]
    assert facts["tokens"] == list(written["vocab"])


@pytest.mark.integration
def test_the_pre_tokenizer_name_matches_the_vocabulary(tmp_path: Path) -> None:
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


def test_a_sentencepiece_vocabulary_has_scores_bytes_and_a_space_prefix(tmp_path: Path) -> None:
    data, _ = vocabularies.published(vocabularies.llama2)
    facts = vocabulary(tmp_path / "model", tokenizer_from_json(data, "x", end_of_text_ids=(2,)))
    assert (facts["model"], facts["add_space_prefix"]) == ("llama", True)
    assert facts["token_type"][:4] == [2, 3, 3, 6]
    assert facts["token_type"][259] == 1
    merged = [token for token in facts["tokens"][259:] if len(token) > 1]
    scores = dict(zip(facts["tokens"], facts["scores"], strict=True))
    assert scores[merged[0]] == 0 > scores[merged[1]] > scores[merged[-1]]
    assert "merges" not in facts


def test_added_tokens_have_the_ids_that_the_tokenizers_library_gives_them(tmp_path: Path) -> None:
    data = json.loads(json.dumps(vocabularies.published(vocabularies.gpt2)[0]))
    named = ((705, "<|endoftext|>"), (710, "<tool>"))  # with gaps, which the library closes
    data["added_tokens"] = [vocabularies.special(*token) for token in named]
    tokenizer = tokenizer_from_json(data, "gaps")
    export_gguf(folder_of(tmp_path / "gaps", tokenizer), tmp_path / "m.gguf", "f32")
    facts, _ = read(tmp_path / "m.gguf")
    ids = tokenizer.encode("<tool><|endoftext|>", special=True)
    assert [facts["tokenizer.ggml.tokens"][id_] for id_ in ids] == ["<tool>", "<|endoftext|>"]


def chatting(make: Callable[[], dict[str, Any]], **options: bool) -> Tokenizer:
    data = json.loads(json.dumps(vocabularies.published(make)[0]))
    id_ = len(data["model"]["vocab"])
    data["added_tokens"] = [*data["added_tokens"], vocabularies.special(id_, "[INST]") | options]
    data["model"]["vocab"] |= {"[INST]": id_, "<": id_ + 1, "<s": id_ + 2}
    data["model"]["merges"].append("< s")
    return tokenizer_from_json(data, "chatting", end_of_text_ids=(2,))


def test_notes_say_how_llama_cpp_reads_special_tokens(tmp_path: Path) -> None:
    expected = {
        "mistral": "begins with one or follows a special token",
        "llama2": "llama.cpp keeps spaces beside special tokens such as '[INST]'",
        "gemma": "llama.cpp reads '<s>' in a text as the special token",
    }
    for name, part in expected.items():
        tokenizer = chatting(getattr(vocabularies, name), rstrip=name == "llama2")
        folder = folder_of(tmp_path / name, tokenizer)
        assert part in "\n".join(export_gguf(folder, tmp_path / f"{name}.gguf", "f32").notes)


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
    roles = ("eos", "eot", "padding")  # two tokens end a text; the tokenizer's comes first
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in roles] == [257, 259, 258]
    assert found["tokenizer.chat_template"].endswith("of the config")
    (folder / "chat_template.jinja").write_text("{{ 'of the file' }}")
    assert facts()["tokenizer.chat_template"] == "{{ 'of the file' }}"


def test_a_model_without_vocabulary_is_exported_without_one(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", None, vocab_size=7)
    exported = export_gguf(folder, tmp_path / "m.gguf", "f32")
    assert "no vocabulary" in exported.notes[0]
    assert not exported.has_vocabulary
    facts, _ = read(tmp_path / "m.gguf")
    assert facts["tokenizer.ggml.model"] == "none"
    assert facts["llama.vocab_size"] == 7


def test_invalid_utf8_in_names_and_templates_is_replaced(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / os.fsdecode(b"tales\xff"), BytesTokenizer())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    templates = [{"name": "default", "template": "a\ud800"}, {"name": "tool", "template": "b"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": templates}))
    export_gguf(folder, tmp_path / "m.gguf", "f32")
    facts, _ = read(tmp_path / "m.gguf")
    assert facts["general.name"] == "tales\ufffd"
    assert facts["tokenizer.chat_template"] == "a\ufffd"
    assert facts["tokenizer.chat_template.tool"] == "b"
