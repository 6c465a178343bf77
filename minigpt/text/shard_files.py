"""The files of a prepared corpus: manifest.json, vocabulary.json and tokens-*.bin.

Tokens are little-endian. Until the manifest is written, unfinished.json allows resuming.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.files import WRITING, open_regular, read_bytes, sha256, sync_file, writing_aside
from minigpt.format import count
from minigpt.rings import ring
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer
from minigpt.text.tokens import PreparedData, TextFacts, TokenDataset

# Part of every manifest and identity: increase it when the same text gives different tokens, or is
# cut into different pieces.
SCHEMA_VERSION = 1
MAX_SHARD_TOKENS = 2**24

MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
UNFINISHED = "unfinished.json"
_SHARD = re.compile(r"tokens-\d+\.bin")
_FILES = "|".join([*map(re.escape, (MANIFEST, VOCABULARY, UNFINISHED)), _SHARD.pattern])


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    name: str
    """File name in the prepared folder."""
    n_tokens: int
    sha256: str
    """SHA-256 of the file, in hex."""
    mtime_ns: int
    """Modification time in nanoseconds; if it differs, the hash is checked before use."""

    def is_intact(self, folder: Path) -> bool:
        """Return whether the file's time, or else its hash, which is slow, is unchanged."""
        path = folder / self.name
        try:
            return path.stat().st_mtime_ns == self.mtime_ns or sha256(path) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts over consecutive pieces of a corpus."""

    n_pieces: int = 0
    n_documents: int = 0
    """Number of documents that begin in these pieces."""
    n_bytes: int = 0
    """UTF-8 bytes of the text, without separators, parsed special tokens and skipped text."""
    n_val_tokens: int = 0
    """Number of tokens in documents held out for validation, which come last; 0 for a tail."""
    unparsed: Mapping[str, int] = field(default_factory=dict)
    """Special tokens in the text that stayed plain text -> their number."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Characters left out because they are not in the vocabulary -> their number."""
    n_bad_rows: int = 0
    """Number of rows left out (--skip-bad)."""
    bad_row: str = ""
    """Message about the first row left out. Empty for none."""

    def plus(self, others: "Counts") -> Self:
        """Return the counts of these pieces and those that follow."""
        return type(self)(
            n_pieces=self.n_pieces + others.n_pieces,
            n_documents=self.n_documents + others.n_documents,
            n_bytes=self.n_bytes + others.n_bytes,
            n_val_tokens=self.n_val_tokens + others.n_val_tokens,
            unparsed=dict(Counter(self.unparsed) + Counter(others.unparsed)),
            skipped=dict(Counter(self.skipped) + Counter(others.skipped)),
            n_bad_rows=self.n_bad_rows + others.n_bad_rows,
            bad_row=self.bad_row or others.bad_row,
        )


@dataclass(frozen=True, kw_only=True)
class Manifest(TextFacts, Counts):
    """Contents and origin of a prepared corpus."""

    schema_version: int
    """Version of the format of this record and the folder's other files."""
    identity: str
    """SHA-256 of the text, the split and the tokenizer."""
    dtype: str
    """Data type of the tokens: <u2 or <u4."""
    tokenizer_fingerprint: str
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    """Names of the files, as the user first gave them."""
    special: bool = False
    """Whether the text of special tokens was parsed to their ids."""
    val_fraction: float = 0.1
    """Fraction of the text to hold out for validation."""

    def validation(self, val_fraction: float) -> str:
        if not val_fraction or self.val_split not in ("documents", "own"):
            return super().validation(val_fraction)
        kind = "in whole documents" if self.val_split == "documents" else "of the --val text"
        return f"validation on {self.n_val_tokens:,} tokens {kind}"

    def with_split(self, data: DataConfig) -> DataConfig:
        if self.val_split == "own":
            return data
        return replace(data, val_split="documents" if self.val_split == "documents" else "tail")

    @property
    def n_skipped(self) -> int:
        return sum(self.skipped.values())

    def notes(self) -> Iterator[str]:
        if self.loss_on == "completion":
            yield "the loss is on the assistant's tokens only; --loss-on all includes all tokens"
        if self.n_bad_rows:
            rows = "row was" if self.n_bad_rows == 1 else "rows were"
            yield f"{self.n_bad_rows:,} {rows} left out; the first: {self.bad_row}"
        if self.unparsed:
            yield (
                f"the text contains special tokens as plain text ({_most_common(self.unparsed)}). "
                "--special parses them when the text is tokenized."
            )
        if self.skipped:
            yield (
                f"skipped {count(self.n_skipped, 'character')} missing from the vocabulary "
                f"({_most_common({repr(c): n for c, n in self.skipped.items()})})"
            )


@dataclass(frozen=True)
class StoredData(PreparedData):
    """A corpus whose tokens are on disk."""

    manifest: Manifest
    folder: Path
    """Folder with its files, for ``open_prepared``."""


def _most_common(counts: Mapping[str, int]) -> str:
    shown = [f"{text} {count(n, 'time')}" for text, n in Counter(counts).most_common(3)]
    return ", ".join(shown + (["..."] if len(counts) > len(shown) else []))


def open_prepared(folder: Path) -> StoredData:
    """Open a prepared corpus after checking that it is unchanged.

    Raises: DataError if it is missing, incomplete or damaged.
    """
    with reading_prepared(folder):
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
    return StoredData(tokenizer, tokens, manifest, folder)


@contextmanager
def reading_prepared(folder: Path) -> Iterator[None]:
    """Convert errors from missing or damaged files to DataError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise DataError(
            f"the prepared corpus {str(folder)!r} cannot be read ({reason}). Delete that folder."
        ) from None


def read_record(path: Path) -> dict[str, Any]:
    """Read MANIFEST or UNFINISHED of a prepared folder, within ``reading_prepared``."""
    values: dict[str, Any] = json.loads(read_bytes(path))
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {values['schema_version']!r}")
    if values.get("dtype", "<u4") not in ("<u2", "<u4"):
        raise ValueError(f"its dtype is {values['dtype']!r}")
    values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
    if others := [shard.name for shard in values["shards"] if not _SHARD.fullmatch(shard.name)]:
        raise ValueError(f"it names the file {others[0]!r}")
    if "sources" in values:
        values["sources"] = tuple(values["sources"])
    return values


def read_vocabulary(folder: Path) -> Tokenizer:
    """Read the tokenizer of a prepared folder, within ``reading_prepared``."""
    return tokenizer_from_dict(json.loads(read_bytes(folder / VOCABULARY)))


def tokenizer_from_dict(parts: Mapping[str, Any]) -> Tokenizer:
    """Rebuild a tokenizer from ``Tokenizer.to_dict``.

    Raises: DataError if a part is missing or damaged.
    """
    plain = BytesTokenizer()
    if {**parts, "name": plain.name} == plain.to_dict():
        return BytesTokenizer(str(parts.get("name")))
    kind = "imported" if "tokenizer_json" in parts else "byte_pairs"
    return ring(f"text.{kind}").from_dict(parts)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with writing_aside(path) as file:
        file.write(json.dumps(values).encode())


def is_ours(path: Path) -> bool:
    """Return whether a file has a name that a finished or unfinished preparation writes."""
    return re.fullmatch(rf"({_FILES})|{re.escape(WRITING)}({_FILES})\.\d+", path.name) is not None


def write_shards(
    folder: Path, dtype: str, arrays: Iterator[npt.NDArray[Any]], n_complete: int
) -> Iterator[tuple[Shard, int]]:
    """Write tokens to files of at most MAX_SHARD_TOKENS.

    Args: arrays, non-empty arrays of tokens; n_complete, number of shards already on disk.
    Yields: each shard once it is on disk, and the number of tokens written so far from the array
        that was read last.
    """
    array, n_written = next(arrays, None), 0
    while array is not None:
        path = folder / f"tokens-{n_complete:05d}.bin"
        digest, n_tokens = hashlib.sha256(), 0
        with path.open("wb") as file:
            while array is not None and n_tokens < MAX_SHARD_TOKENS:
                part = array[n_written : n_written + MAX_SHARD_TOKENS - n_tokens]
                data = part.astype(dtype, copy=False).data.cast("B")
                file.write(data)
                digest.update(data)
                n_tokens += len(part)
                n_written += len(part)
                if n_written == len(array):
                    array, n_written = next(arrays, None), 0
            sync_file(file)
        yield Shard(path.name, n_tokens, digest.hexdigest(), path.stat().st_mtime_ns), n_written
        n_complete += 1
