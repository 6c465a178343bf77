"""A text as token ids, ready for training, and windows of them."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.rings import find_ring
from minigpt.text.tokenizer import Tokenizer, make_tokenizer

CONTEXT_ONLY = 2**31
"""Bit set in a stored token that is context only: no loss is computed for it as a target."""
_FOLDERS = "text.prepared_folders"


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Facts about a tokenized text."""

    tokenizer: str
    """Name of the tokenizer: its spec, if it has one."""
    n_tokens: int
    """Number of tokens, separators included."""
    n_bytes: int = 0
    """UTF-8 bytes of the text, without separators, parsed special tokens and skipped text."""
    val_split: str = "tail"
    """Text held out for validation: tail, documents, own or none (docs/text.md)."""
    chat_template: str = ""
    """Jinja source of the template that rendered conversations. Empty for plain text."""
    loss_on: str = "all"
    """Tokens that the loss is averaged over: all, or completion."""

    def validation(self, val_fraction: float) -> str:
        """Describe the validation text of a run with this val_fraction."""
        share = f"validation on the last {val_fraction:.0%}"
        return share if val_fraction else "no validation"

    @property
    def n_skipped(self) -> int:
        """Number of characters that were left out because they are not in the vocabulary."""
        return 0

    def notes(self) -> Iterator[str]:
        """Yield one-line notes about the text for the user."""
        yield from ()

    def with_split(self, data: DataConfig) -> DataConfig:
        """Return the settings with the split of the text, so that a resumed run uses the same."""
        return data


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready for training."""

    tokenizer: Tokenizer
    """Tokenizer that produced the tokens."""
    tokens: "TokenDataset"
    manifest: TextFacts
    """Facts about the text; for tokens on disk, their manifest."""


class TokenDataset:
    """All tokens of a corpus, in one array or in memory-mapped shards."""

    def __init__(
        self,
        shards: Sequence[npt.NDArray[Any]],
        fingerprint: str,
        n_val_tokens: int | None = None,
    ) -> None:
        """Args: shards, one-dimensional arrays of ids, in order; fingerprint, hash of all tokens;
        n_val_tokens, number of tokens at the end that are held out for validation; None without
        held-out documents.
        """
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        self._n_val_tokens = n_val_tokens
        self.fingerprint = fingerprint
        """SHA-256 of the tokens, the tokenizer and the number of held-out tokens."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill ``out`` with the tokens from ``start`` on, across shards."""
        assert start >= 0
        assert start + len(out) <= len(self)
        index = bisect_right(self._starts, start) - 1
        n_filled = 0
        while n_filled < len(out):
            begin = start + n_filled - self._starts[index]
            part = self._shards[index][begin : begin + len(out) - n_filled]
            out[n_filled : n_filled + len(part)] = part
            n_filled += len(part)
            index += 1

    def split(self, val_fraction: float) -> tuple["TokenSpan", "TokenSpan"]:
        """Return the training tokens, and the validation tokens after them.

        Args: val_fraction, share of the tokens if no documents are held out; 0 for no validation.
        """
        border = int(len(self) * (1 - val_fraction))
        if val_fraction and self._n_val_tokens is not None:
            border = len(self) - self._n_val_tokens
        return (
            TokenSpan(self, 0, border, "training"),
            TokenSpan(self, border, len(self), "validation"),
        )


@dataclass(frozen=True)
class TokenSpan:
    """A contiguous part of a dataset."""

    dataset: TokenDataset
    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    name: str
    """Name for messages: training or validation."""

    def __len__(self) -> int:
        return self.stop - self.start

    def first_ids(self, n_tokens: int) -> list[int]:
        """Return the ids of the first tokens."""
        [tokens] = self.windows(np.zeros(1, np.int64), n_tokens)
        return (tokens % CONTEXT_ONLY).tolist()

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Gather windows of tokens, in which those without a loss have CONTEXT_ONLY added.

        Args: starts (B,), counted from the beginning of the span.
        Returns: (B, length).
        """
        assert starts.min(initial=0) >= 0
        assert starts.max(initial=0) + length <= len(self)
        out = np.empty((len(starts), length), np.int64)
        for row, start in zip(out, (starts + self.start).tolist(), strict=True):
            self.dataset.read_into(row, start)
        return out


def prepare(
    data: DataConfig,
    cache_dir: Path | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> PreparedData:
    """Turn a text into tokens.

    ``Tokenizer.separator`` comes before each document, including the first. The ring of corpora
    reads any text in bounded memory and stores its tokens on disk; without it, text files are
    tokenized in memory, to the same tokens.

    Args: cache_dir, instead of the user's cache; tokenizer, instead of the one that ``data``
        names; options, as for ``prepared_folders.prepare``.
    Raises: ConfigError for an unknown tokenizer; DataError for an unusable text; and the errors of
        ``prepared_folders.prepare``.
    """
    folders = find_ring(_FOLDERS)
    if folders is None:
        return prepare_in_memory(data, tokenizer)
    return folders.prepare(data, cache_dir, tokenizer=tokenizer, **options)


def prepare_in_memory(data: DataConfig, tokenizer: Tokenizer | None = None) -> PreparedData:
    """Tokenize text files, each a document; the last tokens are for validation.

    Raises: DataError if a file cannot be read, is not UTF-8, or if all are empty.
    """
    texts = []
    for path in data.paths:
        try:
            texts.append(Path(path).read_bytes().decode("utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path!r} cannot be read ({error}). Name UTF-8 text files.") from None
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"the corpus is empty: no text in {', '.join(map(repr, data.paths))}.")
    training = (text[: int(len(text) * (1 - data.val_fraction))] for text in texts)
    tokenizer = tokenizer or make_tokenizer(data.tokenizer, training)
    separator = np.array(tokenizer.separator, np.uint32)
    arrays = [part for text in texts for part in (separator, tokenizer.encode_array(text))]
    tokens = np.concatenate(arrays)
    digest = hashlib.sha256(tokenizer.fingerprint.encode() + tokens.tobytes())
    facts = TextFacts(
        tokenizer=tokenizer.name,
        n_tokens=len(tokens),
        n_bytes=sum(len(text.encode()) for text in texts),
    )
    return PreparedData(tokenizer, TokenDataset([tokens], digest.hexdigest()), facts)


def prepared_settings(data: DataConfig) -> dict[str, Any]:
    """Return the data settings of a prepared folder; {} if ``data`` names text.

    Raises: DataError if the folder is unfinished, damaged, or named together with other texts.
    """
    folders = find_ring(_FOLDERS)
    return dict(folders.prepared_settings(data)) if folders else {}
