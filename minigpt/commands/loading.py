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


@dataclass(frozen=True)
class Ready:
    """A model that is ready to continue a prompt."""

    model: GPT
    tokenizer: Tokenizer
    folder: Path
    prompt: list[int]


def load(spec: str | None, prompt: str | None, device_name: str, dtype_name: str) -> Ready:
    """Read a model and encode a prompt for it.

    No prompt is the beginning of a document, ``<|endoftext|>``.
    """
    text = _read_prompt(prompt)
    folder = resolve_model(spec)
    device = resolve_device(device_name)
    # A cached decoding step at batch 1 is bound by memory and, on a CPU, by calls: bfloat16 has to
    # be asked for there.
    is_plain_cpu = dtype_name == "auto" and device.type == "cpu"
    dtype = resolve_dtype("float32" if is_plain_cpu else dtype_name, device)
    loaded = read_model(folder, device=device, dtype=dtype)
    if loaded.tokenizer is None:
        raise CheckpointError(
            f"{str(folder)!r} has no tokenizer.json, so text means nothing to it. "
            "Add the tokenizer.json that the model was trained with."
        )
    tokenizer = loaded.tokenizer
    if text:
        ids = tokenizer.encode(text)
    elif tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    else:
        raise DataError("this model has no token that begins a document. Give a prompt.")
    return Ready(loaded.model, tokenizer, folder, ids)


def _read_prompt(prompt: str | None) -> str:
    if prompt != "-":
        return prompt or ""
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the prompt on standard input is not UTF-8 text (at byte {error.start}). "
            "Convert it first."
        ) from None
