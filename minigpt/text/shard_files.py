"""The files of a prepared corpus: token shards, what they are of, and how far an unfinished one is.

manifest.json, vocabulary.json and tokens-*.bin, all little-endian; while it is being made,
unfinished.json stands in the place of the manifest.
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

# Written into every manifest and hashed into every identity: raise it when what is prepared from
# the same text changes, or how a text is cut into pieces.
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
    """In the prepared folder."""
    n_tokens: int
    """How many it holds."""
    sha256: str
    """Of the file, in hex."""
    mtime_ns: int
    """When it was written; a file of another time is hashed before it is used."""

    def is_intact(self, folder: Path) -> bool:
        """Check the file's bytes, unless it still has the time of its writing: hashing is slow.

        Raises: OSError if it cannot be read.
        """
        path = folder / self.name
        if path.stat().st_mtime_ns == self.mtime_ns:
            return True
        return sha256(path) == self.sha256


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is and was made from."""

    schema_version: int
    """Of this record and of the files beside it."""
    identity: str
    """sha256 over what went in: the text, and what made the tokens."""
    dtype: str
    """Of the tokens: <u2 or <u4."""
    n_tokens: int
    """All of them, the separators too."""
    n_bytes: int
    """UTF-8 bytes of the text, without separators."""
    n_documents: int
    """How many were read."""
    tokenizer: str
    """Its name: its spec, if it was made of one."""
    tokenizer_fingerprint: str
    """Its sha256."""
    shards: tuple[Shard, ...]
    """In order."""
    sources: tuple[str, ...]
    """The files, as the user called them the first time."""

    def write(self, folder: Path) -> None:
        """Write it, and with it finish the folder."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))
        (folder / UNFINISHED).unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read a finished folder's.

        Raises: OSError, ValueError, KeyError or TypeError if it is missing or damaged.
        """
        return cls(**_read(folder / MANIFEST))


@dataclass(frozen=True)
class Place:
    """A place in the tokens of a corpus, as its pieces are read one after the other."""

    n_pieces: int = 0
    """Pieces whose tokens all come before it."""
    n_tokens: int = 0
    """Tokens of the pieces after those that come before it too."""
    n_documents: int = 0
    """Documents that begin in those pieces."""
    n_bytes: int = 0
    """UTF-8 bytes of the text of those pieces."""


@dataclass(frozen=True)
class Unfinished:
    """How far a preparation is: what is needed to go on with it."""

    schema_version: int
    identity: str
    """As in the manifest."""
    tokenizer_fingerprint: str
    """Of the vocabulary beside it."""
    shards: tuple[Shard, ...] = ()
    """Those that are whole, in order."""
    places: tuple[Place, ...] = ()
    """Where each of them ends."""

    def write(self, folder: Path) -> None:
        """Write it, in the place of an earlier one."""
        write_json(folder / UNFINISHED, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Unfinished":
        """Read an unfinished folder's.

        Raises: OSError, ValueError, KeyError or TypeError if it is missing or damaged.
        """
        values = _read(folder / UNFINISHED)
        return cls(**values | {"places": tuple(Place(**place) for place in values["places"])})

    def intact(self, folder: Path) -> "Unfinished":
        """Return it with the shards before the first one that is not as it was written."""
        n_intact = 0
        for shard in self.shards:
            try:
                if not shard.is_intact(folder):
                    break
            except OSError:
                break
            n_intact += 1
        return dataclasses.replace(
            self, shards=self.shards[:n_intact], places=self.places[:n_intact]
        )


def _read(path: Path) -> dict[str, Any]:
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
    """Read the tokenizer that made the tokens.

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
    """Write tokens one after the other into files of at most MAX_SHARD_TOKENS; use as a context."""

    def __init__(self, folder: Path, dtype: str, shards: Sequence[Shard] = ()) -> None:
        """Args: dtype, of the tokens; shards, those that come before and are there."""
        self.folder, self.dtype = folder, dtype
        self.shards = list(shards)
        """Those that are whole."""
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
        if self._file is not None:  # an error came first: what is in it counts for nothing
            self._file.close()

    def write(self, tokens: npt.NDArray[Any]) -> list[int]:
        """Append tokens; return after how many of them a shard was full, for each that is."""
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
        """End the last shard, full or not."""
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
