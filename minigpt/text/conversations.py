"""Encode rows that are conversations as tokens to train on, through a chat template."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.errors import DataError, cut
from minigpt.text.building import Encoded, counts_of, without_unencodable
from minigpt.text.chat import ChatTemplate, map_texts
from minigpt.text.corpus import Corpus, Document
from minigpt.text.tokenizer import Tokenizer, well_formed
from minigpt.text.tokens import CONTEXT_ONLY

_ROLES = {"human": "user", "gpt": "assistant"}
"""ShareGPT's names of roles -> roles."""


def conversation_of_row(row: object) -> str:
    """Return the messages of a row as JSON: a list, or an object if the row has tools too.

    Raises: DataError if it has none; its message continues a sentence that begins with the row.
    """
    row = row if isinstance(row, Mapping) else {}
    tools, messages = _tools(row.get("tools")), _messages(row)
    if not messages or not isinstance(messages, list):
        raise DataError(
            'has no "messages", or "prompt" and "completion", or "instruction" and "output", or '
            '"conversations"'
        )
    for message in messages:
        is_message = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not is_message or not isinstance(message.get("content", ""), str | list | None):
            raise DataError("has a message that is not an object with role and content")
    roles = dict.fromkeys(message["role"] for message in messages)
    if "assistant" not in roles:
        raise DataError(f"has no assistant message: its roles are {cut([*roles])[1:-1]}")
    found = messages if tools is None else {"messages": messages, "tools": tools}
    return well_formed(json.dumps(found, ensure_ascii=False))


def _messages(row: Mapping[str, Any]) -> Any:
    """Return the messages of a row, unchecked; None if it is not a conversation."""
    if row.get("messages") is not None:
        return row["messages"]
    if {"prompt", "completion"} <= row.keys():
        return _turns(row, "prompt", "user") + _turns(row, "completion", "assistant")
    if {"instruction", "output"} <= row.keys() and "prompt" not in row:
        return _instruction(row)
    if isinstance(turns := row.get("conversations"), list):
        return [_message(turn) for turn in turns]
    return None


def _turns(row: Mapping[str, Any], name: str, role: str) -> list[Any]:
    """Return the messages in a field: a list of them, or the text of one with this role."""
    value = row[name]
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise DataError(f'has a "{name}" that is neither a string nor a list of messages')
    return value


def _message(turn: object) -> object:
    """Return a turn of a "conversations" list as a message; ShareGPT uses from and value."""
    if not isinstance(turn, Mapping) or "role" in turn or not {"from", "value"} <= turn.keys():
        return turn
    return {"role": _ROLES.get(str(turn["from"]), turn["from"]), "content": turn["value"]}


def _tools(tools: Any) -> Any:
    """Return the tools of a row, which may be JSON in a string."""
    with suppress(ValueError, RecursionError):
        tools = json.loads(tools) if isinstance(tools, str) else tools
    if tools is not None and not (
        isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)
    ):
        raise DataError('has "tools" that are not a list of objects')
    return tools


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of a row with instruction, optional input, and output."""
    values = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, value in values.items():
        if not isinstance(value, str) and (name != "input" or value is not None):
            raise DataError(f'has an "{name}" that is not a string')
    parts = (values["instruction"], values["input"])
    prompt = "\n\n".join(part for part in parts if part)
    return [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": values["output"]},
    ]


def _parsed(text: str, template: ChatTemplate) -> tuple[list[Any], ChatTemplate]:
    """Return the messages in JSON of ``conversation_of_row``, and the template with their tools."""
    found = json.loads(text)
    if isinstance(found, list):
        return found, template
    return found["messages"], replace(template, tools=found["tools"])


def rendered_text(text: str, template: ChatTemplate) -> str:
    """Return the rendered text of a conversation, given as JSON; empty if it is refused."""
    with suppress(DataError):
        messages, template = _parsed(text, template)
        return template.render(messages, add_generation_prompt=False)
    return ""


def encode_rows(chunk: list[Document], corpus: Corpus, tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Encode documents that are conversations, each with ``encode_row``."""
    data, arrays, n_bytes = corpus.data, [np.array([], np.uint32)], 0
    refused: list[str] = []
    skipped = Counter[str]()
    for piece in chunk:
        text = piece.text
        if data.skip_unencodable:
            text, dropped = _without_unencodable(text, tokenizer)
            skipped.update(dropped)
        try:
            tokens = encode_row(text, corpus.template, tokenizer, data.loss_on or "all")
        except DataError as error:
            if not data.skip_bad:
                raise
            refused.append(str(error))
        else:
            arrays.append(tokens)
            n_bytes += int(tokenizer.token_byte_lengths[tokens % CONTEXT_ONLY].sum())
    tokens = np.concatenate(arrays, dtype=dtype, casting="unsafe")
    counts = counts_of(chunk, tokens, n_bytes=n_bytes, n_bad_rows=len(refused), skipped=skipped)
    n_documents = counts.n_documents - len(refused)
    first = next(iter(refused), "")
    return Encoded(chunk, tokens, replace(counts, n_documents=n_documents, bad_row=first))


def _without_unencodable(text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Apply ``without_unencodable`` to a conversation given as JSON."""
    dropped: list[str] = []

    def encodable(value: str) -> str:
        kept, missing = without_unencodable(value, tokenizer)
        dropped.append(missing)
        return kept

    return json.dumps(map_texts(json.loads(text), encodable), ensure_ascii=False), "".join(dropped)


def encode_row(
    text: str, template: ChatTemplate, tokenizer: Tokenizer, loss_on: str
) -> npt.NDArray[np.uint32]:
    """Return the separator of documents and the tokens of a conversation, given as JSON.

    Args: loss_on, completion to add CONTEXT_ONLY to tokens that are not the assistant's; else all.
    """
    messages, template = _parsed(text, template)
    try:
        if loss_on == "all":
            ids = template.encode(tokenizer, messages, add_generation_prompt=False)
            is_counted = [True] * len(ids)
        else:
            ids, is_counted = template.encode_answers(tokenizer, messages)
    except RecursionError:
        raise DataError(f"a conversation is nested too deeply: {text[:100]!r}.") from None
    except DataError as error:
        raise DataError(f"{error} The conversation begins {text[:100]!r}.") from None
    prefix, before = list(tokenizer.prefix), list(tokenizer.separator)
    if prefix and ids[: len(prefix)] == prefix:  # most templates begin with it
        before = before[: len(before) - len(prefix)]
    marks = [CONTEXT_ONLY * (loss_on != "all")] * len(before)
    marks += [CONTEXT_ONLY * (not counted) for counted in is_counted]
    return np.array([*before, *ids], np.uint32) | np.array(marks, np.uint32)
