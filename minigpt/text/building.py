"""A corpus -> the files of a prepared one, from where an earlier call was broken off."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from minigpt.config import DataConfig
from minigpt.errors import DataError
from minigpt.files import OTHER_CACHE, cache_folder, resource_errors
from minigpt.text.corpus import Document, Source, content_hash, find_sources, iter_documents
from minigpt.text.encoding import Encoded, default_workers, encoded
from minigpt.text.shard_files import (
    MANIFEST,
    SCHEMA_VERSION,
    UNFINISHED,
    VOCABULARY,
    Manifest,
    Place,
    ShardWriter,
    Unfinished,
    is_ours,
    read_vocabulary,
    write_json,
)
from minigpt.text.tokenizer import BPE_TRAINING_BYTES, Tokenizer, make_tokenizer, parse_spec

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


Report = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class Corpus:
    """Files that are there, and how they are to become tokens."""

    sources: list[Source]
    """In order."""
    tokenizer: Tokenizer | str
    """One that is there, or the spec of one that may have to be trained."""
    train_fraction: float
    """The share of the text, from its beginning, that a tokenizer may be trained on."""
    identity: str
    """sha256 over the text and the tokenizer."""
    cache: Path
    """Where prepared corpora are kept."""
    report: Report
    """Is called now and then while the files are read."""


@dataclass(frozen=True)
class Work:
    """What one call of ``build`` did."""

    n_bytes: int = 0
    """UTF-8 bytes of text that it encoded."""
    seconds: float = 0.0
    """Of reading, encoding and writing them."""


@contextmanager
def opened_corpus(
    data: DataConfig,
    tokenizer: Tokenizer | None,
    cache_dir: Path | None,
    on_progress: Report | None,
) -> Iterator[Corpus]:
    """Find the files of a corpus; copies of streams are there as long as the context is.

    Raises: ConfigError, DataError or ResourceError as ``prepare``.
    """
    report = on_progress or (lambda progress: None)
    if tokenizer is None:
        parse_spec(data.tokenizer)  # before a download, not after
    cache = cache_dir or cache_folder()
    with resource_errors(cache, OTHER_CACHE):
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
            train_fraction = 1 - data.val_fraction
            if tokenizer is None and parse_spec(data.tokenizer)[0] == "bpe":
                vocabulary += f" of {train_fraction}"
            what = f"{SCHEMA_VERSION} {vocabulary} {content_hash(sources)}"
            identity = hashlib.sha256(what.encode()).hexdigest()
            yield Corpus(
                sources, tokenizer or data.tokenizer, train_fraction, identity, cache, report
            )


def build(folder: Path, corpus: Corpus, n_workers: int = 0) -> Work:
    """Write the files of a prepared corpus; shards that are there, of this corpus, are kept.

    The files are the same whatever the number of workers, and wherever it was broken off.

    Args: folder, which is there; n_workers, threads, 0 for all cores.
    Raises: DataError for a corpus that cannot be used; OSError if the folder cannot be written.
    """
    tokenizer, begun = _resumed(folder, corpus) or _begun(folder, corpus)
    start = begun.places[-1] if begun.places else Place()
    reported = _Reported(corpus, "encode")
    pieces = iter_documents(corpus.sources)
    for piece in islice(pieces, start.n_pieces):
        reported.at(piece)
    started = time.perf_counter()
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    parts = encoded(pieces, tokenizer, dtype, n_workers or default_workers())
    with closing(parts), ShardWriter(folder, dtype, begun.shards) as writer:
        end = _write(parts, reported, writer, begun, start)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        identity=corpus.identity,
        dtype=dtype,
        n_tokens=sum(shard.n_tokens for shard in writer.shards),
        n_bytes=end.n_bytes,
        n_documents=end.n_documents,
        tokenizer=tokenizer.name,
        tokenizer_fingerprint=tokenizer.fingerprint,
        shards=tuple(writer.shards),
        sources=tuple(source.name for source in corpus.sources),
    )
    manifest.write(folder)
    return Work(end.n_bytes - start.n_bytes, time.perf_counter() - started)


def _resumed(folder: Path, corpus: Corpus) -> tuple[Tokenizer, Unfinished] | None:
    """Return what an earlier call for the same corpus has left, as far as it is intact."""
    try:
        begun, tokenizer = Unfinished.read(folder), read_vocabulary(folder)
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return None
    is_same = begun.identity == corpus.identity
    if not is_same or begun.tokenizer_fingerprint != tokenizer.fingerprint:
        return None
    return tokenizer, begun.intact(folder)


def _begun(folder: Path, corpus: Corpus) -> tuple[Tokenizer, Unfinished]:
    """Begin a folder anew."""
    for path in folder.iterdir():
        if is_ours(path):
            path.unlink()
    tokenizer = corpus.tokenizer
    if isinstance(tokenizer, str):
        texts = _Reported(corpus, "train tokenizer").texts(iter_documents(corpus.sources))
        tokenizer = make_tokenizer(tokenizer, _first(texts, corpus.train_fraction))
    write_json(folder / VOCABULARY, tokenizer.to_dict())
    begun = Unfinished(SCHEMA_VERSION, corpus.identity, tokenizer.fingerprint)
    begun.write(folder)
    return tokenizer, begun


def _first(texts: Iterable[str], share: float) -> Iterator[str]:
    """Yield the first share of texts, so that validation text has no say in the merges.

    Of a long corpus only as much is read as merges are learned from.
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


def _write(
    parts: Iterable[Encoded],
    reported: "_Reported",
    writer: ShardWriter,
    begun: Unfinished,
    place: Place,
) -> Place:
    """Write tokens from ``place`` on, and with each full shard where it ends; return the end."""
    places = list(begun.places)
    n_known = place.n_tokens  # at the end of the last shard, of a piece that goes on after it
    for part in parts:
        n_skipped = min(n_known, len(part.tokens))
        n_known -= n_skipped
        for n_written in writer.write(part.tokens[n_skipped:]):
            places.append(replace(place, n_tokens=n_skipped + n_written))
            record = replace(begun, shards=tuple(writer.shards), places=tuple(places))
            record.write(writer.folder)
        place = Place(
            n_pieces=place.n_pieces + part.n_pieces,
            n_documents=place.n_documents + part.n_documents,
            n_bytes=place.n_bytes + part.n_bytes,
        )
        reported.at(part.last)
    writer.close()
    return place


def tidy(folder: Path) -> None:
    """Remove what a build that was broken off has left and cannot go on from."""
    if (folder / MANIFEST).exists():  # it was broken off when all was done
        return
    try:
        kept = {shard.name for shard in Unfinished.read(folder).shards}
    except (OSError, ValueError, KeyError, TypeError):
        kept = set()
    for path in folder.iterdir():
        if is_ours(path) and not (kept and path.name in (*kept, UNFINISHED, VOCABULARY)):
            path.unlink()


class _Reported:
    """Tells how far the files of a corpus have been read, now and then."""

    def __init__(self, corpus: Corpus, stage: str) -> None:
        self._report, self._stage = corpus.report, stage
        self._before: dict[Source, int] = {}
        self._total = self._done = 0
        for source in corpus.sources:
            self._before[source] = self._total
            self._total += source.path.stat().st_size

    def at(self, document: Document) -> None:
        """Say that a document has been dealt with."""
        done = self._before[document.source] + document.file_position
        if done - self._done >= min(PROGRESS_BYTES, self._total - self._done) > 0:
            self._report(PrepareProgress(self._stage, done, self._total))
            self._done = done

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        """Pass on the texts of documents, each dealt with when the next one is asked for."""
        for document in documents:
            yield document.text
            self.at(document)
