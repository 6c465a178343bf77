"""Generated text wraps between words on a terminal, however it is split into tokens."""

import random
import textwrap

import pytest
from rich.cells import cell_len

from minigpt.commands.generate.samples import WrappedText

STORY = "The old queen said: do not open the (very heavy) door, and nobody did. " * 6


@pytest.fixture(params=[20, 37, 80])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def shown(text: str, seed: int = 0) -> str:
    """Return the terminal output of a text streamed in pieces of 1 to 6 characters."""
    written: list[str] = []
    screen, source = WrappedText(), random.Random(seed)
    while text:
        cut = source.randint(1, 6)
        screen.write(text[:cut], written.append)
        text = text[cut:]
    screen.flush(written.append)
    return "".join(written)


@pytest.mark.parametrize("seed", range(5))
def test_streamed_prose_wraps_like_textwrap(width: int, seed: int) -> None:
    lines = textwrap.wrap(STORY, width, break_on_hyphens=False)
    assert shown(STORY.rstrip(), seed).split("\n") == lines


def test_indents_line_breaks_and_short_lines_are_kept(width: int) -> None:
    code = "def f(x):\n    y = x\n\n    return y\n"
    assert shown(code) == code


def test_text_without_spaces_wraps_between_characters(width: int) -> None:
    text = "从前有一座山。山上有一座庙。" * 20
    written = shown(text)
    assert written.replace("\n", "") == text
    assert max(map(cell_len, written.split("\n"))) in (width, width - 1)


def test_a_word_wider_than_the_terminal_is_wrapped_by_the_terminal(width: int) -> None:
    address = "https://example.org/" + "a" * 200
    assert shown(f"See {address} now").replace("\n", " ") == f"See {address} now"


def test_control_characters_are_escaped() -> None:
    assert shown("red\x1b[31m text") == "red\\x1b[31m text"
