"""Streamed text equals text decoded at once."""

import random

import pytest

from minigpt.text.utf8 import Utf8Stream

LEADS = [0x41, 0x7F, 0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]


def random_bytes(rng: random.Random) -> bytes:
    """Sequences that are mostly broken, with whole and cut characters among them."""
    parts = [
        bytes(rng.choices(LEADS, k=rng.randrange(6))),
        "é€😀\ufeffß".encode()[: rng.randrange(14)],
        rng.randbytes(rng.randrange(6)),
        b"\xed\xa0\x80",  # a surrogate, which is no character
    ]
    rng.shuffle(parts)
    return b"".join(parts)


def test_streamed_text_equals_decode_with_replace_wherever_it_is_split() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        data = random_bytes(rng)
        stream, text, start = Utf8Stream(), "", 0
        while start < len(data):
            stop = start + rng.randrange(1, 4)
            text += stream.push(data[start:stop])
            start = stop
        assert text + stream.finish() == data.decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["é", "€", "😀"])
def test_a_character_appears_with_its_last_byte_and_not_before(text: str) -> None:
    stream = Utf8Stream()
    data = text.encode()
    shown = [stream.push(data[i : i + 1]) for i in range(len(data))]
    assert shown == [""] * (len(data) - 1) + [text]


def test_a_finished_stream_starts_afresh() -> None:
    stream = Utf8Stream()
    stream.push(b"\xe2\x82")
    assert stream.finish() == "\ufffd"
    assert stream.push("€".encode()) + stream.finish() == "€"
