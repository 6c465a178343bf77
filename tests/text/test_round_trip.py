"""Properties of every tokenizer: decoding undoes encoding, and streaming equals decoding."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.checkpoint.vocabulary_files import json_from_scores
from minigpt.generation.decoder import Step
from minigpt.generation.stream import TextStream
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer

SAMPLE = "the owl's nest, the owls' 1234 nests: über-owls\r\n\t東京 " * 3
STORIES = Path(__file__).parents[3] / "shared" / "weights" / "stories260K" / "sp_vocab.json"


def imported() -> Tokenizer:
    """Return a byte-level vocabulary that is encoded by the tokenizers library."""
    data = tokenizer_to_json(train_bpe([SAMPLE], 280))
    data["normalizer"] = {"type": "Sequence", "normalizers": []}
    return tokenizer_from_json(data, "imported")


def stories() -> Tokenizer:
    """Return a SentencePiece vocabulary with byte fallback."""
    if not STORIES.exists():
        pytest.skip("needs ../shared/weights/stories260K")
    return tokenizer_from_json(json_from_scores(json.loads(STORIES.read_text())), "stories")


@functools.cache
def cached_tokenizer(make: Callable[[], Tokenizer]) -> Tokenizer:
    return make()


def bpe() -> Tokenizer:
    return train_bpe([SAMPLE], 300)


ALL = pytest.mark.parametrize("make", [BytesTokenizer, bpe, imported, stories])
TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("the owls 12'\n  <|>é東🙂"))
)


@pytest.mark.integration
@ALL
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_decoding_undoes_encoding(make: Callable[[], Tokenizer], text: str) -> None:
    tokenizer = cached_tokenizer(make)
    expected = text
    if make is stories:  # it adds a space before a text and decodes U+2581 as a space
        expected = f" {text}".replace("\u2581", " ") if text else ""
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    assert tokenizer.token_byte_lengths[tokenizer.encode(text)].sum() == len(expected.encode())


@pytest.mark.integration
@ALL
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_streamed_text_equals_text_decoded_in_one_call(
    make: Callable[[], Tokenizer], data: st.DataObject
) -> None:
    tokenizer = cached_tokenizer(make)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), min_size=1))
    stream = TextStream(tokenizer)
    steps = [Step(i, i, token, -1.0, None) for i, token in enumerate(ids)]
    # Finish by an end of text, because a length limit drops an incomplete character.
    end = Step(len(ids), len(ids), 0, -1.0, "end_of_text")
    text = "".join(stream.push(step).text for step in (*steps, end))
    assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_a_character_is_streamed_when_its_last_byte_arrives(text: str) -> None:
    stream = TextStream(BytesTokenizer())
    shown = [stream.push(Step(i, i, b, -1.0, None)).text for i, b in enumerate(text.encode())]
    assert shown == [""] * (len(text.encode()) - 1) + [text]
