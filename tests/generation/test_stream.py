"""Streamed text, compared with text decoded and cut in one call."""

import random
from collections.abc import Sequence

import pytest

from minigpt.generation.decoder import FinishReason, Step
from minigpt.generation.stops import StopFinder
from minigpt.generation.stream import TextStep, stream_text
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import END_OF_TEXT, BytesTokenizer, Tokenizer

BYTES = BytesTokenizer()
PIECES = [
    b"ab",
    b"abc",
    b"bca",
    "é".encode(),
    b"\xc3",
    "ab日".encode()[:-1],
    b" a",
    "🙂🙂".encode(),
]
RANKS = {bytes([b]): b for b in range(256)} | {p: 256 + i for i, p in enumerate(PIECES[:4])}
RANKS |= {p: 256 + i for i, p in enumerate(PIECES) if p not in RANKS}
WIDE = TiktokenTokenizer("wide", make_encoding("wide", r"(?s:.)+", RANKS, {END_OF_TEXT: 300}))


def steps_of(tokens: Sequence[int], finish: FinishReason | None = "length") -> list[Step]:
    last = len(tokens) - 1
    return [Step(i, i, t, -1.0, finish if i == last else None) for i, t in enumerate(tokens)]


def streamed(
    tokens: Sequence[int],
    stops: Sequence[str] = (),
    tokenizer: Tokenizer = BYTES,
    finish: FinishReason = "length",
) -> list[TextStep]:
    return list(stream_text(steps_of(tokens, finish), tokenizer, stops))


def joined(items: list[TextStep]) -> str:
    return "".join(item.text for item in items)


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cut before the stop string completed first, or the longest of several: a plain search."""
    for end in range(len(text) + 1):
        endings = [stop for stop in stops if text[:end].endswith(stop)]
        if endings:
            return text[: end - max(map(len, endings))], True
    return text, False


def unfinished_bytes(data: bytes) -> int:
    """Return how many bytes at the end are the start of an incomplete character."""
    for n in (1, 2, 3):
        for more in (b"\x80", b"\x80\x80", b"\x80\x80\x80"):
            try:
                if len((data[-n:] + more).decode()) == 1 and len(data) >= n:
                    return n
            except UnicodeDecodeError:
                pass
    return 0


@pytest.mark.integration
@pytest.mark.parametrize("tokenizer", [BYTES, WIDE], ids=["bytes", "wide"])
def test_streamed_text_equals_the_decoded_text_up_to_the_stop_string(tokenizer: Tokenizer) -> None:
    source = random.Random(1)
    stop_choices = ["ab", "b", "abc", "bca", "aab", "é", "bé", "日", "a日", "\ufffd", "aa", "ca c"]
    ids = [97, 98, 99, 32] * 3 + [0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xFF]
    if tokenizer is WIDE:
        ids += list(range(256, 256 + len(PIECES)))
    n_found = 0
    for _ in range(2000):
        tokens = source.choices(ids, k=source.randint(1, 14))
        stops = source.sample(stop_choices, k=source.randint(0, 3))
        items = streamed(tokens, stops, tokenizer)
        data = tokenizer.decode_bytes(tokens)
        whole = data[: len(data) - unfinished_bytes(data)].decode("utf-8", "replace")
        expected, is_found = cut(whole, stops)
        assert joined(items) == expected, (tokens, stops)
        assert items[-1].step.finish == ("stop" if is_found else "length")
        n_found += is_found
    assert 300 < n_found < 1900  # both outcomes occurred


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one. two", (".",), "one"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("xabcd", ("abcd", "bc"), "xa"),  # bc is completed first
        ("xabc", ("bc", "abc"), "x"),  # completed together: the longer one is cut
        ("abab", ("abc",), "abab"),
        ("", ("a",), ""),
        ("stop", ("stop",), ""),
        ("a\n\nb", ("\n\n",), "a"),
        ("caf\u00e9!", ("\u00e9",), "caf"),
        ("日本", ("本",), "日"),
    ],
)
def test_stop_strings_do_not_depend_on_token_boundaries(
    text: str, stops: tuple[str, ...], expected: str
) -> None:
    source = random.Random(2)
    for _ in range(50):
        cuts = sorted(source.choices(range(len(text) + 1), k=source.randint(0, 4)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        finder = StopFinder(stops)
        result = "".join(finder.push(piece) for piece in pieces) + finder.finish()
        assert result == expected, pieces
        assert finder.is_found == (expected != text)


def test_a_stop_string_ends_the_stream_at_the_step_that_completes_it() -> None:
    items = streamed(b"one two three", stops=("two",))
    assert len(items) == 7
    assert items[-1].step.finish == "stop"
    assert items[-1].step.index == 6
    assert [item.step.finish for item in items[:-1]] == [None] * 6


def test_no_token_is_generated_after_a_stop_string() -> None:
    taken = []

    def steps():  # type: ignore[no-untyped-def]
        for step in steps_of(b"a.b"):
            taken.append(step.token)
            yield step

    list(stream_text(steps(), BYTES, (".",)))
    assert bytes(taken) == b"a."


def test_text_is_yielded_as_soon_as_it_is_final() -> None:
    assert [item.text for item in streamed("aé日".encode())] == ["a", "", "é", "", "", "日"]
    items = streamed(b"xstay", stops=("stop",))
    assert [item.text for item in items] == ["x", "", "", "sta", "y"]


def test_held_back_text_is_yielded_with_the_last_step() -> None:
    assert [item.text for item in streamed(b"ab st", stops=("stop",))] == ["a", "b", " ", "", "st"]
    assert [item.text for item in streamed(b"st\xff", stops=("stop",))] == ["", "", "st\ufffd"]


@pytest.mark.parametrize("finish", ["length", "context"])
@pytest.mark.parametrize("part", [b"\xe6", b"\xe6\x97", b"\xf0\x9f\x99", b"\xc3"])
def test_a_length_limit_inside_a_character_drops_its_bytes(
    finish: FinishReason, part: bytes
) -> None:
    assert joined(streamed("a日".encode() + part, finish=finish)) == "a日"


def test_an_end_of_text_inside_a_character_gives_a_replacement_character() -> None:
    assert joined(streamed([*b"a\xe6", 256], finish="end_of_text")) == "a\ufffd"


def test_a_stop_string_at_the_very_end_is_found() -> None:
    items = streamed([*b"a\xe6", 256], stops=("\ufffd",), finish="end_of_text")
    assert joined(items) == "a"
    assert items[-1].step.finish == "stop"


def test_an_end_of_text_has_no_text_and_releases_held_back_text() -> None:
    items = streamed([*b"hi s", 256], stops=("stop",), finish="end_of_text")
    assert joined(items) == "hi s"
    assert items[-1].step.finish == "end_of_text"
    assert items[-1].text == "s"


def test_an_end_of_text_token_that_does_not_end_the_text_is_shown() -> None:
    assert joined(streamed([*b"a", 256, *b"b"])) == f"a{END_OF_TEXT}b"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    assert joined(streamed([97, 299, 98], tokenizer=WIDE)) == "ab"


def test_an_empty_stream_yields_nothing() -> None:
    assert list(stream_text([], BYTES, ("a",))) == []
