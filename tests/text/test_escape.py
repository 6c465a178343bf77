"""Escaping of untrusted text with control characters of Unicode and terminals."""

import sys
import unicodedata

import pytest

from minigpt.text.escape import printable, token_name, visible
from minigpt.text.joined import JoinedTokens

# Unicode's Bidi_Control property (PropList.txt), and the terminal's own control characters.
BIDI_CONTROLS = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
C0_AND_C1 = [*range(0x20), *range(0x7F, 0xA0)]


def test_printable_text_has_no_terminal_control_characters() -> None:
    steering = {*map(chr, [*C0_AND_C1, *BIDI_CONTROLS, 0x2028, 0x2029, 0xFEFF, 0xD800, 0xDFFF])}
    steering -= {"\n", "\t"}
    for character in steering:
        assert not steering & set(printable(f"a{character}b")), hex(ord(character))


@pytest.mark.integration
def test_escaped_text_of_every_character_is_encodable_and_harmless() -> None:
    shown: set[str] = set()
    for start in range(0, sys.maxunicode + 1, 4096):
        text = "".join(map(chr, range(start, start + 4096)))
        shown |= {*printable(text), *visible(text.encode("utf-8", "surrogatepass"))}
    "".join(shown).encode("utf-8")
    left = {unicodedata.category(character) for character in shown - set("\n\t\u200c\u200d")}
    assert not left & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@pytest.mark.parametrize(
    "text", ["", "plain", "Grüße, 世界\n\tend", "e\u0301", "می\u200cشود", "👩\u200d🚀"]
)
def test_harmless_text_is_unchanged(text: str) -> None:
    assert printable(text) == text


@pytest.mark.integration
def test_only_control_invisible_and_combining_characters_are_escaped() -> None:
    unsafe = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        is_kept = unicodedata.category(character) not in unsafe or character in "\n\t\u200c\u200d"
        assert (printable(character) == character) == is_kept, hex(code)


def test_escapes_name_the_character() -> None:
    hostile = "\x1b]0;title\x07 \x9b31m \u202e \U000e0041"
    assert printable(hostile) == r"\x1b]0;title\x07 \x9b31m \u202e \U000e0041"


def test_visible_shows_spaces_line_breaks_and_partial_characters() -> None:
    assert visible(b" a\n\t\r\\") == r"␣a\n\t\r\\"
    assert visible("é".encode()[:1]) == r"\xc3"
    assert visible("é".encode()[1:]) == r"\xa9"
    assert visible(b"\xff\xfe") == r"\xff\xfe"


def test_visible_is_one_line_without_hidden_or_combining_characters() -> None:
    assert (
        visible("\u0301a".encode()) == r"\u0301a"
    )  # a mark that would combine with the preceding column
    assert visible("\u00a0\u3000\u200d".encode()) == r"\xa0\u3000\u200d"


def test_visible_distinguishes_all_bytes() -> None:
    shown = [visible(bytes([b])) for b in range(256)]
    assert len(set(shown)) == 256


def test_jamo_skin_tones_and_fillers_are_escaped() -> None:
    for hidden in "\u1160\u3164\uffa0\ud7b0\U0001f3fd":
        assert visible(hidden.encode()) == hidden.encode("unicode_escape").decode()
    assert visible("\uac00\u1100".encode()) == "\uac00\u1100"  # a syllable, a first consonant


SEQUENCES = [
    "今日は、世界",
    "مرحبا بالعالم",
    "👩\u200d🚀 go",
    "e\u0301\u202eabc\u2066\x00\x1b[31m",
    "</script>\u2028日",
    "ascii only",
]


@pytest.mark.parametrize("text", SEQUENCES)
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_joined_tokens_show_each_character_of_a_text_once(text: str, size: int) -> None:
    data = text.encode()
    joined = JoinedTokens(data[i : i + size] for i in range(0, len(data), size))
    assert "".join(joined.texts) == visible(data)
    assert not joined.is_open


def test_the_first_token_of_a_character_shows_it_and_later_ones_continue_it() -> None:
    joined = JoinedTokens([b"a\xe6", b"\x97", b"\xa5\xe6\x9c", b"\xac!", b"b"])
    assert joined.texts == ["a日", "", "本", "!", "b"]
    assert joined.names == ["a日", "⋯日", "⋯日本", "⋯本!", "b"]
    empty = JoinedTokens([b"\xe6", b"", b"\x97\xa5"])
    assert empty.names == ["日", "∅", "⋯日"]


@pytest.mark.parametrize(
    "tokens",
    [
        [b"\xe6", b"x"],
        [b"\xe6\x97", b"\xe6\x97", b"\xc3"],
        [b"\x97", b"\xa5"],
        [b"\xed", b"\xa0", b"\x80"],  # half a surrogate pair
        [b"\xf4", b"\x90", b"\x80", b"\x80"],  # beyond Unicode
        [b"\xc0", b"\xaf"],  # overlong
        [b"\xff", b"", b"\xfe"],
    ],
)
def test_invalid_bytes_stay_escaped_token_by_token(tokens: list[bytes]) -> None:
    joined = JoinedTokens(tokens)
    assert joined.texts == [visible(token) for token in tokens]
    assert joined.names == [token_name(token) for token in tokens]


def test_a_character_is_incomplete_until_its_last_byte() -> None:
    joined = JoinedTokens()
    opened = []
    for byte in "é🙂".encode():
        joined.add(bytes([byte]))
        opened.append(joined.is_open)
    assert opened == [True, False, True, True, True, False]


def test_a_token_without_text_is_shown_by_its_name() -> None:
    assert [token_name(data) for data in (b"", b" a", "∅".encode())] == ["∅", "␣a", "∅"]
