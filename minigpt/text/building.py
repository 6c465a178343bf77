"""A corpus -> token shards on disk, encoded in threads and written in the order of the documents.

Threads are enough: tiktoken and tokenizers encode without holding Python's lock.
"""

import hashlib
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.files import OTHER_CACHE, cache_folder, resource_errors
from minigpt.text.corpus import CorpusFile, Document, content_hash, find_files, iter_documents
from minigpt.text.shard_files import (
    SCHEMA_VERSION,
    VOCABULARY,
    Manifest,
    Shard,
    ShardWriter,
    is_ours,
    write_json,
)
from minigpt.text.tokenizer import BPE_TRAINING_BYTES, Tokenizer, make_tokenizer, parse_spec

PROGRESS_BYTES = 2**20
CHUNK_CHARS = 2**20
MAX_WORKERS = 16
"""Default limit of threads: each holds some megabytes, and one thread reads for all."""


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation."""

    stage: str
    """download, train tokenizer, or encode."""
    done: int
    """Bytes of the files read in this stage."""
    total: int
    """Bytes of all files."""


Report = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class Corpus:
    """Files, and how they become tokens."""

    files: list[CorpusFile]
    """Files in order."""
    tokenizer: Tokenizer | str
    """Tokenizer, or the spec of one that may have to be trained."""
    train_fraction: float
    """Share of the text, from its beginning, that a tokenizer may be trained on."""
    identity: str
    """sha256 over the text and the tokenizer."""
    cache: Path
    """Folder that keeps prepared corpora."""
    report: Report
    """Called now and then while the files are read."""


@dataclass(frozen=True)
class Place:
    """Position in the tokens of a corpus, whose pieces are read in order."""

    n_pieces: int = 0
    """Number of pieces whose tokens all come before it."""
    n_tokens: int = 0
    """Number of tokens before it that belong to later pieces."""
    n_documents: int = 0
    """Number of documents that begin in those pieces."""
    n_bytes: int = 0
    """UTF-8 bytes of the text of those pieces."""


@dataclass(frozen=True)
class Start:
    """State from which a corpus is written."""

    tokenizer: Tokenizer
    shards: Sequence[Shard] = ()
    """Shards that are already complete."""
    place: Place = Place()
    """End of those shards."""


@dataclass(frozen=True)
class Work:
    """Amount of work that one call of ``build`` did."""

    n_bytes: int = 0
    """UTF-8 bytes of text encoded."""
    seconds: float = 0.0
    """Seconds of reading, encoding and writing."""


@dataclass(frozen=True)
class Encoded:
    """Tokens of consecutive pieces of documents."""

    tokens: npt.NDArray[Any]
    """Tokens, with the separators before the documents that begin here."""
    n_pieces: int
    n_documents: int
    """Number of documents that begin here."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    last: Document
    """Last piece."""


@contextmanager
def opened_corpus(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    cache_dir: Path | None,
    on_progress: Report | None,
) -> Iterator[Corpus]:
    """Find the files of a corpus; copies of streams exist until the context ends.

    Raises: ConfigError, DataError or ResourceError as ``prepare``.
    """
    report = on_progress or (lambda progress: None)
    kind = None if tokenizer else parse_spec(data.tokenizer)[0]  # before a download, not after
    cache = cache_dir or cache_folder()
    with resource_errors(cache, OTHER_CACHE):
        (cache / "prepared").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="streams-", dir=cache) as spool:
            files = find_files(
                data.paths,
                cache,
                Path(spool),
                on_download=lambda *n: report(PrepareProgress("download", *n)),
            )
            # A name does not identify a vocabulary that was not made here: two may share it.
            vocabulary = data.tokenizer if tokenizer is None else tokenizer.fingerprint
            train_fraction = 1 - data.val_fraction
            if kind == "bpe":
                vocabulary += f" of {train_fraction}"
            what = f"{SCHEMA_VERSION} {vocabulary} {content_hash(files)}"
            identity = hashlib.sha256(what.encode()).hexdigest()
            used = tokenizer or data.tokenizer
            yield Corpus(files, used, train_fraction, identity, cache, report)


def begin(folder: Path, corpus: Corpus) -> Start:
    """Empty a folder and write the vocabulary of a corpus, trained if necessary."""
    for path in folder.iterdir():
        if is_ours(path):
            path.unlink()
    tokenizer = corpus.tokenizer
    if isinstance(tokenizer, str):
        texts = _Reporter(corpus, "train tokenizer").texts(iter_documents(corpus.files))
        tokenizer = make_tokenizer(tokenizer, _first(texts, corpus.train_fraction))
    write_json(folder / VOCABULARY, tokenizer.to_dict())
    return Start(tokenizer)


def build(
    folder: Path,
    corpus: Corpus,
    n_workers: int = 0,
    start: Start | None = None,
    on_shard: Callable[[Sequence[Shard], Place], None] | None = None,
) -> Work:
    """Write the shards and the manifest of a corpus.

    The files are the same for any number of workers, and any start.

    Args: folder, which exists; n_workers, threads, 0 for all cores; start, None to ``begin``;
        on_shard, called with all full shards, and where they end, after each.
    Raises: DataError for a corpus that cannot be used; OSError if the folder cannot be written.
    """
    start = start or begin(folder, corpus)
    tokenizer, place = start.tokenizer, start.place
    reporter = _Reporter(corpus, "encode")
    pieces = iter_documents(corpus.files)
    for piece in islice(pieces, place.n_pieces):
        reporter.at(piece)
    started = time.perf_counter()
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    n_known = place.n_tokens  # of a piece that continues after the last full shard
    parts = encode_pieces(pieces, tokenizer, dtype, n_workers or default_workers())
    with closing(parts), ShardWriter(folder, dtype, start.shards) as writer:
        for part in parts:
            n_skipped = min(n_known, len(part.tokens))
            n_known -= n_skipped
            for n_written in writer.write(part.tokens[n_skipped:]):
                if on_shard:
                    on_shard(writer.shards, replace(place, n_tokens=n_skipped + n_written))
            place = Place(
                n_pieces=place.n_pieces + part.n_pieces,
                n_documents=place.n_documents + part.n_documents,
                n_bytes=place.n_bytes + part.n_bytes,
            )
            reporter.at(part.last)
        writer.close()
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        identity=corpus.identity,
        dtype=dtype,
        n_tokens=sum(shard.n_tokens for shard in writer.shards),
        n_bytes=place.n_bytes,
        n_documents=place.n_documents,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shards=tuple(writer.shards),
        sources=tuple(file.name for file in corpus.files),
    )
    manifest.write(folder)
    return Work(place.n_bytes - start.place.n_bytes, time.perf_counter() - started)


def default_workers() -> int:
    """Return the number of cores that this process may use, at most MAX_WORKERS."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_WORKERS)
    return min(os.cpu_count() or 1, MAX_WORKERS)


def encode_pieces(
    pieces: Iterable[Document], tokenizer: Tokenizer, dtype: str, n_workers: int
) -> Generator[Encoded]:
    """Encode documents in threads, and yield their tokens in order.

    Memory holds about CHUNK_CHARS characters and their tokens, twice for each worker.

    Raises: DataError if the vocabulary lacks a byte, and what reading ``pieces`` raises.
    """
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="encode")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in _chunks(pieces):
            waiting.append(pool.submit(_encode, chunk, tokenizer, dtype))
            if len(waiting) >= 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(pieces: Iterable[Document]) -> Iterator[list[Document]]:
    """Group small documents: a task for each would cost more than its encoding."""
    chunk: list[Document] = []
    n_chars = 0
    for piece in pieces:
        chunk.append(piece)
        n_chars += len(piece.text)
        if n_chars >= CHUNK_CHARS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _encode(chunk: list[Document], tokenizer: Tokenizer, dtype: str) -> Encoded:
    separator = np.array(tokenizer.separator, np.uint32)
    arrays = []
    for piece in chunk:
        if piece.is_start:
            arrays.append(separator)
        arrays.append(tokenizer.encode_array(piece.text, is_start=piece.is_start))
    return Encoded(
        tokens=np.concatenate(arrays, dtype=dtype, casting="unsafe"),
        n_pieces=len(chunk),
        n_documents=sum(piece.is_start for piece in chunk),
        n_bytes=sum(len(piece.text.encode()) for piece in chunk),
        last=chunk[-1],
    )


def _first(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yield the first share of texts, so that no merge is learned from validation text.

    Only as much of a long corpus is read as merges are learned from.
    """
    read: list[str] = []
    n_bytes = 0
    for text in texts:
        read.append(text)
        n_bytes += len(text.encode())
        if share * n_bytes >= BPE_TRAINING_BYTES:
            break
    n_left = int(share * n_bytes)
    for text in read:
        data = text.encode()[:n_left]
        n_left -= len(data)
        if data:
            yield data.decode(errors="ignore")


class _Reporter:
    """Reports now and then how far the files of a corpus have been read."""

    def __init__(self, corpus: Corpus, stage: str) -> None:
        self._report, self._stage = corpus.report, stage
        self._before: dict[CorpusFile, int] = {}
        self._total = self._done = 0
        for file in corpus.files:
            self._before[file] = self._total
            self._total += file.path.stat().st_size

    def at(self, document: Document) -> None:
        """Report that a document has been processed."""
        done = self._before[document.file] + document.file_position
        if done - self._done >= min(PROGRESS_BYTES, self._total - self._done) > 0:
            self._report(PrepareProgress(self._stage, done, self._total))
            self._done = done

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """Yield the texts of documents; each counts as processed when the next is requested."""
        for document in documents:
            yield document.text
            self.at(document)
