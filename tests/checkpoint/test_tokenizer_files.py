"""vocab.json and merges.txt without tokenizer.json, and tokens without an embedding."""

import json
from pathlib import Path
from typing import Any

import pytest
from fuzzed_texts import fuzzed_texts
from layout_models import make_model

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tokenizer_json import read_tokenizer, tokenizer_to_json
from minigpt.errors import CheckpointError
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer

WORDS = ("the cat's hat", "1984", "<|endoftext|>", "<pad>", "<think>", " déjà")


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(["the cat's hat and the cats' hats, 1984 déjà vu " * 3], 300)


def write_files(folder: Path, bpe: Tokenizer, config: dict[str, Any], **files: Any) -> None:
    model = tokenizer_to_json(bpe)["model"]
    vocab = {token: id_ for token, id_ in model["vocab"].items() if token != "<|endoftext|>"}
    merges = "\n".join(["#version: 0.2", *model["merges"], ""])
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"tokenizer_class": "GPT2Tokenizer"},
    "spaced": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
    "padded": {"tokenizer_class": "GPT2TokenizerFast", "pad_token": "<pad>", "eos_token": "a"},
    "begun": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": "<s>"},
    "neox": {"tokenizer_class": "GPTNeoXTokenizer"},
    "neox-begun": {"tokenizer_class": "GPTNeoXTokenizerFast", "add_bos_token": True},
    "qwen2": {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": {
            str(299 + n): {
                "content": token,
                "special": token != "<think>",
                "lstrip": False,
                "rstrip": False,
                "single_word": False,
                "normalized": False,
            }
            for n, token in enumerate(("<|endoftext|>", "<|im_end|>", "<think>"))
        },
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_vocab_json_and_merges_txt_are_read_as_in_transformers(
    name: str, bpe: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")
    write_files(tmp_path, bpe, CONFIGS[name])
    kind = getattr(transformers, CONFIGS[name]["tokenizer_class"])
    theirs = kind.from_pretrained(tmp_path, local_files_only=True)
    ours = read_tokenizer(tmp_path)
    assert ours is not None
    for text in fuzzed_texts(60, WORDS):
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text) == expected, text
        assert ours.decode(expected) == theirs.decode(
            expected, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
    assert dict(ours.special_ids) == theirs.get_added_vocab()
    expected = theirs("the cat's hat", split_special_tokens=True).input_ids
    assert ours.encode_prompt("the cat's hat") == expected


def test_added_tokens_json_adds_its_ids(bpe: Tokenizer, tmp_path: Path) -> None:
    write_files(tmp_path, bpe, {}, added_tokens={"<pad>": 305, "<|endoftext|>": 299})
    ours = read_tokenizer(tmp_path)
    assert ours is not None
    assert ours.special_ids == {"<|endoftext|>": 299, "<pad>": 305}


def test_an_unknown_tokenizer_class_or_damaged_merges_are_refused(
    bpe: Tokenizer, tmp_path: Path
) -> None:
    write_files(tmp_path, bpe, {"tokenizer_class": "RobertaTokenizer"})
    with pytest.raises(CheckpointError, match=r"'RobertaTokenizer' cannot be read .*save_pretr"):
        read_tokenizer(tmp_path)
    write_files(tmp_path, bpe, {})
    (tmp_path / "merges.txt").write_text("q zzz\n")
    with pytest.raises(CheckpointError, match=r"is damaged .*out of vocabulary"):
        read_tokenizer(tmp_path)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"merges.txt .*is damaged \(UnicodeDecodeError"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("is_in_vocab", [False, True])
def test_an_added_token_without_an_embedding_is_never_produced(
    is_in_vocab: bool, tmp_path: Path
) -> None:
    write_model(tmp_path, make_model(257, "gpt2-tied"), BytesTokenizer())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    pad = data["added_tokens"][0] | {"id": 257, "content": "<pad>", "special": False}
    data["added_tokens"].append(pad)
    if is_in_vocab:
        data["model"]["vocab"]["<pad>"] = 257
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    tokenizer = read_model(tmp_path).tokenizer
    assert tokenizer is not None
    assert tokenizer.vocab_size == 257
    assert tokenizer.encode("<pad>") == list(b"<pad>")


def test_text_that_begins_with_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, make_model(257, "gpt2-tied"), BytesTokenizer())
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": 257, "content": "<s>"})
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [257], "tokens": ["<s>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=r"begins each text with the id 257, .*0 to 256"):
        read_model(tmp_path)


def test_a_vocabulary_of_another_model_is_refused(bpe: Tokenizer, tmp_path: Path) -> None:
    write_model(tmp_path, make_model(257, "gpt2-tied"), BytesTokenizer())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer_to_json(bpe)))
    with pytest.raises(CheckpointError, match=r"has \d+ tokens, and the model only 257"):
        read_model(tmp_path)
