"""What generate and attention-trace begin with: a model, its tokenizer and a prompt."""

import sys
from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint.folder import resolve_model
from minigpt.checkpoint.model_folder import read_model
from minigpt.errors import CheckpointError, DataError
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import Tokenizer

_LONGEST_PROMPT_BYTES = 2**24


@dataclass(frozen=True)
class Ready:
    """A model that is ready to continue a prompt."""

    model: GPT
    tokenizer: Tokenizer
    folder: Path
    text: str
    """The prompt as it was given; empty for the start of a new document."""
    prompt: list[int]
    """Its tokens."""


def load(
    spec: str | None, prompt: str | None, device_name: str | None, dtype_name: str | None
) -> Ready:
    """Read a model and encode a prompt for it; None is the start of a document.

    Raises: DataError for a prompt that is empty, no text or, by far, too long; CheckpointError
        for a model that is missing, damaged or has no tokenizer; ConfigError for a device that is
        not there.
    """
    text = read_prompt(prompt)
    folder = resolve_model(spec)
    device = resolve_device(device_name or "auto")
    # A cached decoding step at batch 1 is bound by memory and, on a CPU, by calls: bfloat16 has to
    # be asked for there.
    automatic = "float32" if device.type == "cpu" else "auto"
    dtype = resolve_dtype(automatic if dtype_name in (None, "auto") else dtype_name, device)
    loaded = read_model(folder, device=device, dtype=dtype)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise CheckpointError(
            f"{str(folder)!r} has neither tokenizer.json nor sp_vocab.json, so text means nothing "
            "to it. Add the one that the model was trained with."
        )
    ids = tokenizer.encode_prompt(text)
    if not ids:
        raise DataError("this model has no token that begins a document. Give a prompt.")
    return Ready(loaded.model, tokenizer, folder, text, ids)


def read_prompt(prompt: str | None) -> str:
    """Return the prompt's text, to the last byte: as given, or for ``-`` from standard input.

    Raises: DataError if it is there and empty, is not UTF-8, or could fit no context.
    """
    if prompt is None:
        return ""
    data = _standard_input() if prompt == "-" else prompt.encode(errors="surrogateescape")
    where = "the prompt on standard input" if prompt == "-" else "the prompt"
    if not data:
        raise DataError(f"{where} is empty. Give some text, or no prompt for a new document.")
    if len(data) > _LONGEST_PROMPT_BYTES:
        raise DataError(
            f"{where} is longer than {_LONGEST_PROMPT_BYTES // 2**20} MiB, and no model sees as "
            "much. Give its end only."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte {error.start} does not fit. Convert it first, as "
            "with iconv."
        ) from None


def _standard_input() -> bytes:
    if sys.stdin.isatty():
        print("Type the prompt; Ctrl-D ends it.", file=sys.stderr)  # noqa: T201
    return sys.stdin.buffer.read(_LONGEST_PROMPT_BYTES + 1)
