"""Encode a corpus in threads, and write token shards in document order.

Threads are enough: tiktoken and tokenizers release the GIL while encoding.
"""

import hashlib
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import DataError, LockedError, ResourceError
from minigpt.files import locked, make_folder, remove, resource_errors
from minigpt.places import OTHER_CACHE, cache_folder
from minigpt.rings import ring
from minigpt.text.corpus import (
    Corpus,
    Document,
    PrepareProgress,
    content_hash,
    reporter,
    versions,
)
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
    reading_prepared,
    write_json,
    write_shards,
)
from minigpt.text.sources import find_files
from minigpt.text.splitting import split
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, make_tokenizer

BPE_VERSION = 2
"""Increased when ``text.bpe`` learns other merges from the same text, to invalidate caches."""
CHUNK_CHARS = 2**20
_STREAMS, _LOCK, _ABANDONED_S = "streams-", ".lock", 60
MAX_WORKERS = 16
"""Maximum default number of threads: each needs some megabytes, and only one thread reads."""


@dataclass(frozen=True)
class Place(Counts):
    """Position in the tokens of a corpus, and the counts of the pieces before it."""

    n_tokens: int = 0
    """Number of tokens between the counted pieces and the position."""


@dataclass(frozen=True)
class Encoded:
    """Some pieces of a corpus and their tokens."""

    pieces: list[Document]
    tokens: npt.NDArray[Any]
    """Tokens of all pieces, including separators."""
    counts: Counts


@dataclass(frozen=True)
class Work:
    """Amount of work done by one call of ``build_resumable``."""

    n_bytes: int = 0
    """UTF-8 bytes of text encoded."""
    seconds: float = 0.0
    """Seconds spent reading, encoding and writing."""


@contextmanager
def opened_corpus(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    cache_dir: Path | None,
    on_progress: Callable[[PrepareProgress], None] | None,
    chat_model: Path | None = None,
) -> Iterator[Corpus]:
    """Find the files of a corpus; copies of streams are deleted when the context exits."""
    report = on_progress or (lambda progress: None)
    if tokenizer is None and data.tokenizer != "bytes":
        ring("text.bpe").parse_spec(data.tokenizer)  # raises for an unknown one, before downloads
    template: Any = None
    if data.chat:
        chats = ring("text.chat")
        template = chats.training_template(data.chat_template, chat_model)
        if chat_model is not None and (note := chats.plain_note(template, chat_model)):
            report(PrepareProgress("read", 0, 0, note))
    cache = cache_dir or cache_folder()
    with resource_errors(cache, OTHER_CACHE):
        make_folder(cache / "prepared")
        _remove_abandoned(cache)
        with (
            tempfile.TemporaryDirectory(prefix=_STREAMS, dir=cache) as spool,
            locked(Path(spool) / _LOCK),
        ):
            find = partial(
                find_files,
                cache=cache,
                spool=Path(spool),
                data=data,
                on_download=lambda *n: report(PrepareProgress("download", *n)),
                on_note=lambda note: report(PrepareProgress("read", 0, 0, note)),
            )
            files, val_files = find(data.paths), find(data.val) if data.val else []
            found_as = versions([*files, *val_files])
            used = tokenizer or data.tokenizer
            corpus = Corpus(files, val_files, data, used, cache, Path(spool), report, template)
            corpus = split(corpus)
            yield replace(corpus, identity=_identity(corpus), versions=found_as)


def _remove_abandoned(cache: Path) -> None:
    """Delete the copies of streams that killed processes left in the cache."""
    for folder in cache.glob(f"{_STREAMS}*"):
        with suppress(OSError, LockedError, ResourceError):
            # A new one may not be locked yet.
            if time.time() - folder.stat().st_mtime > _ABANDONED_S:
                with locked(folder / _LOCK, "in use"):
                    remove(folder)


def _identity(corpus: Corpus) -> str:
    """Return the hex SHA-256 of all that the tokens of a corpus depend on."""
    data, tokenizer = corpus.data, corpus.tokenizer
    parts: list[object] = [SCHEMA_VERSION]
    if isinstance(tokenizer, str):
        parts += [tokenizer, BPE_VERSION]
    else:  # vocabularies of other models may share a name, so only their content identifies them
        parts.append(tokenizer.fingerprint)
    parts += [content_hash(corpus.files), data.special, data.skip_unencodable]
    parts += [data.field, data.encoding, data.skip_bad]
    is_trained = isinstance(tokenizer, str) and tokenizer.startswith("bpe")
    if corpus.val_split == "documents" or (is_trained and corpus.val_split == "tail"):
        parts += [corpus.val_split, data.val_fraction]
    if corpus.val_files:
        parts.append(content_hash(corpus.val_files))
    if corpus.template is not None:
        template = corpus.template
        parts += [data.loss_on, template.source, sorted(template.tokens.items())]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def begin(folder: Path, corpus: Corpus) -> Tokenizer:
    """Delete an earlier build in a folder, and write the vocabulary, trained if necessary."""
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

    A long corpus is read only as far as merges are learned from it.
    """
    bpe = ring("text.bpe")
    report = reporter(corpus.files, "train tokenizer", corpus.report)
    texts = (report(document).text for document in corpus.documents(training_only=True))
    if corpus.template is not None:
        render = partial(ring("text.conversations").rendered_text, template=corpus.template)
        texts = (part for text in texts for part in render(text).split(END_OF_TEXT))
    train_fraction = 1 - corpus.data.val_fraction if corpus.val_split == "tail" else 1
    read: list[str] = bpe.first_texts(texts, bpe.BPE_TRAINING_BYTES / train_fraction)
    n_left = int(train_fraction * sum(len(text.encode()) for text in read))
    for text in read:
        data = text.encode()[:n_left]
        n_left -= len(data)
        yield data.decode(errors="ignore")


def _resumed(folder: Path, corpus: Corpus) -> tuple[Tokenizer, list[Shard], list[Place]]:
    """Read the vocabulary, the intact shards and their ends from an earlier call for this corpus.

    Raises: DataError, or an error that ``reading_prepared`` converts, if there was no such call.
    """
    record, tokenizer = read_record(folder / UNFINISHED), read_vocabulary(folder)
    found = (record["identity"], record["tokenizer_fingerprint"])
    if found != (corpus.identity, tokenizer.fingerprint):
        raise ValueError("it belongs to another corpus")
    shards = list(takewhile(lambda shard: shard.is_intact(folder), record["shards"]))
    return tokenizer, shards, [Place(**place) for place in record["places"][: len(shards)]]


def build_resumable(folder: Path, corpus: Corpus, n_workers: int = 0) -> Work:
    """Write the shards and the manifest of a corpus, reusing the intact shards of an earlier call.

    The files are the same for any number of workers, and wherever an earlier call stopped.

    Args: n_workers, number of threads; 0 for ``default_workers``.
    Raises: DataError for an unusable corpus; OSError if the folder cannot be written.
    """
    try:
        with reading_prepared(folder):
            tokenizer, shards, places = _resumed(folder, corpus)
    except DataError:
        tokenizer, shards, places = begin(folder, corpus), [], []

    _write_record(folder, corpus, tokenizer, shards, places)
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
        """Yield the tokens that are not in a shard yet; ``place`` is meanwhile where they begin."""
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
            _write_record(folder, corpus, tokenizer, shards, places)
    corpus.require_unchanged()  # its tokens would be stored as those of the earlier text
    manifest = _manifest(corpus, tokenizer, bad_rows.plus(place), dtype, shards)
    write_json(folder / MANIFEST, asdict(manifest))
    (folder / UNFINISHED).unlink(missing_ok=True)
    return Work(place.n_bytes - n_bytes_before, time.perf_counter() - started)


def _write_record(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, shards: list[Shard], places: list[Place]
) -> None:
    """Write what ``_resumed`` reads."""
    record = {
        "schema_version": SCHEMA_VERSION,
        "identity": corpus.identity,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "shards": list(map(asdict, shards)),
        "places": list(map(asdict, places)),
    }
    write_json(folder / UNFINISHED, record)


def _manifest(
    corpus: Corpus, tokenizer: Tokenizer, counts: Counts, dtype: str, shards: list[Shard]
) -> Manifest:
    return Manifest(
        **vars(counts),
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


def default_workers() -> int:
    """Return the number of cores that this process may use, at most MAX_WORKERS."""
    has_affinity = hasattr(os, "sched_getaffinity")
    n_cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return min(n_cores, MAX_WORKERS)


def encode_pieces(
    pieces: Iterable[Document], encode: Callable[[list[Document]], Encoded], n_workers: int
) -> Generator[Encoded]:
    """Encode documents in threads, and yield them in chunks, in order.

    Up to two chunks per worker are in memory, each of about CHUNK_CHARS characters.
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
    """Group small documents, because a task for each would cost more than encoding it."""
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

    Raises: DataError if a character is not in the vocabulary, unless such characters are skipped.
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
            tokenizer.require_rows(piece.text)
            parts = tokenizer.special_pattern.split(piece.text)
        else:
            unparsed.update(tokenizer.special_pattern.findall(piece.text))
        if data.skip_unencodable:
            for i in range(0, len(parts), 2):
                parts[i], dropped = without_unencodable(parts[i], tokenizer)
                skipped.update(dropped)
        n_bytes += sum(len(part.encode()) for part in parts[::2])
        text = "".join(parts)
        arrays.append(tokenizer.encode_array(text, is_start=piece.is_start, special=data.special))
    tokens = np.concatenate(arrays, dtype=dtype, casting="unsafe")
    counts = counts_of(chunk, tokens, n_bytes=n_bytes, unparsed=unparsed, skipped=skipped)
    return Encoded(chunk, tokens, counts)


def without_unencodable(text: str, tokenizer: Tokenizer) -> tuple[str, str]:
    """Return a text without the characters missing from the vocabulary, and these characters."""
    missing = tokenizer.unencodable(text)
    if not missing:
        return text, ""
    kept = text.translate({ord(character): None for character in missing})
    return kept, "".join(filter(missing.__contains__, text))


def counts_of(chunk: list[Document], tokens: npt.NDArray[Any], **others: Any) -> Counts:
    """Return the counts of pieces that are either all for training or all for validation."""
    return Counts(
        n_pieces=len(chunk),
        n_documents=sum(piece.is_start for piece in chunk),
        n_val_tokens=len(tokens) * chunk[0].is_validation,
        **others,
    )
