"""Parts that vocabularies share: a split pattern, the characters of bytes, nested steps."""

from collections.abc import Mapping
from typing import Any

from minigpt.errors import DataError

# How GPT-4 and Llama 3 split text before merging: Dubey et al. 2024, arXiv:2407.21783, and
# tiktoken's cl100k_base. It uses no possessive quantifiers, so every regex engine reads it.
BPE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# GPT-2's bijection of bytes to printable characters: Radford et al. 2019, encoder.py.
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = enumerate(byte for byte in range(256) if byte not in _PRINTABLE)
BYTE_OF_CHARACTER = {chr(b): b for b in _PRINTABLE} | {chr(256 + n): b for n, b in _OTHERS}
"""Characters that represent bytes in a byte-level tokenizer.json -> these bytes."""


def steps_of(part: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a part of tokenizer.json as a flat list."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [dict(part)]
    names = ("normalizers", "pretokenizers", "decoders")
    nested = (step for name in names for step in part.get(name, ()))
    return [inner for step in nested for inner in steps_of(step)]


def unencodable_error(name: str, what: str) -> DataError:
    """Return the error for a text with a character that is not in a vocabulary."""
    return DataError(
        f"the vocabulary {name!r} has no token for the {what}. Leave that character out of the "
        "text; train, prepare and evaluate do so with --skip-unencodable."
    )
