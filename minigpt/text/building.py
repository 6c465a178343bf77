"""A corpus -> token shards on disk, encoded in threads and written in the order of the documents.

Threads are enough: tiktoken and tokenizers encode without holding Python's lock.
"""

import hashlib
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.files import make_folder, resource_errors
from minigpt.places import OTHER_CACHE, cache_folder
from minigpt.rings import ring
from minigpt.text.corpus import Corpus, Document, PrepareProgress, content_hash, reporter
from minigpt.text.shard_files import (
    MANIFEST,
    SCHEMA_VERSION,
    UNFINISHED,
    VOCABULARY,
    Counts,
    Manifest,
    Shard,
    is_ours,
    read_record,
    read_vocabulary,
    reading,
    write_json,
    write_shards,
)
from minigpt.text.sources import find_files
from minigpt.text.splitting import split
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, make_tokenizer

BPE_VERSION = 2
"""Changes with what ``text.bpe`` learns from a text, so that caches are made again."""
CHUNK_CHARS = 2**20
MAX_WORKERS = 16
"""Default limit of threads: each holds some megabytes, and one thread reads for all."""


@dataclass(frozen=True)
class Place(Counts):
    """Position in the tokens of a corpus, and the counts of the pieces before it."""

    n_tokens: int = 0
    """Number of tokens before it that belong to later pieces."""


@dataclass(frozen=True)
class Encoded:
    """Some pieces of a corpus and their tokens."""

    pieces: list[Document]
    tokens: npt.NDArray[Any]
    """Tokens of all of them, separators included."""
    counts: Counts


@dataclass(frozen=True)
class Work:
    """Amount of work that one call of ``build`` did."""

    n_bytes: int = 0
    """UTF-8 bytes of text encoded."""
    seconds: float = 0.0
    """Seconds of reading, encoding and writing."""


@contextmanager
def opened_corpus(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    cache_dir: Path | None,
    on_progress: Callable[[PrepareProgress], None] | None,
    chat_model: Path | None = None,
) -> Iterator[Corpus]:
    """Find the files of a corpus; copies of streams exist until the context ends."""
    report = on_progress or (lambda progress: None)
    is_trained = False
    if tokenizer is None and data.tokenizer != "bytes":  # before a download, not after
        is_trained = ring("text.bpe").parse_spec(data.tokenizer)[0] == "bpe"
    template: Any = None
    if data.chat:
        template = ring("text.chat").training_template(data.chat_template, chat_model)
    cache = cache_dir or cache_folder()
    with resource_errors(cache, OTHER_CACHE):
        make_folder(cache / "prepared")
        with tempfile.TemporaryDirectory(prefix="streams-", dir=cache) as spool:
            find = partial(
                find_files,
                cache=cache,
                spool=Path(spool),
                data=data,
                on_download=lambda *n: report(PrepareProgress("download", *n)),
                on_note=lambda note: report(PrepareProgress("read", 0, 0, note)),
            )
            files, val_files = find(data.paths), find(data.val) if data.val else []
            used = tokenizer or data.tokenizer
            corpus = Corpus(files, val_files, data, used, cache, Path(spool), report, template)
            corpus = split(corpus)
            # A name does not identify a vocabulary that was not made here: two may share it.
            what: list[object] = [SCHEMA_VERSION]
            what += [data.tokenizer, BPE_VERSION] if tokenizer is None else [tokenizer.fingerprint]
            what += [content_hash(files), data.special, data.skip_unencodable]
            what += [data.field, data.encoding, data.skip_bad]
            if corpus.val_split == "documents" or (is_trained and corpus.val_split == "tail"):
                what += [corpus.val_split, data.val_fraction]
            if val_files:
                what.append(content_hash(val_files))
            if data.chat:
                what += [data.loss_on, template.source, sorted(template.tokens.items())]
            identity = hashlib.sha256("\n".join(map(str, what)).encode()).hexdigest()
            yield replace(corpus, identity=identity)


def begin(folder: Path, corpus: Corpus) -> Tokenizer:
    """Empty a folder and write the vocabulary of a corpus, trained if necessary."""
    for path in folder.iterdir():
        if is_ours(path):
            path.unlink()
    tokenizer = corpus.tokenizer
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, training_texts(corpus))
    write_json(folder / VOCABULARY, tokenizer.to_dict())
    return tokenizer


def training_texts(corpus: Corpus) -> Iterator[str]:
    """Yield the training text of a corpus, so that no merge is learned from validation text.

    Only as much of a long corpus is read as merges are learned from.
    """
    bpe = ring("text.bpe")
    report = reporter(corpus.files, "train tokenizer", corpus.report)
    texts = (report(document).text for document in corpus.documents(training_only=True))
    if corpus.template is not None:
        render = partial(ring("text.conversations").row_text, template=corpus.template)
        texts = (part for text in texts for part in render(text).split(END_OF_TEXT))
    train_fraction = 1 - corpus.data.val_fraction if corpus.val_split == "tail" else 1
    read: list[str] = bpe.first_texts(texts, bpe.BPE_TRAINING_BYTES / train_fraction)
    n_left = int(train_fraction * sum(len(text.encode()) for text in read))
    for text in read:
        data = text.encode()[:n_left]
        n_left -= len(data)
        yield data.decode(errors="ignore")


def _resumed(folder: Path, corpus: Corpus) -> tuple[Tokenizer, list[Shard], list[Place]]:
    """Read the vocabulary, intact shards and their ends of an earlier call for the same corpus.

    Raises: errors of ``reading``, or DataError, if there was none.
    """
    record, tokenizer = read_record(folder / UNFINISHED), read_vocabulary(folder)
    found = (record["identity"], record["tokenizer_fingerprint"])
    if found != (corpus.identity, tokenizer.fingerprint):
        raise ValueError("it is of another corpus")
    shards = list(takewhile(lambda shard: shard.is_intact(folder), record["shards"]))
    return tokenizer, shards, [Place(**place) for place in record["places"][: len(shards)]]


def build_resumable(folder: Path, corpus: Corpus, n_workers: int = 0) -> Work:
    """Write the shards and the manifest of a corpus, after the intact shards of an earlier call.

    The files are the same for any number of workers, and any start.

    Args: n_workers, threads, 0 for all cores.
    Raises: DataError for a corpus that cannot be used; OSError if the folder cannot be written.
    """
    try:
        with reading(folder):
            tokenizer, shards, places = _resumed(folder, corpus)
    except DataError:
        tokenizer, shards, places = begin(folder, corpus), [], []

    def write_record() -> None:
        record = {
            "schema_version": SCHEMA_VERSION,
            "identity": corpus.identity,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "shards": list(map(asdict, shards)),
            "places": list(map(asdict, places)),
        }
        write_json(folder / UNFINISHED, record)

    write_record()
    place = places[-1] if places else Place()
    n_bytes_before = place.n_bytes
    report = reporter([*corpus.files, *corpus.val_files], "encode", corpus.report)
    bad_rows = Counts()

    def on_skip(message: str) -> None:
        nonlocal bad_rows
        bad_rows = bad_rows.plus(Counts(n_bad_rows=1, bad_row=message))

    pieces = corpus.documents(on_skip=on_skip)
    for piece in islice(pieces, place.n_pieces):
        report(piece)
    started = time.perf_counter()
    is_small = tokenizer.vocab_size <= 2**16 and not corpus.data.chat
    dtype = "<u2" if is_small else "<u4"
    encode = partial(_encode, corpus=corpus, tokenizer=tokenizer, dtype=dtype)
    encoded = encode_pieces(pieces, encode, n_workers or default_workers())

    def new_tokens() -> Iterator[npt.NDArray[Any]]:
        """Yield tokens that no shard has, while ``place`` is where they begin."""
        nonlocal place
        for part in encoded:
            if place.n_tokens < len(part.tokens):
                yield part.tokens[place.n_tokens :]
            place = place.plus(part.counts)
            report(part.pieces[-1])

    with closing(encoded):
        for shard, n_written in write_shards(folder, dtype, new_tokens(), len(shards)):
            shards.append(shard)
            places.append(replace(place, n_tokens=place.n_tokens + n_written))
            write_record()
    manifest = Manifest(
        **vars(bad_rows.plus(place)),
        schema_version=SCHEMA_VERSION,
        identity=corpus.identity,
        dtype=dtype,
        n_tokens=sum(shard.n_tokens for shard in shards),
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shards=tuple(shards),
        sources=tuple(file.name for file in corpus.files),
        special=corpus.data.special,
        chat_template=corpus.template.source if corpus.template else "",
        loss_on=corpus.data.loss_on or "all",
        val_split=corpus.val_split,
        val_fraction=corpus.data.val_fraction,
    )
    write_json(folder / MANIFEST, asdict(manifest))
    (folder / UNFINISHED).unlink(missing_ok=True)
    return Work(place.n_bytes - n_bytes_before, time.perf_counter() - started)


def default_workers() -> int:
    """Return the number of cores that this process may use, at most MAX_WORKERS."""
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(n_cores, MAX_WORKERS)


def encode_pieces(
    pieces: Iterable[Document], encode: Callable[[list[Document]], Encoded], n_workers: int
) -> Generator[Encoded]:
    """Encode documents in threads, and yield them in chunks, in order.

    Memory holds about CHUNK_CHARS characters and their tokens, twice for each worker.
    """
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="encode")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in _chunks(pieces):
            waiting.append(pool.submit(encode, chunk))
            if len(waiting) >= 2 * n_workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(pieces: Iterable[Document]) -> Iterator[list[Document]]:
    """Group small documents: a task for each would cost more than its encoding."""
    chunk: list[Document] = []
    n_chars = 0
    for piece in pieces:
        if chunk and (n_chars >= CHUNK_CHARS or chunk[-1].is_validation != piece.is_validation):
            yield chunk
            chunk, n_chars = [], 0
        chunk.append(piece)
        n_chars += len(piece.text)
    if chunk:
        yield chunk


def _encode(chunk: list[Document], corpus: Corpus, tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Encode documents.

    Raises: DataError if the vocabulary lacks a character, unless such characters are skipped.
    """
    if corpus.template is not None:
        return ring("text.conversations").encode_rows(chunk, corpus, tokenizer, dtype)
    data, separator = corpus.data, np.array(tokenizer.separator, np.uint32)
    arrays, n_bytes = [np.array([], np.uint32)], 0
    unparsed, skipped = Counter[str](), Counter[str]()
    for piece in chunk:
        if piece.is_start:
            arrays.append(separator)
        parts = [piece.text]
        if data.special:  # the odd parts are special tokens
            parts = tokenizer.special_pattern.split(piece.text)
        else:
            unparsed.update(tokenizer.special_pattern.findall(piece.text))
        for i, part in list(enumerate(parts))[::2] if data.skip_unencodable else ():
            parts[i], dropped = without_unencodable(part, tokenizer)
            skipped.update(dropped)
        n_bytes += sum(len(part.encode()) for part in parts[::2])
        text = "".join(parts)
        arrays.append(tokenizer.encode_array(text, is_start=piece.is_start, special=data.special))
    tokens = np.concatenate(arrays, dtype=dtype, casting="unsafe")
    counts = counts_of(chunk, tokens, n_bytes=n_bytes, unparsed=unparsed, skipped=skipped)
    return Encoded(chunk, tokens, counts)


def without_unencodable(text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return a text without the characters that the vocabulary lacks, and those."""
    lacking = tokenizer.unencodable(text)
    if not lacking:
        return text, ""
    kept = text.translate({ord(character): None for character in lacking})
    return kept, "".join(filter(lacking.__contains__, text))


def counts_of(chunk: list[Document], tokens: npt.NDArray[Any], **others: Any) -> Counts:
    """Return the counts of some pieces, which are all for training or all for validation."""
    return Counts(
        n_pieces=len(chunk),
        n_documents=sum(piece.is_start for piece in chunk),
        n_val_tokens=len(tokens) * chunk[0].is_validation,
        **others,
    )
