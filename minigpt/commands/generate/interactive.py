"""minigpt generate --interactive: continue the text from each typed line."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain
from typing import Any

from minigpt.commands.generate.samples import SampleDisplay
from minigpt.commands.loading import (
    LONGEST_PROMPT_BYTES,
    PromptedModel,
    compiling,
    decode_prompt,
    note_special,
)
from minigpt.commands.options import ModelSource
from minigpt.config import SamplingConfig
from minigpt.console import note
from minigpt.errors import DataError
from minigpt.files import make_folder
from minigpt.generation.conversation import Conversation
from minigpt.generation.loading import encode_prompt
from minigpt.generation.stream import TextStep, stream_text
from minigpt.places import cache_folder

_MARKER = "> "
_HISTORY_LINES = 1000


@contextmanager
def editing_lines() -> Iterator[None]:
    """Edit typed lines with readline, if available, and keep their history in the cache.

    readline treats a paste of several lines as one line, so it becomes one text.
    """
    if not _has_editor():
        yield
        return
    import readline

    path = cache_folder() / "history"
    readline.set_history_length(_HISTORY_LINES)
    readline.set_auto_history(True)
    readline.parse_and_bind("set enable-bracketed-paste on")
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            make_folder(path.parent)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # what was typed is private
            readline.write_history_file(path)


def _has_editor() -> bool:
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return is_terminal and find_spec("readline") is not None


@editing_lines()
def converse(
    prompted: PromptedModel,
    sampling: SamplingConfig,
    display: SampleDisplay,
    source: ModelSource,
    seed: int,
    *,
    has_prompt: bool,
    special: bool = False,
) -> None:
    """Continue from each text of standard input, until its end.

    The cache keeps the earlier turns, so only the new text is processed. In a chat, the texts are
    messages, and empty ones are skipped. With overflow stop, the text after an answer that fills
    the context window starts a new context.

    Args: seed, of the first answer; later ones have the following seeds. has_prompt, whether the
        first text is the prompt of the command line. special, whether special tokens are parsed.
    """
    decoder: Conversation | None = None
    tokenizer, chat = prompted.tokenizer, prompted.chat
    is_noted = special or chat is not None
    texts = chain([prompted.text] if has_prompt else [], iter(_typed, None))
    for index, text in enumerate(texts):
        is_prompt = has_prompt and index == 0
        if chat is not None and not text:
            continue
        if not (is_noted or is_prompt):
            is_noted = note_special(tokenizer, text)
        try:
            decoder = _continued(decoder, text, prompted, sampling, source, special=special)
        except DataError as error:  # too long; the next one may fit
            note(str(error))
            continue
        except KeyboardInterrupt:  # while a long text is processed
            _break_line()
            note("interrupted")
            continue
        steps = decoder.generate(sampling, seed=seed, end_of_text=tokenizer.end_of_text_ids)
        answer: list[str] = []
        display.show(
            _collected(stream_text(steps, tokenizer, sampling.stop), answer),
            seed=seed,
            prompt=text,
            n_prompt_tokens=len(decoder.prompt),
            is_prompt_shown=is_prompt and chat is None,
        )
        if chat is not None:
            chat.answered("".join(answer))
        if decoder.is_full and sampling.overflow == "stop":
            note("the context window is full: the next text starts a new one; see --overflow slide")
            decoder = None
            if chat is not None:
                chat.restart()
        seed += 1


def _continued(
    decoder: Conversation | None,
    text: str,
    prompted: PromptedModel,
    sampling: SamplingConfig,
    source: ModelSource,
    *,
    special: bool,
) -> Conversation:
    """Return the decoder, or a new one, with a text or message added to its prompt.

    Raises: DataError if it does not fit into the context; the decoder is unchanged.
    """
    tokenizer, chat = prompted.tokenizer, prompted.chat
    if chat is not None:
        ids = _chat_ids(chat, text, prompted.model.config.context_length, sampling)
    elif decoder is None:
        ids = encode_prompt(tokenizer, text, special=special)
    else:
        ids = tokenizer.encode(text, is_start=False, special=special)
    if decoder is None:
        overflow = None if chat else sampling.overflow  # a message is not cut
        with compiling(prompted.model, source.compile):
            return Conversation(prompted.model, ids, compile=source.compile, overflow=overflow)
    if chat is not None:
        decoder.replace(ids)
    else:
        decoder.extend(ids, overflow=sampling.overflow)
    return decoder


def _chat_ids(chat: Any, text: str, context_length: int, sampling: SamplingConfig) -> list[int]:
    """Return the ids of a chat and a new message; a sliding window leaves out the oldest turns."""
    room = min(sampling.max_new_tokens, context_length // 2)
    slides = sampling.overflow == "slide"
    ids: list[int]
    ids, n_dropped = chat.ask(text, context_length - room if slides else None)
    if n_dropped:
        note(f"the context window is full: the oldest {n_dropped} messages are left out")
    return ids


def _collected(items: Iterable[TextStep], texts: list[str]) -> Iterator[TextStep]:
    """Yield the items, and append their texts to a list."""
    for item in items:
        texts.append(item.text)
        yield item


def _read_line() -> str | None:
    """Return the next line, prompting with a marker on a terminal; None at the end of input.

    Raises: DataError if it is not UTF-8, or is too long for any context.
    """
    if _has_editor():
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        try:
            return _decoded_line(input(_MARKER).encode(errors="surrogateescape"))
        except EOFError:
            return None
    if sys.stdin.isatty():
        sys.stderr.write(_MARKER)
        sys.stderr.flush()
    data = sys.stdin.buffer.readline(LONGEST_PROMPT_BYTES + 1)
    return _decoded_line(data) if data else None


def _typed() -> str | None:
    r"""Return the next typed text without its last line break; None at the end of input.

    A line that ends with \ continues on the next one. Ctrl-C discards the text.
    """
    lines: list[str] = []
    while True:
        try:
            line = _read_line()
        except KeyboardInterrupt:
            lines = []
            _break_line()
            note("Ctrl-D ends")
            continue
        if line is None or not line.endswith("\\"):
            break
        lines.append(line[:-1])
    if line is None and not lines:
        _break_line()
        return None
    return "\n".join([*lines, line or ""])


def _break_line() -> None:
    if sys.stdin.isatty():
        sys.stderr.write("\n")


def _decoded_line(data: bytes) -> str:
    return decode_prompt(data, "a line on standard input").removesuffix("\n").removesuffix("\r")
