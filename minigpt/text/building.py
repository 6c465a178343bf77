"""A corpus -> token shards on disk, encoded in threads and written in the order of the documents.

Threads are enough: tiktoken and tokenizers encode without holding Python's lock.
"""

import hashlib
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.files import OTHER_CACHE, cache_folder, resource_errors
from minigpt.rings import has_ring, ring
from minigpt.text.corpus import (
    CorpusFile,
    Document,
    content_hash,
    find_files,
    iter_documents,
    split_documents,
)
from minigpt.text.shard_files import (
    CONTEXT_ONLY,
    MANIFEST,
    SCHEMA_VERSION,
    VOCABULARY,
    Manifest,
    Shard,
    is_ours,
    write_json,
    write_shards,
)
from minigpt.text.tokenizer import (
    BPE_TRAINING_BYTES,
    BPE_VERSION,
    END_OF_TEXT,
    Tokenizer,
    first_texts,
    make_tokenizer,
    parse_spec,
)

_SPLITTING = "text.splitting"
PROGRESS_BYTES = 2**20
CHUNK_CHARS = 2**20
MAX_WORKERS = 16
"""Default limit of threads: each holds some megabytes, and one thread reads for all."""


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of a preparation."""

    stage: str
    """download, split, train tokenizer, or encode."""
    done: int
    """Bytes of the files read in this stage."""
    total: int
    """Bytes of all files."""
    note: str = ""
    """A line about the text that is read. Empty for progress only."""


@dataclass(frozen=True)
class Corpus:
    """Files, and how they become tokens."""

    files: list[CorpusFile]
    """Files in order."""
    val_files: list[CorpusFile]
    """Files of a validation text of its own."""
    data: DataConfig
    """How the files are read and split."""
    tokenizer: Tokenizer | str
    """Tokenizer, or the spec of one that may have to be trained."""
    cache: Path
    """Folder that keeps prepared corpora."""
    spool: Path
    """Folder of temporary files."""
    report: Callable[[PrepareProgress], None]
    """Called now and then while the files are read."""
    template: Any = None
    """Chat template, if the rows are conversations."""
    val_split: str = "tail"
    """Text kept for validation: tail, documents, own (val_files) or none."""
    is_validation: Callable[[str], bool] | None = None
    """Whether a document is kept for validation, by its first piece. None without such a choice."""
    identity: str = ""
    """sha256 over the text, the split and the tokenizer."""

    def documents(
        self, *, training_only: bool = False, on_skip: Callable[[str], None] | None = None
    ) -> Iterator[Document]:
        """Yield the documents as they are stored: those for training, then those for validation."""
        found = self.read(self.files, on_skip)
        if self.is_validation:
            splitting = ring(_SPLITTING)
            found = splitting.training_first(found, self.is_validation, self.spool)
        for document in found:
            if not (training_only and document.is_validation):
                yield document
        if self.val_files and not training_only:
            for document in self.read(self.val_files, on_skip):
                yield replace(document, is_validation=True)

    def read(
        self, files: list[CorpusFile], on_skip: Callable[[str], None] | None = None
    ) -> Iterator[Document]:
        """Yield the documents of files in their order."""
        documents = iter_documents(files, self.data, on_skip)
        end = _end_of_text(self.tokenizer)
        return split_documents(documents, end) if self.data.special and end else documents


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
    """UTF-8 bytes of the text of those pieces that became tokens other than special ones."""
    unparsed: Mapping[str, int] = field(default_factory=dict)
    """Special tokens that are plain text in those pieces, and how often each is."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Characters of those pieces that were skipped, and how often each was."""
    n_refused: int = 0
    """Number of conversations that the chat template refused, left out of the tokens."""
    refused: str = ""
    """Message about the first of them."""
    n_val_tokens: int = 0
    """Number of tokens of validation documents in those pieces."""

    def after(self, encoded: "Encoded") -> "Place":
        """Return the place after this one and some encoded pieces."""
        return Place(
            n_pieces=self.n_pieces + len(encoded.pieces),
            n_documents=self.n_documents
            + sum(piece.is_start for piece in encoded.pieces)
            - len(encoded.refused),
            n_refused=self.n_refused + len(encoded.refused),
            refused=self.refused or next(iter(encoded.refused), ""),
            n_bytes=self.n_bytes + encoded.n_bytes,
            unparsed=dict(Counter(self.unparsed) + encoded.unparsed),
            skipped=dict(Counter(self.skipped) + encoded.skipped),
            n_val_tokens=self.n_val_tokens + len(encoded.tokens) * encoded.pieces[0].is_validation,
        )


@dataclass(frozen=True)
class Encoded:
    """Some pieces of a corpus and their tokens. Its counts are those of ``Place``."""

    pieces: list[Document]
    """Pieces in order."""
    tokens: npt.NDArray[Any]
    """Tokens of all of them, separators included."""
    n_bytes: int
    unparsed: Counter[str]
    skipped: Counter[str]
    refused: list[str]


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
    template: Any = None,
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
            corpus = _split(corpus)
            # A name does not identify a vocabulary that was not made here: two may share it.
            what: list[object] = [SCHEMA_VERSION]
            what += [data.tokenizer, BPE_VERSION] if tokenizer is None else [tokenizer.fingerprint]
            what += [content_hash(files), data.special, data.skip_unencodable]
            what += [data.field, data.encoding, data.skip_bad]
            if corpus.val_split == "documents" or (kind == "bpe" and corpus.val_split == "tail"):
                what += [corpus.val_split, data.val_fraction]
            if val_files:
                what.append(content_hash(val_files))
            if data.chat:
                assert template is not None, "conversations need a template"
                what += [data.loss_on, template.source, sorted(template.tokens.items())]
            identity = hashlib.sha256("\n".join(map(str, what)).encode()).hexdigest()
            yield replace(corpus, identity=identity)


def _split(corpus: Corpus) -> Corpus:
    """Choose the documents of a corpus that are kept for validation.

    Raises: DataError if a file is in both texts; ConfigError for an option of rows without any.
    """
    data, files = corpus.data, corpus.files
    has_rows = any(file.format != "text" for file in (*files, *corpus.val_files))
    for name, default in (("field", "text"), ("skip_bad", False)):
        if getattr(data, name) != default and not has_rows:
            raise ConfigError(
                f"{name} is for files of rows, and {files[0].name!r} is text. Leave it out, or "
                "name the format with --format."
            )
    paths = [{file.path.resolve() for file in part} for part in (files, corpus.val_files)]
    if both := paths[0] & paths[1]:
        raise DataError(f"{str(min(both))!r} is in both DATA and --val. Leave it out of one.")
    if corpus.val_files or not data.val_fraction:
        return replace(corpus, val_split="own" if corpus.val_files else "none")
    if data.val_split == "tail" or not (data.val_split or has_ring(_SPLITTING)):
        return corpus
    splitting = ring(_SPLITTING)
    if data.val_split is None:
        # A text file is a document: it need not be read to be counted.
        is_few = not has_rows and not data.special and len(files) < splitting.MIN_DOCUMENTS
        if is_few or not splitting.are_several(corpus.read(files)):
            return corpus
    report = _reporter(files, "split", corpus.report)
    is_validation = splitting.choose(map(report, corpus.read(files)), data.val_fraction)
    return replace(corpus, val_split="documents", is_validation=is_validation)


def _end_of_text(tokenizer: Tokenizer | str) -> str:
    """Return the text of the token between documents; empty if there is none."""
    if isinstance(tokenizer, str):
        return END_OF_TEXT
    texts = (text for text, i in tokenizer.special_ids.items() if i == tokenizer.end_of_text)
    return next(texts, "")


def begin(folder: Path, corpus: Corpus) -> Tokenizer:
    """Empty a folder and write the vocabulary of a corpus, trained if necessary."""
    for path in folder.iterdir():
        if is_ours(path):
            path.unlink()
    tokenizer = corpus.tokenizer
    if isinstance(tokenizer, str):
        tokenizer = make_tokenizer(tokenizer, _training_texts(corpus))
    write_json(folder / VOCABULARY, tokenizer.to_dict())
    return tokenizer


def build(
    folder: Path,
    corpus: Corpus,
    tokenizer: Tokenizer,
    n_workers: int = 0,
    *,
    shards: Sequence[Shard] = (),
    place: Place = Place(),
    on_shard: Callable[[Shard, Place], None] | None = None,
) -> Work:
    """Write the shards and the manifest of a corpus into the folder of ``begin``.

    The files are the same for any number of workers, and any start.

    Args: n_workers, threads, 0 for all cores; shards, those that are already complete, and place,
        their end; on_shard, called with each shard and its end.
    Raises: DataError for a corpus that cannot be used; OSError if the folder cannot be written.
    """
    n_bytes_before = place.n_bytes
    report = _reporter([*corpus.files, *corpus.val_files], "encode", corpus.report)
    n_bad_rows, bad_row = 0, ""

    def on_skip(message: str) -> None:
        nonlocal n_bad_rows, bad_row
        n_bad_rows, bad_row = n_bad_rows + 1, bad_row or message

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
        n_known = place.n_tokens
        for part in encoded:
            place = replace(place, n_tokens=min(n_known, len(part.tokens)))
            n_known -= place.n_tokens
            if place.n_tokens < len(part.tokens):
                yield part.tokens[place.n_tokens :]
            place = place.after(part)
            report(part.pieces[-1])

    shards = list(shards)
    with closing(encoded):
        for shard, n_written in write_shards(folder, dtype, new_tokens(), len(shards)):
            shards.append(shard)
            if on_shard:
                on_shard(shard, replace(place, n_tokens=place.n_tokens + n_written))
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        identity=corpus.identity,
        dtype=dtype,
        n_tokens=sum(shard.n_tokens for shard in shards),
        n_bytes=place.n_bytes,
        n_documents=place.n_documents,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shards=tuple(shards),
        sources=tuple(file.name for file in corpus.files),
        special=corpus.data.special,
        chat_template=corpus.template.source if corpus.template else "",
        loss_on=corpus.data.loss_on or "all",
        unparsed=place.unparsed,
        skipped=place.skipped,
        val_split=corpus.val_split,
        val_fraction=corpus.data.val_fraction,
        n_val_tokens=place.n_val_tokens,
        n_bad_rows=n_bad_rows + place.n_refused,
        bad_row=bad_row or place.refused,
    )
    write_json(folder / MANIFEST, asdict(manifest))
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

    Raises: what ``encode`` and reading ``pieces`` raise.
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
        if chunk and chunk[-1].is_validation != piece.is_validation:
            yield chunk
            chunk, n_chars = [], 0
        chunk.append(piece)
        n_chars += len(piece.text)
        if n_chars >= CHUNK_CHARS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _encode(chunk: list[Document], corpus: Corpus, tokenizer: Tokenizer, dtype: str) -> Encoded:
    """Encode documents.

    Raises: DataError if the vocabulary lacks a character, unless such characters are skipped.
    """
    arrays, n_bytes = [np.array([], np.uint32)], 0
    unparsed, skipped = Counter[str](), Counter[str]()
    refused: list[str] = []
    for piece in chunk:
        if corpus.template is not None:
            loss_on, chat = corpus.data.loss_on, ring("text.chat")
            try:
                arrays.append(chat.encode_row(piece.text, corpus.template, tokenizer, loss_on))
            except DataError as error:
                if not corpus.data.skip_bad:
                    raise
                refused.append(str(error))
                continue
            n_bytes += int(tokenizer.token_byte_lengths[arrays[-1] % CONTEXT_ONLY].sum())
            continue
        if piece.is_start:
            arrays.append(np.array(tokenizer.separator, np.uint32))
        parts = [piece.text]
        if corpus.data.special:  # the odd parts are special tokens
            parts = tokenizer.special_pattern.split(piece.text)
        else:
            unparsed.update(tokenizer.special_pattern.findall(piece.text))
        for i, part in list(enumerate(parts))[::2] if corpus.data.skip_unencodable else ():
            if lacking := tokenizer.unencodable(part):
                skipped.update(filter(lacking.__contains__, part))
                parts[i] = part.translate({ord(character): None for character in lacking})
        n_bytes += sum(len(part.encode()) for part in parts[::2])
        text = "".join(parts)
        arrays.append(
            tokenizer.encode_array(text, is_start=piece.is_start, special=corpus.data.special)
        )
    tokens = np.concatenate(arrays, dtype=dtype, casting="unsafe")
    return Encoded(chunk, tokens, n_bytes, unparsed, skipped, refused)


def _training_texts(corpus: Corpus) -> Iterator[str]:
    """Yield the training text of a corpus, so that no merge is learned from validation text.

    Only as much of a long corpus is read as merges are learned from.
    """
    report = _reporter(corpus.files, "train tokenizer", corpus.report)
    texts = (report(document).text for document in corpus.documents(training_only=True))
    if corpus.template is not None:
        render = partial(ring("text.chat").row_text, template=corpus.template)
        texts = (part for text in texts for part in render(text).split(END_OF_TEXT))
    train_fraction = 1 - corpus.data.val_fraction if corpus.val_split == "tail" else 1
    read = first_texts(texts, BPE_TRAINING_BYTES / train_fraction)
    n_left = int(train_fraction * sum(len(text.encode()) for text in read))
    for text in read:
        data = text.encode()[:n_left]
        n_left -= len(data)
        yield data.decode(errors="ignore")


def _reporter(
    files: Sequence[CorpusFile], stage: str, report: Callable[[PrepareProgress], None]
) -> Callable[[Document], Document]:
    """Return a function that reports now and then how far the files have been read."""
    total = sum(file.path.stat().st_size for file in files)
    reported = 0

    def look(document: Document) -> Document:
        nonlocal reported
        if document.position - reported >= min(PROGRESS_BYTES, total - reported) > 0:
            reported = document.position
            report(PrepareProgress(stage, reported, total))
        return document

    return look
