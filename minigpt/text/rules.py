"""What published vocabularies do besides splitting and merging; ours do none of it."""

import base64
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

VISIBLE_SPACE = "\u2581"
"""What SentencePiece writes for a space."""


def _prefixed(text: str) -> str:
    return VISIBLE_SPACE + text.replace(" ", VISIBLE_SPACE) if text else ""


def _prefixed_once(text: str) -> str:
    is_prefixed = text.startswith((" ", VISIBLE_SPACE))
    return text.replace(" ", VISIBLE_SPACE) if is_prefixed else _prefixed(text)


NORMALIZATIONS: Mapping[str, Callable[[str], str]] = {
    "": str,
    "NFC": partial(unicodedata.normalize, "NFC"),
    "metaspace": _prefixed,
    "metaspace once": _prefixed_once,
}
"""What is done to a text before it is split; metaspace: a space before it, and spaces visible."""


@dataclass(frozen=True)
class Rules:
    """How a vocabulary is used, if not plainly."""

    normalization: str = ""
    """A key of NORMALIZATIONS."""
    added: tuple[str, ...] = ()
    """Special tokens that are found in a text all the same."""
    prefix: tuple[int, ...] = ()
    """Ids that stand before every prompt, such as the beginning of a text."""
    end_of_text: tuple[int, ...] = ()
    """The ids that end a text, where that is not ``<|endoftext|>`` alone."""
    ids: tuple[tuple[int, ...], ...] = ()
    """What each number of the encoding stands for, where ids are not in the order of merging."""
    tokens: tuple[bytes, ...] = ()
    """With ``ids``: the bytes of each id."""

    def to_dict(self) -> dict[str, Any]:
        """Return the rules as JSON values, for ``from_dict``; tokens are base64."""
        tokens = [base64.b64encode(token).decode() for token in self.tokens]
        return asdict(self) | {"tokens": tokens}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> "Rules":
        """Rebuild rules from ``to_dict``.

        Raises: KeyError, TypeError or ValueError if a part is missing or damaged.
        """
        if parts["normalization"] not in NORMALIZATIONS:
            raise ValueError(f"unknown normalization {parts['normalization']!r}")
        return cls(
            normalization=parts["normalization"],
            added=tuple(map(str, parts["added"])),
            prefix=tuple(map(int, parts["prefix"])),
            end_of_text=tuple(map(int, parts["end_of_text"])),
            ids=tuple(tuple(map(int, ids)) for ids in parts["ids"]),
            tokens=tuple(base64.b64decode(token, validate=True) for token in parts["tokens"]),
        )


NO_RULES = Rules()
