"""A corpus as token shards on disk, read through memory maps.

``prepare`` writes a folder of the cache, named by a hash of text and tokenizer, so that the same
corpus is prepared once.
"""

import dataclasses
import hashlib
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.files import WRITING, locked, open_regular
from minigpt.rings import has_ring, ring
from minigpt.text.building import Corpus, PrepareProgress, begin, build, opened_corpus
from minigpt.text.shard_files import (
    CONTEXT_ONLY,
    MANIFEST,
    Manifest,
    read_record,
    read_vocabulary,
    reading,
)
from minigpt.text.tokenizer import Tokenizer

_PREPARED_FOLDERS = "text.prepared_folders"


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on."""

    tokenizer: Tokenizer
    """Tokenizer that made the tokens."""
    tokens: "TokenDataset"
    """All tokens."""
    manifest: Manifest
    """Counts and hashes."""
    folder: Path
    """Folder of its files, for ``open_prepared``."""


class TokenDataset:
    """All tokens of a corpus, in memory-mapped shards."""

    def __init__(
        self,
        shards: Sequence[npt.NDArray[Any]],
        fingerprint: str,
        n_val_tokens: int | None = None,
    ) -> None:
        """Args: shards, one-dimensional arrays of ids, in order; fingerprint, of all tokens;
        n_val_tokens, those of the documents for validation, the last ones; None for no such
        documents.
        """
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        self._n_val_tokens = n_val_tokens
        self.fingerprint = fingerprint
        """sha256 over the tokens, their tokenizer and the documents for validation."""

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
        """Return the training tokens and, after them, those for validation.

        Args: val_fraction, share of the tokens without documents for validation; 0 for none.
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
    """Dataset that it is part of."""
    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    name: str
    """Name for messages: training or validation."""

    def __len__(self) -> int:
        return self.stop - self.start

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Gather windows of tokens, as ``marked_windows`` but without the mark."""
        return self.marked_windows(starts, length) % CONTEXT_ONLY

    def marked_windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
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
    on_progress: Callable[[PrepareProgress], None] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    template: Any = None,
    n_workers: int = 0,
) -> PreparedData:
    """Turn a corpus into tokens on disk, or open the result of an earlier call.

    ``Tokenizer.separator`` comes before each document, the first too. Memory stays bounded for any
    size of corpus. A killed preparation is resumed, or started again. A folder that the user
    prepared is opened as it is.

    Args: cache_dir, instead of the user's cache; tokenizer, instead of the one that ``data``
        names; template, a ``text.chat.ChatTemplate`` if the rows are conversations; n_workers,
        threads, 0 for all cores.
    Raises: ConfigError for an unknown tokenizer, or not the one that a folder was prepared with;
        DataError for a corpus that cannot be used; ResourceError if a file may not be read or the
        cache cannot be written.
    """
    if has_ring(_PREPARED_FOLDERS):
        named: PreparedData | None = ring(_PREPARED_FOLDERS).open_named(data, tokenizer)
        if named is not None:
            return named
    with opened_corpus(data, tokenizer, cache_dir, on_progress, template) as corpus:
        folder = corpus.cache / "prepared" / corpus.identity[:32]
        with locked(Path(f"{folder}.lock")):
            try:
                prepared = open_prepared(folder)
            except DataError:
                _replace(folder, corpus, n_workers)
                prepared = open_prepared(folder)
    # Two vocabularies may differ in nothing but their name: return the one that was given.
    return prepared if tokenizer is None else dataclasses.replace(prepared, tokenizer=tokenizer)


def _replace(folder: Path, corpus: Corpus, n_workers: int) -> None:
    """Build a corpus under another name and rename it; an unusable one is deleted first."""
    aside = folder.with_name(f"{WRITING}{folder.name}")
    shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(exist_ok=True)
    try:
        if has_ring(_PREPARED_FOLDERS):
            ring(_PREPARED_FOLDERS).build_resumable(aside, corpus, n_workers)
        else:
            build(aside, corpus, begin(aside, corpus), n_workers)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepared_settings(words: Sequence[str]) -> dict[str, Any]:
    """Return the data settings that a prepared folder was made with; {} if the words name text.

    Raises: DataError if the folder is unfinished, damaged, or not named alone.
    """
    if not has_ring(_PREPARED_FOLDERS):
        return {}
    settings: dict[str, Any] = ring(_PREPARED_FOLDERS).prepared_settings(words)
    return settings


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared corpus, and check that it is unchanged.

    Raises: DataError if it is missing, incomplete or damaged.
    """
    with reading(folder):
        manifest = Manifest(**read_record(folder / MANIFEST))
        tokenizer = read_vocabulary(folder)
        is_whole = tokenizer.fingerprint == manifest.tokenizer_fingerprint
        digest = hashlib.sha256(tokenizer.fingerprint.encode())
        arrays = []
        for shard in manifest.shards:
            with open_regular(folder / shard.name) as file:
                array = np.asarray(np.memmap(file, manifest.dtype, mode="r"))
            is_whole &= len(array) == shard.n_tokens and shard.is_intact(folder)
            arrays.append(array)
            digest.update(shard.sha256.encode())
        n_val_tokens = None
        if manifest.val_split in ("documents", "own"):
            n_val_tokens = manifest.n_val_tokens
            digest.update(f"validation {n_val_tokens}".encode())
    if not is_whole:
        raise DataError(f"the prepared corpus {str(folder)!r} is damaged. Delete that folder.")
    tokens = TokenDataset(arrays, digest.hexdigest(), n_val_tokens)
    return PreparedData(tokenizer, tokens, manifest, folder)
