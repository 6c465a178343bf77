"""Documents -> token shards on disk, read back through memory maps.

What ``prepare`` makes is a folder of the cache, whose name is a hash of what goes in, so that the
same corpus is prepared once; ``prepare_folder`` makes one where the user wants it.
"""

import dataclasses
import hashlib
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.files import locked, resource_errors
from minigpt.text.building import Corpus, PrepareProgress, Work, build, opened_corpus, tidy
from minigpt.text.shard_files import (
    MANIFEST,
    UNFINISHED,
    VOCABULARY,
    Manifest,
    Unfinished,
    is_ours,
    read_vocabulary,
)
from minigpt.text.tokenizer import Tokenizer

_LOCK = ".lock"


@dataclass(frozen=True)
class PreparedData:
    """A corpus that is ready to train on."""

    tokenizer: Tokenizer
    """The one that made the tokens."""
    tokens: "TokenDataset"
    """All of them."""
    manifest: Manifest
    """Counts and hashes."""
    folder: Path
    """Where it lies; ``open_prepared`` opens it again."""


class TokenDataset:
    """All tokens of a corpus, in shards that the operating system pages in as they are read."""

    def __init__(self, shards: Sequence[npt.NDArray[Any]], fingerprint: str) -> None:
        """Args: shards, one-dimensional arrays of ids, in order; fingerprint, of them all."""
        self._shards = shards
        self._starts = np.cumsum([0, *map(len, shards)]).tolist()
        self.fingerprint = fingerprint
        """sha256 over the tokens and their tokenizer."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill ``out`` with the tokens from ``start`` on, across the borders of shards."""
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
        """Return the training tokens and, after them, the last share for validation."""
        border = int(len(self) * (1 - val_fraction))
        return (
            TokenSpan(self, 0, border, "training"),
            TokenSpan(self, border, len(self), "validation"),
        )


@dataclass(frozen=True)
class TokenSpan:
    """A contiguous part of a dataset."""

    dataset: TokenDataset
    """The whole."""
    start: int
    """Index of its first token."""
    stop: int
    """Index after its last token."""
    name: str
    """For messages: training or validation."""

    def __len__(self) -> int:
        return self.stop - self.start

    def windows(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int64]:
        """Gather windows of tokens.

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
    n_workers: int = 0,
) -> PreparedData:
    """Turn a corpus into tokens on disk, or find that it was done before.

    ``Tokenizer.separator`` stands before each document, the first too. Memory stays bounded,
    whatever the size of the corpus. What a killed preparation has left is never used but to go on
    with it. A folder that ``prepare_folder`` wrote is opened as it is.

    Args: cache_dir, the cache instead of the user's own; tokenizer, one that is there already,
        instead of making the one that ``data`` names; n_workers, threads, 0 for all cores.
    Raises: ConfigError for an unknown tokenizer, or another one than a folder was prepared with;
        DataError for a corpus that cannot be used; ResourceError if a file may not be read or the
        cache cannot be written.
    """
    if folder := prepared_folder(data.paths):
        return _opened(folder, data.tokenizer, tokenizer)
    with opened_corpus(data, tokenizer, cache_dir, on_progress) as corpus:
        folder = corpus.cache / "prepared" / corpus.identity[:32]
        with locked(Path(f"{folder}.lock")):
            try:
                prepared = open_prepared(folder)
            except DataError:
                _replace(folder, corpus, n_workers)
                prepared = open_prepared(folder)
    # Of two vocabularies that differ in nothing but their name, the one that was given.
    return prepared if tokenizer is None else dataclasses.replace(prepared, tokenizer=tokenizer)


def _replace(folder: Path, corpus: Corpus, n_workers: int) -> None:
    """Build a prepared corpus aside and rename it; an unusable one in its place goes first."""
    aside = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(exist_ok=True)
    try:
        build(aside, corpus, n_workers)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare_folder(
    data: DataConfig,
    folder: Path,
    cache_dir: Path | None = None,
    on_progress: Callable[[PrepareProgress], None] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    n_workers: int = 0,
) -> tuple[PreparedData, Work]:
    """Turn a corpus into tokens in a folder of the user's own, or go on where that was broken off.

    Full shards are kept, whatever ends the call; the same call then gives the same bytes.

    Args: folder, which is empty, not there, or was begun by this function for the same corpus; the
        others as in ``prepare``.
    Returns: the whole corpus, and what of it was done now.
    Raises: ConfigError if the folder holds anything else; LockedError if another process is at it;
        otherwise as ``prepare``.
    """
    if prepared := prepared_folder(data.paths):
        raise DataError(f"{str(prepared)!r} is prepared already. Train on it as it is.")
    _require_ours(folder)
    with (
        opened_corpus(data, tokenizer, cache_dir, on_progress) as corpus,
        resource_errors(folder, "name another --out"),
        locked(
            folder / _LOCK,
            f"another process is preparing {str(folder)!r}. Wait until it ends, or name another "
            "--out.",
        ),
    ):
        work = Work()
        if not _is_finished(folder, corpus.identity):
            try:
                work = build(folder, corpus, n_workers)
            except BaseException:
                tidy(folder)
                raise
    return open_prepared(folder), work


def _require_ours(folder: Path) -> None:
    if folder.is_dir():
        others = [p.name for p in folder.iterdir() if not is_ours(p) and p.name != _LOCK]
        if others:
            raise ConfigError(
                f"the folder {str(folder)!r} holds {min(others)!r}, which is none of what is "
                "prepared. Name an empty or a new one."
            )


def _is_finished(folder: Path, identity: str) -> bool:
    """Tell whether a corpus is in the folder, whole.

    Raises: ConfigError if another one is there, whole or not.
    """
    kind = Manifest if (folder / MANIFEST).exists() else Unfinished
    try:
        record = kind.read(folder)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None
    if record.identity != identity:
        raise ConfigError(
            f"the folder {str(folder)!r} holds another text, or tokens of another tokenizer. "
            "Delete it, or name another --out."
        )
    return kind is Manifest


def prepared_folder(words: Sequence[str]) -> Path | None:
    """Return the folder of ``prepare_folder`` that is named as a corpus; None if it is text.

    Raises: DataError if its preparation has not ended, or other texts are named too.
    """
    paths = [Path(os.path.expanduser(word)) for word in words]
    folders = [path for path in paths if _is_prepared(path)]
    if not folders:
        return None
    name = repr(str(folders[0]))
    if len(paths) > 1:
        raise DataError(f"{name} is a prepared corpus, and goes with no other. Name it alone.")
    if not os.path.isfile(folders[0] / MANIFEST):
        raise DataError(f"the preparation of {name} has not ended. Call minigpt prepare again.")
    return folders[0]


def _is_prepared(folder: Path) -> bool:
    # os.path says no, where Path raises, of a name that can be none.
    has = {name for name in (MANIFEST, UNFINISHED, VOCABULARY) if os.path.isfile(folder / name)}
    return VOCABULARY in has and len(has) > 1


def prepared_tokenizer(words: Sequence[str]) -> str | None:
    """Return the name of the tokenizer of a prepared folder; None if the words name text.

    Raises: DataError as ``prepared_folder``, or if it is damaged.
    """
    folder = prepared_folder(words)
    if folder is None:
        return None
    try:
        return Manifest.read(folder).tokenizer
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None


def _opened(folder: Path, spec: str, tokenizer: Tokenizer | None) -> PreparedData:
    """Open a prepared folder.

    Raises: ConfigError if its tokenizer is not the one that is asked for.
    """
    prepared = open_prepared(folder)
    if tokenizer is None and prepared.manifest.tokenizer != spec:
        raise ConfigError(
            f"{str(folder)!r} was prepared with the tokenizer {prepared.manifest.tokenizer!r}, not "
            f"{spec!r}. Leave --tokenizer out, or prepare the text again."
        )
    if tokenizer is not None and prepared.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"{str(folder)!r} was prepared with another tokenizer than the model's "
            f"({prepared.manifest.tokenizer!r}). Prepare the text with minigpt prepare --from."
        )
    return prepared if tokenizer is None else dataclasses.replace(prepared, tokenizer=tokenizer)


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared corpus, and check that it is what was written.

    Raises: DataError if it is missing, incomplete or damaged.
    """
    try:
        manifest = Manifest.read(folder)
        tokenizer = read_vocabulary(folder)
        is_whole = tokenizer.fingerprint == manifest.tokenizer_fingerprint
        digest = hashlib.sha256(tokenizer.fingerprint.encode())
        arrays = []
        for shard in manifest.shards:
            array = np.asarray(np.memmap(folder / shard.name, manifest.dtype, mode="r"))
            is_whole &= len(array) == shard.n_tokens and shard.is_intact(folder)
            arrays.append(array)
            digest.update(shard.sha256.encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from None
    if not is_whole:
        raise DataError(f"the prepared corpus {str(folder)!r} is damaged. Delete that folder.")
    return PreparedData(tokenizer, TokenDataset(arrays, digest.hexdigest()), manifest, folder)


def _unreadable(folder: Path, error: Exception) -> DataError:
    reason = f"{type(error).__name__}: {error}"
    return DataError(
        f"the prepared corpus {str(folder)!r} cannot be read ({reason}). Delete that folder."
    )
