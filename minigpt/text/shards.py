"""Documents -> token shards on disk, read back through memory maps.

A prepared corpus is a folder of the cache: manifest.json, vocabulary.json and tokens-*.bin, all
little-endian. Its name is a hash of what goes in, so the same corpus is prepared once.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.text.cache import cache_folder, writing
from minigpt.text.corpus import Document, Source, content_hash, find_sources, iter_documents
from minigpt.text.tokenizer import Tokenizer, make_tokenizer, parse_spec

# Written into every manifest and hashed into every folder's name: raise it when what is prepared
# from the same text changes.
SCHEMA_VERSION = 1
MAX_SHARD_TOKENS = 2**27
PROGRESS_BYTES = 2**20


@dataclass(frozen=True)
class PrepareProgress:
    """How far a preparation is."""

    stage: str
    """download, train tokenizer, or encode."""
    done: int
    """Bytes of the files read in this stage."""
    total: int
    """Bytes of the files in all."""


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


@dataclass(frozen=True)
class Manifest:
    """What a prepared corpus is and was made from."""

    schema_version: int
    """Of this record and of the files beside it."""
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
) -> PreparedData:
    """Turn a corpus into tokens on disk, or find that it was done before.

    ``Tokenizer.separator`` stands before each document, the first too. Memory stays bounded,
    whatever the size of the corpus. A preparation that is killed leaves nothing that is ever used.

    Args: cache_dir, the cache instead of the user's own; tokenizer, one that is there already,
        instead of making the one that ``data`` names.
    Raises: ConfigError for an unknown tokenizer; DataError for a corpus that cannot be used;
        ResourceError if a file may not be read or the cache cannot be written.
    """
    report = on_progress or (lambda progress: None)
    if tokenizer is None:
        parse_spec(data.tokenizer)  # before a download, not after
    cache = cache_dir or cache_folder()
    with writing(cache):
        (cache / "prepared").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="streams-", dir=cache) as spool:
            sources = find_sources(
                data.paths,
                cache,
                Path(spool),
                on_download=lambda *n: report(PrepareProgress("download", *n)),
            )
            # A name is not enough of a vocabulary that was not made here: two may share it.
            vocabulary = data.tokenizer if tokenizer is None else tokenizer.fingerprint
            what = f"{SCHEMA_VERSION} {vocabulary} {content_hash(sources)}"
            folder = cache / "prepared" / hashlib.sha256(what.encode()).hexdigest()[:32]
            with FileLock(f"{folder}.lock"):
                try:
                    prepared = open_prepared(folder)
                except DataError:
                    _replace(folder, tokenizer or data.tokenizer, sources, report)
                    prepared = open_prepared(folder)
    # Of two vocabularies that differ in nothing but their name, the one that was given.
    return prepared if tokenizer is None else dataclasses.replace(prepared, tokenizer=tokenizer)


def open_prepared(folder: Path) -> PreparedData:
    """Open a prepared corpus, and check that it is what was written.

    Raises: DataError if it is missing, incomplete or damaged.
    """
    try:
        manifest = _read_manifest(folder / "manifest.json")
        tokenizer = Tokenizer.from_dict(json.loads((folder / "vocabulary.json").read_bytes()))
        is_whole = tokenizer.fingerprint == manifest.tokenizer_fingerprint
        digest = hashlib.sha256(tokenizer.fingerprint.encode())
        arrays = []
        for shard in manifest.shards:
            array = np.asarray(np.memmap(folder / shard.name, manifest.dtype, mode="r"))
            is_whole &= len(array) == shard.n_tokens and _is_untouched(folder / shard.name, shard)
            arrays.append(array)
            digest.update(shard.sha256.encode())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the prepared corpus {str(folder)!r} cannot be opened: {error}.") from None
    if not is_whole:
        raise DataError(f"the prepared corpus {str(folder)!r} is damaged. Delete that folder.")
    return PreparedData(tokenizer, TokenDataset(arrays, digest.hexdigest()), manifest, folder)


def _is_untouched(path: Path, shard: Shard) -> bool:
    """Check a shard's bytes, unless it still has the time of its writing: hashing takes a while."""
    if path.stat().st_mtime_ns == shard.mtime_ns:
        return True
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _read_manifest(path: Path) -> Manifest:
    values = json.loads(path.read_bytes())
    if values["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"its schema version is {values['schema_version']!r}")
    values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
    values["sources"] = tuple(values["sources"])
    return Manifest(**values)


def _replace(
    folder: Path,
    tokenizer: Tokenizer | str,
    sources: list[Source],
    report: Callable[[PrepareProgress], None],
) -> None:
    """Write a prepared corpus aside and rename it; an unusable one in its place goes first."""
    aside = folder.with_name(f"{folder.name}.partial")
    for leftover in (aside, folder):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir()
    try:
        _build(aside, tokenizer, sources, report)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _build(
    folder: Path,
    tokenizer: Tokenizer | str,
    sources: list[Source],
    report: Callable[[PrepareProgress], None],
) -> None:
    if isinstance(tokenizer, str):
        training = _reported(iter_documents(sources), sources, "train tokenizer", report)
        tokenizer = make_tokenizer(tokenizer, (document.text for document in training))
    _write_json(folder / "vocabulary.json", tokenizer.to_dict())

    writer = _ShardWriter(folder, "<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    separator = np.array(tokenizer.separator, np.uint32)
    n_bytes = n_documents = 0
    for document in _reported(iter_documents(sources), sources, "encode", report):
        if document.is_start:
            n_documents += 1
            writer.write(separator)
        writer.write(tokenizer.encode_array(document.text, is_start=document.is_start))
        n_bytes += len(document.text.encode())
    shards = writer.close()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        dtype=writer.dtype,
        n_tokens=sum(shard.n_tokens for shard in shards),
        n_bytes=n_bytes,
        n_documents=n_documents,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shards=shards,
        sources=tuple(source.name for source in sources),
    )
    _write_json(folder / "manifest.json", dataclasses.asdict(manifest))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(values, file)
        file.flush()
        os.fsync(file.fileno())


def _reported(
    documents: Iterable[Document],
    sources: Iterable[Source],
    stage: str,
    report: Callable[[PrepareProgress], None],
) -> Iterable[Document]:
    """Pass documents on, and report how far their files have been read, now and then."""
    sizes = {source: source.path.stat().st_size for source in sources}
    total = sum(sizes.values())
    before = {}
    done = 0
    for source, size in sizes.items():
        before[source] = done
        done += size
    reported = 0
    for document in documents:
        yield document
        done = before[document.source] + document.file_position
        if done - reported >= min(PROGRESS_BYTES, total - reported) > 0:
            report(PrepareProgress(stage, done, total))
            reported = done


class _ShardWriter:
    """Write tokens one after the other into files of at most MAX_SHARD_TOKENS."""

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder, self.dtype = folder, dtype
        self._shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._n_tokens = 0

    def write(self, tokens: npt.NDArray[Any]) -> None:
        while len(tokens):
            if self._file is None:
                self._open()
            assert self._file is not None
            part = tokens[: MAX_SHARD_TOKENS - self._n_tokens]
            tokens = tokens[len(part) :]
            data = part.astype(self.dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            self._n_tokens += len(part)
            if self._n_tokens == MAX_SHARD_TOKENS:
                self._close()

    def close(self) -> tuple[Shard, ...]:
        if self._file is not None:
            self._close()
        return tuple(self._shards)

    def _open(self) -> None:
        self._name = f"tokens-{len(self._shards):05d}.bin"
        self._file = (self.folder / self._name).open("wb")
        self._digest = hashlib.sha256()
        self._n_tokens = 0

    def _close(self) -> None:
        assert self._file is not None
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        mtime_ns = (self.folder / self._name).stat().st_mtime_ns
        self._shards.append(Shard(self._name, self._n_tokens, self._digest.hexdigest(), mtime_ns))
        self._file = None
