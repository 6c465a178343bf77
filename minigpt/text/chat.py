"""Chat templates: a conversation -> text and token ids.

Text and ids equal those of transformers' ``apply_chat_template``, with one exception: special
tokens that a message contains as text stay plain text, so that no message can end its turn.
"""

import copy
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.errors import CheckpointError, ConfigError, DataError, MinigptError
from minigpt.files import read_bytes, read_json, resource_errors
from minigpt.text.chat_sandbox import ANSWER, ANSWER_END, rendered
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, well_formed
from minigpt.text.tokenizer_classes import TOKENIZER_CONFIG, named_tokens, tokenizer_settings

Message = Mapping[str, Any]
"""One turn: its ``role`` (system, user, assistant, ...) and ``content``."""

TEMPLATE_FILE = "chat_template.jinja"
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['content'] is not string or message['tool_calls'] %}"
    "{{ raise_exception('it renders texts only, not tool calls or lists of parts') }}{% endif %}"
    "{{ message['role'] | capitalize }}:\n{{ message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n\n' }}"
    "{% endfor %}"
    "{{ 'Assistant:\n' if add_generation_prompt }}"
)
"""Template for a vocabulary whose only special token is end-of-text."""
_PLAIN = "the plain chat template"

# Unicode noncharacters, which normal text does not contain; they are removed from messages.
_BEGIN, _END = "\ufdd0", "\ufdd1"  # around a special token that is plain text
_MARKED = re.compile(f"{_BEGIN}[^{_END}]*{_END}")
_NONCHARACTERS = re.compile("[\ufdd0-\ufdd3]")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may use."""

    source: str
    """Jinja source."""
    tokens: Mapping[str, str]
    """Special tokens by name: bos_token, eos_token and so on."""
    where: str
    """Description of its origin, for error messages."""
    with_tools: str | None = None
    """Jinja source for conversations with tools. None to use ``source`` for them too."""
    tools: Sequence[Any] | None = None
    """JSON schemas of the functions that the assistant may call. None for no functions."""

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """Return the text of a conversation.

        Args: add_generation_prompt, whether the text ends with the beginning of an answer.
        Raises: DataError if the template refuses the messages; CheckpointError if it is invalid,
            fails, violates the sandbox, or does not terminate.
        """
        return _NONCHARACTERS.sub("", self._rendered(messages, add_generation_prompt))

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the ids of a conversation; raise the errors of ``render``."""
        marked = replace(self, tools=_marked(self.tools, tokenizer))
        text = marked._rendered(_marked(messages, tokenizer), add_generation_prompt)
        ids = _encode(tokenizer, re.sub(f"[{ANSWER}{ANSWER_END}]", "", text))
        if not ids:
            raise DataError(
                f"{self.where} renders these messages as empty text. Use another --chat-template."
            )
        return ids

    def encode_answers(
        self, tokenizer: Tokenizer, messages: Sequence[Message]
    ) -> tuple[list[int], list[bool]]:
        """Return the ids of a conversation, and whether each is the assistant's.

        These are the tokens that a model must generate: each answer and the special token after it,
        or the contents of the template's ``{% generation %}`` blocks. A token that is only partly
        inside counts.

        Raises: the errors of ``render``; DataError if the template changes the text around an
            answer.
        """
        marked = _marked(messages, tokenizer)
        template = replace(self, tools=_marked(self.tools, tokenizer))
        text, spans = _generation_spans(template._rendered(marked, False))
        if not spans:
            spans = [
                template._span(tokenizer, text, marked, index)
                for index, message in enumerate(marked)
                if message.get("role") == "assistant"
            ]
        ids = _encode(tokenizer, text)
        is_answer = [False] * len(ids)
        for start, stop in spans:
            first, _ = _ids_before(tokenizer, ids, text[:start])
            _, last = _ids_before(tokenizer, ids, text[:stop])
            is_answer[first:last] = [True] * (last - first)
        return ids, is_answer

    def end_of_turn(self, tokenizer: Tokenizer) -> int | None:
        """Return the id of the special token after an answer; None if there is none."""
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _BEGIN}]
        rendered_text = self._rendered(messages, False)
        tokenizer.require_rows(rendered_text)
        after = rendered_text.partition(_BEGIN)[2]
        found = tokenizer.special_pattern.match(_NONCHARACTERS.sub("", after).lstrip())
        return tokenizer.special_ids[found[0]] if found else None

    def _span(
        self, tokenizer: Tokenizer, text: str, messages: Sequence[Message], index: int
    ) -> tuple[int, int]:
        """Return the span of an answer and the special token after it in the rendered text."""
        changed = [*messages]
        changed[index] = {**messages[index], "content": _BEGIN + _END}
        before, found, after = self._rendered(changed, False).partition(_BEGIN + _END)
        fits = text.startswith(before) and text.endswith(after)
        if not found or not fits or len(before) + len(after) > len(text):
            raise DataError(
                f"{self.where} renders the rest of a conversation differently for a different "
                "answer, so answers cannot be found. Use {% generation %} in it, or --loss-on all."
            )
        start, stop = len(before), len(text) - len(after)
        with suppress(DataError, CheckpointError):  # a template may refuse incomplete conversations
            prompt = self._rendered(messages[:index], True) if index else before
            if text.startswith(prompt):  # the generation prompt may end before the answer
                start = min(start, len(prompt))
        special = re.compile(rf"\s*{tokenizer.special_pattern.pattern}").match(after)
        return start, stop + (special.end() if special else 0)

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        source = self.source if self.tools is None else self.with_tools or self.source
        return rendered(
            source,
            self.where,
            **self.tokens,
            messages=[_plain(message) for message in messages],
            tools=self.tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
        )


def read_chat_template(folder: Path, named: str | None = None) -> ChatTemplate:
    """Return the chat template of a model folder.

    Args: named, a file, or the name of a template if the folder has several; None for its
        default.
    Raises: ConfigError if there is no such template; CheckpointError if a file is damaged.
    """
    try:
        templates = templates_of(folder)
    except CheckpointError:
        if named is None:
            raise
        templates = {}
    where = f"the chat template of {str(folder)!r}"
    if named is not None and named not in templates:
        where = f"the chat template {named!r}"
        source = _read(Path(named).expanduser())
    elif (named or "default") in templates:
        source = templates[named or "default"]
    elif templates:
        raise ConfigError(
            f"{str(folder)!r} has several chat templates and no default: "
            f"{', '.join(map(repr, sorted(templates)))}. Choose one with --chat-template NAME."
        )
    else:
        raise ConfigError(
            f"{str(folder)!r} has no chat template, so it may not be a chat model. Leave --chat "
            f"out, or give another model's {TEMPLATE_FILE} with --chat-template FILE."
        )
    with_tools = templates.get("tool_use") if named is None else None
    return ChatTemplate(source, named_tokens(tokenizer_settings(folder)), where, with_tools)


def training_template(named: str | None, folder: Path | None) -> ChatTemplate:
    """Return the template of a model folder, or the plain one if it has none.

    Args: named, as for ``read_chat_template``; folder, None to train from scratch.
    Raises: the errors of ``read_chat_template``; ConfigError if no token ends an answer.
    """
    tokens = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
    if folder is not None:
        if named is not None or templates_of(folder):
            return read_chat_template(folder, named)
        tokens = named_tokens(tokenizer_settings(folder))
        if "eos_token" not in tokens:
            raise ConfigError(
                f"{str(folder)!r} has no chat template, and no eos_token for the plain one. Give a "
                "template with --chat-template FILE."
            )
    if named is not None:
        return ChatTemplate(_read(Path(named).expanduser()), tokens, f"the template {named!r}")
    return ChatTemplate(PLAIN_TEMPLATE, tokens, _PLAIN)


def plain_note(template: ChatTemplate, folder: Path) -> str:
    """Return a note that a model folder has no template of its own; empty if it has one."""
    if template.where != _PLAIN:
        return ""
    return (
        f"{str(folder)!r} has no chat template: the plain one is used (User:, Assistant:); "
        "--chat-template FILE gives another"
    )


class Chat:
    """A conversation that grows turn by turn."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, system: str | None) -> None:
        """Args: system, the text of the system message; None for none."""
        self._template, self._tokenizer = template, tokenizer
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[Message] = []

    def ask(self, text: str, n_tokens: int | None = None) -> tuple[list[int], int]:
        """Return the ids of the conversation with a new user message.

        Args: n_tokens, the number of ids above which the oldest turns are dropped permanently;
            None to drop none.
        Returns: the ids, and the number of messages dropped by this call.
        """
        asked = {"role": "user", "content": text}
        n_dropped = 0
        while True:
            turns = [*self._turns[n_dropped:], asked]
            ids = self._template.encode(self._tokenizer, [*self._system, *turns])
            if n_tokens is None or len(ids) <= n_tokens or n_dropped == len(self._turns):
                self._asked = turns
                return ids, n_dropped
            n_dropped += 2

    def answered(self, text: str) -> None:
        """Add the assistant's answer to the last ``ask``."""
        self._turns = [*self._asked, {"role": "assistant", "content": text}]

    def restart(self) -> None:
        """Drop all turns; the system message stays."""
        self._turns = []


def ending_turns(tokenizer: Tokenizer, template: ChatTemplate) -> Tokenizer:
    """Return a copy of the tokenizer whose end-of-text tokens include those that end a turn."""
    ends = {tokenizer.special_ids.get(template.tokens.get("eos_token", ""))}
    with suppress(DataError):  # the template may refuse the messages used to find it
        ends.add(template.end_of_turn(tokenizer))
    changed = copy.copy(tokenizer)
    known = tokenizer.end_of_text_ids
    new = sorted(end for end in ends if end is not None and end not in known)
    changed.end_of_text_ids = (*known, *new)
    return changed


def check_messages(messages: list[Any]) -> None:
    """Raise DataError if the messages of a prompt are not objects with a role."""
    if not all(isinstance(m, Mapping) and isinstance(m.get("role"), str) for m in messages):
        raise DataError(
            "the messages of the prompt are not a list of messages. Each must be an object with "
            'role and content, such as {"role": "user", "content": "Hi"}.'
        )


def templates_of(folder: Path) -> dict[str, str]:
    """Return the templates of a folder by name; files take precedence, as in transformers.

    Raises: CheckpointError if one is damaged.
    """
    path = folder / TOKENIZER_CONFIG
    stored = read_json(path).get("chat_template") if os.path.lexists(path) else None
    found = {"default": stored} if isinstance(stored, str) else stored or {}
    try:
        if not isinstance(found, Mapping):
            found = {t["name"]: t["template"] for t in found}
        found = {str(name): str(template) for name, template in found.items()}
    except (TypeError, KeyError):
        raise CheckpointError(
            f"the chat_template in {str(path)!r} is neither a string nor a list of objects with "
            "name and template. Correct it, or give another with --chat-template FILE."
        ) from None
    others = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files = {path.stem: _read(path, CheckpointError) for path in others}
    if os.path.lexists(folder / TEMPLATE_FILE):
        files["default"] = _read(folder / TEMPLATE_FILE, CheckpointError)
    return files or found


def _read(path: Path, kind: type[MinigptError] = ConfigError) -> str:
    try:
        with resource_errors(path):
            return read_bytes(path).decode("utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise kind(
            f"the chat template {str(path)!r} cannot be read: {reason}. Name a file with a Jinja "
            "template."
        ) from None


def _plain(message: Message) -> dict[str, Any]:
    """Return a message as transformers passes it: without None, reasoning under both names."""
    kept = {key: value for key, value in message.items() if value is not None}
    names = ("reasoning_content", "thinking", "reasoning")
    reasoning = next((kept[name] for name in names if name in kept), None)
    if reasoning is None:
        return kept
    return {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return messages or tools with ``change`` applied to every string in them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {key: map_texts(item, change) for key, item in value.items()}
    is_list = isinstance(value, list | tuple)
    return [map_texts(item, change) for item in value] if is_list else value


def _marked(value: Any, tokenizer: Tokenizer) -> Any:
    """Mark special tokens in the strings of messages or tools, so that they stay plain text."""

    def mark(text: str) -> str:
        plain = _NONCHARACTERS.sub("", well_formed(text))
        for token in tokenizer.without_row:
            plain = plain.replace(token, f"{_BEGIN}{token}{_END}")
        return tokenizer.special_pattern.sub(f"{_BEGIN}\\1{_END}", plain)

    return map_texts(value, mark)


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a rendered text, in which marked special tokens are plain text."""
    if _BEGIN not in text and _END not in text:
        return tokenizer.encode(text, special=True)
    tokenizer.require_rows(_MARKED.sub("", text))
    special = tokenizer.special_pattern.pattern
    ids: list[int] = []
    token: str | None = None
    segments: list[tuple[str | None, str]] = []
    at = 0
    for match in re.finditer(f"{_BEGIN}{special.replace('(', '(?:', 1)}{_END}|{special}", text):
        if match[1]:
            segments.append((token, text[at : match.start()]))
            token, at = match[1], match.end()
    segments.append((token, text[at:]))
    for token, segment in segments:
        is_start = True
        if token is not None:  # some vocabularies encode the text after it as the start of a text
            is_start = tokenizer.encode(f"{token}a", special=True)[1:] == tokenizer.encode("a")
            ids.append(tokenizer.special_ids[token])
        ids += tokenizer.encode(re.sub(f"[{_BEGIN}{_END}]", "", segment), is_start=is_start)
    return ids


def _generation_spans(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Remove the marks of generation blocks; return the text and the blocks' spans."""
    parts, spans, size = [], [], 0
    for part in re.split(f"([{ANSWER}{ANSWER_END}])", text):
        if part == ANSWER:
            spans.append((size, size))
        elif part == ANSWER_END:
            spans[-1] = (spans[-1][0], size)
        else:
            parts.append(part)
            size += len(part)
    return "".join(parts), spans


def _ids_before(tokenizer: Tokenizer, ids: Sequence[int], before: str) -> tuple[int, int]:
    """Return how many of a text's ids end before a position, and how many begin before it.

    Args: ids, those of the full text; before, the text before the position.
    """
    part = _encode(tokenizer, before)
    n = min(len(ids), len(part))
    differs = np.array(ids[:n]) != np.array(part[:n])
    n = int(differs.argmax()) if differs.any() else n
    n_bytes = len(tokenizer.decode_bytes(part[n:]))  # text that ``ids`` splits into other tokens
    while n_bytes and n_bytes >= (size := len(tokenizer.token_bytes(ids[n]))):
        n, n_bytes = n + 1, n_bytes - size
    return n, n + bool(n_bytes)
