"""Untrusted vocabularies are read quickly or refused in one line."""

import copy
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hostile_values import changed, places, values
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.errors import CheckpointError, DataError, MinigptError
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import make_encoding
from minigpt.text.shard_files import tokenizer_from_dict
from minigpt.text.vocabulary_parts import BPE_PATTERN

TEXT = "the cat sat, and the dog ran 12 times\n\n  under\tthe mat q x é 日本 🙂. "
PLAIN: dict[str, Any] = tokenizer_to_json(train_bpe([TEXT * 9], 300))
PLACES = list(places(PLAIN))
EMPTY = ["a*", r"(?=q)|\w+", r"\b", r"\p{L}+|\s*", r"(?<=x)|.", r"(a+)+$", "", "^|a", "x{0,2}"]


def with_pattern(pattern: str) -> dict[str, Any]:
    data = copy.deepcopy(PLAIN)
    data["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern
    return data


@pytest.mark.parametrize("pattern", EMPTY)
def test_a_pattern_that_can_match_nothing_is_never_passed_to_tiktoken(
    pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if pattern != r"(a+)+$":
        with pytest.raises(DataError, match="matches the empty string"):
            make_encoding("x", pattern, {bytes([b]): b for b in range(256)}, {})
    data = with_pattern(pattern)
    tokenizer = tokenizer_from_json(data, "x")
    library = Library.from_str(json.dumps(data))
    assert tokenizer.encode(TEXT) == library.encode(TEXT, add_special_tokens=False).ids
    assert "panicked" not in capfd.readouterr().err


def test_the_usual_patterns_are_encoded_with_tiktoken() -> None:
    gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    for pattern in (BPE_PATTERN, gpt2):
        assert type(tokenizer_from_json(with_pattern(pattern), "x")).__name__ == "TiktokenTokenizer"


def growing(n_merges: int) -> dict[str, Any]:
    """Return a vocabulary with the merges a a, aa a, aaa a, ..."""
    data = copy.deepcopy(PLAIN)
    vocab, merges = data["model"]["vocab"], data["model"]["merges"]
    for n in range(1, n_merges):
        vocab.setdefault("a" * (n + 1), len(vocab))
        merges.append("a" * n + " a")
    return data


def test_merges_that_take_cubic_time_use_the_tokenizers_library() -> None:
    data = growing(900)
    assert len(json.dumps(data)) > 800_000
    started = time.process_time()
    tokenizer = tokenizer_from_json(data, "x")
    n_seconds = time.process_time() - started
    library = Library.from_str(json.dumps(data))
    text = "aaaa baaaaa " * 5
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids
    assert n_seconds < 20, "cubic merging would take a minute"


def test_a_vocabulary_with_too_many_added_tokens_is_refused() -> None:
    data = copy.deepcopy(PLAIN)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"] += [
        {"id": 300 + i, "content": f"<{i}>", "special": True} | flags for i in range(100_000)
    ]
    with pytest.raises(CheckpointError, match="100,001 added tokens, and at most 65,536 are read"):
        tokenizer_from_json(data, "x")


def use(data: dict[str, Any]) -> None:
    """Read a vocabulary and encode with it; each may fail with a one-line error."""
    try:
        tokenizer = tokenizer_from_json(data, "x")
        ids = tokenizer.encode(TEXT)
        assert max(ids, default=0) < tokenizer.vocab_size
        tokenizer.decode(ids)
        tokenizer_from_dict(tokenizer.to_dict())
    except MinigptError as error:
        message = str(error)
    else:
        message = ""
    assert len(message) < 600


@pytest.mark.integration
@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.sampled_from(PLACES), values)
def test_any_single_change_of_a_tokenizer_json_is_read_or_refused(
    place: tuple[Any, ...], value: Any
) -> None:
    data = changed(PLAIN, place, value)
    if isinstance(data, dict):
        use(data)


@pytest.mark.torture
@settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=3))
def test_several_changes_of_a_tokenizer_json_are_read_or_refused(changes: list[Any]) -> None:
    data: Any = PLAIN
    for place, value in changes:
        try:
            data = changed(data, place, value)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change removed this place
    if isinstance(data, dict):
        use(data)


def test_tokenizer_files_of_arbitrary_bytes_are_refused(model_folder: Path) -> None:
    from minigpt.checkpoint.model_folder import read_model

    for content in (b"", b"{", b"\xff", b"[]", b"5", b"[" * 100_000, b'{"model": 1}' * 2):
        (model_folder / "tokenizer.json").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
            read_model(model_folder)
