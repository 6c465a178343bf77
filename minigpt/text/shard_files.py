"""The files of a prepared corpus: manifest.json, vocabulary.json and tokens-*.bin.

Tokens are little-endian. A resumable preparation has unfinished.json until its manifest is written.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy.typing as npt

from minigpt.files import WRITING, sha256, sync_file, writing_aside
from minigpt.text.tokenizer import Tokenizer

# Part of every manifest and identity: raise it when the same text gives other tokens, or is cut
# into other pieces.
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
    """Number of its tokens."""
    sha256: str
    """sha256 of the file, in hex."""
    mtime_ns: int
    """Modification time; a file with another time is hashed before it is used."""

    def is_intact(self, folder: Path) -> bool:
        """Return whether the file is unchanged: its time, else its hash, which is slow.

        Raises: OSError if it cannot be read.
        """
        path = folder / self.name
        if path.stat().st_mtime_ns == self.mtime_ns:
            return True
        return sha256(path) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """Contents and origin of a prepared corpus."""

    schema_version: int
    """Version of this record and of the files beside it."""
    identity: str
    """sha256 over the text and the tokenizer."""
    dtype: str
    """Data type of the tokens: <u2 or <u4."""
    n_tokens: int
    """Number of tokens, separators included."""
    n_bytes: int
    """UTF-8 bytes of the text, without separators."""
    n_documents: int
    """Number of documents."""
    tokenizer: str
    """Name of the tokenizer: its spec, if it has one."""
    tokenizer_fingerprint: str
    """Fingerprint of the tokenizer."""
    shards: tuple[Shard, ...]
    """Shards in order."""
    sources: tuple[str, ...]
    """Names of the files, as the user first gave them."""

    def write(self, folder: Path) -> None:
        """Write the manifest, which finishes the folder."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a finished folder.

        Raises: OSError, ValueError, KeyError or TypeError if it is missing or damaged.
        """
        return cls(**read_record(folder / MANIFEST))


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON record of a prepared folder, finished or not.

    Raises: OSError, ValueError, KeyError or TypeError if it is missing or damaged.
    """
    values: dict[str, Any] = json.loads(path.read_bytes())
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {values['schema_version']!r}")
    values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
    if others := [shard.name for shard in values["shards"] if not _SHARD.fullmatch(shard.name)]:
        raise ValueError(f"it names the file {others[0]!r}")
    if "sources" in values:
        values["sources"] = tuple(values["sources"])
    return values


def read_vocabulary(folder: Path) -> Tokenizer:
    """Read the tokenizer of a prepared folder.

    Raises: OSError, ValueError or DataError if it is missing or damaged.
    """
    return Tokenizer.from_dict(json.loads((folder / VOCABULARY).read_bytes()))


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file atomically."""
    with writing_aside(path) as file:
        file.write(json.dumps(values).encode())


def is_ours(path: Path) -> bool:
    """Return whether a file's name is one that a preparation writes, finished or not."""
    return re.fullmatch(rf"({_FILES})|{re.escape(WRITING)}({_FILES})\.\d+", path.name) is not None


class ShardWriter:
    """Writes tokens into files of at most MAX_SHARD_TOKENS; use as a context manager."""

    def __init__(self, folder: Path, dtype: str, shards: Sequence[Shard] = ()) -> None:
        """Args: dtype, of the tokens; shards, those that are already complete."""
        self.folder, self.dtype = folder, dtype
        self.shards = list(shards)
        """Complete shards."""
        self._file: BinaryIO | None = None
        self._n_tokens = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:  # after an error: its contents are discarded
            self._file.close()

    def write(self, tokens: npt.NDArray[Any]) -> list[int]:
        """Append tokens; return, for each shard that this filled, how many were written by then."""
        ends = []
        n_written = 0
        while n_written < len(tokens):
            if self._file is None:
                self._open()
            assert self._file is not None
            part = tokens[n_written : n_written + MAX_SHARD_TOKENS - self._n_tokens]
            data = part.astype(self.dtype, copy=False).data.cast("B")
            self._file.write(data)
            self._digest.update(data)
            self._n_tokens += len(part)
            n_written += len(part)
            if self._n_tokens == MAX_SHARD_TOKENS:
                self.close()
                ends.append(n_written)
        return ends

    def close(self) -> None:
        """Finish the last shard, full or not."""
        if self._file is None:
            return
        sync_file(self._file)
        self._file.close()
        mtime_ns = (self.folder / self._name).stat().st_mtime_ns
        self.shards.append(Shard(self._name, self._n_tokens, self._digest.hexdigest(), mtime_ns))
        self._file = None

    def _open(self) -> None:
        self._name = f"tokens-{len(self.shards):05d}.bin"
        self._file = (self.folder / self._name).open("wb")
        self._digest = hashlib.sha256()
        self._n_tokens = 0
