"""A corpus: its files, and their documents as a stream of pieces."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from minigpt.config import DataConfig
from minigpt.errors import DataError, ResourceError, cut
from minigpt.files import open_regular
from minigpt.text import compressed, encodings, records
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer

PROGRESS_BYTES = 2**20
PIECE_CHARS = 2**20
LOOKAHEAD_CHARS = 2**16
BLOCK_BYTES = 2**20
SPECIAL_CHARS = 64  # longer than any special token

# Places where cutting a text does not change its tokens: the split patterns of gpt2, cl100k_base,
# o200k_base and minigpt end a token there.
_BORDERS = (re.compile(r"\S\n(?=[^\W_])"), re.compile(r"[A-Za-z](?= [A-Za-z])"))


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    """Path of the file, or of a stream's copy."""
    name: str
    """Name for messages, as the user gave it."""
    format: str = "text"
    """Format: text, for one document, or a format whose rows are documents."""
    packing: str = ""
    """Suffix of the compression format; empty for none."""

    @contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file; yield its stream on disk and the decompressed one."""
        with reading(self.name), open_regular(self.path, may_be_pipe=True) as packed:
            if not self.packing:
                yield packed, packed
            else:
                with compressed.unpacked(packed, self.packing, self.name) as file:
                    yield packed, file


@dataclass(frozen=True)
class Document:
    """A document, or a piece of a long one."""

    text: str
    """Text, never empty."""
    is_start: bool
    """Whether it is the first piece of its document."""
    position: int
    """Number of bytes of the corpus read so far."""
    is_validation: bool = False
    """Whether its document is held out for validation."""


def iter_documents(
    files: Iterable[CorpusFile],
    data: DataConfig | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """Yield every document, long ones in pieces of about PIECE_CHARS characters.

    A text file is one document; in other formats, each row is one. Byte-order marks are dropped,
    line endings are unchanged. Only one piece or row is in memory at a time, never a file.

    Args: data, settings for reading the files; on_skip, called with a message for each row that
        ``data.skip_bad`` leaves out.
    Raises: DataError if a file is damaged or does not match its format, or if all are empty;
        ResourceError if permission to read a file is denied.
    """
    files, data = list(files), data or DataConfig()
    is_empty = True
    n_bytes_before = 0
    skipped: list[str] = []

    def skip(message: str) -> None:
        if not skipped:
            skipped.append(message)
        if on_skip:
            on_skip(message)

    for corpus_file in files:
        with corpus_file.opened() as (packed, file):
            for pieces in _texts(file, corpus_file, data, skip if data.skip_bad else None):
                for index, piece in enumerate(_pieces(pieces)):
                    is_empty = False
                    yield Document(piece, index == 0, n_bytes_before + packed.tell())
        n_bytes_before += corpus_file.path.stat().st_size
    if is_empty:
        names = ", ".join(repr(corpus_file.name) for corpus_file in files[:3])
        reason = f" ({skipped[0]})" if skipped else ""
        raise DataError(
            f"the corpus is empty: no text in {names}{reason}. Pass files that contain text."
        )


def split_documents(documents: Iterable[Document], end: str) -> Iterator[Document]:
    """Split documents at each occurrence of the text of the end-of-text token."""
    for document in documents:
        is_start = document.is_start
        for text in document.text.split(end):
            if text:
                yield replace(document, text=text, is_start=is_start)
            is_start = True


@dataclass(frozen=True)
class PrepareProgress:
    """Progress of preparing a corpus."""

    stage: str
    """Current stage: download, read, split, train tokenizer, or encode."""
    done: int
    """Bytes of the files read in this stage."""
    total: int
    """Bytes of all files."""
    note: str = ""
    """One-line note about the files that are read. Empty for progress only."""


@dataclass(frozen=True)
class Corpus:
    """Files, and the settings for turning them into tokens."""

    files: Sequence[CorpusFile]
    val_files: Sequence[CorpusFile]
    """Files of a separate validation text."""
    data: DataConfig
    """Settings for reading and splitting the files."""
    tokenizer: Tokenizer | str
    """Tokenizer, or the spec of one that may have to be trained."""
    cache: Path
    """Cache folder for prepared corpora."""
    spool: Path
    """Folder for temporary files."""
    report: Callable[[PrepareProgress], None]
    """Function called periodically while the files are read."""
    template: Any = None
    """Chat template if the rows are conversations, else None."""
    val_split: str = "tail"
    """Text held out for validation: tail, documents, own (val_files) or none."""
    is_validation: Callable[[str], bool] | None = None
    """Predicate on a document's first piece: is it held out? None unless val_split is documents."""
    identity: str = ""
    """SHA-256 of the text, the split and the tokenizer."""
    versions: Sequence[tuple[int, int]] = ()
    """Time and size of each file before any was read, those of ``val_files`` last."""

    def require_unchanged(self) -> None:
        """Raise DataError if a file changed after its content was hashed for ``identity``."""
        files = (*self.files, *self.val_files)
        for file, before, now in zip(files, self.versions, versions(files), strict=True):
            if now != before:
                raise DataError(
                    f"{cut(file.name, 200)} changed while it was read. Wait until it is complete, "
                    "or give a copy of it."
                )

    def documents(
        self, *, training_only: bool = False, on_skip: Callable[[str], None] | None = None
    ) -> Iterator[Document]:
        """Yield the documents in stored order: those for training, then those for validation."""
        found = self.read(self.files, on_skip)
        if self.is_validation:
            found = training_first(found, self.is_validation, self.spool)
        for document in found:
            if not (training_only and document.is_validation):
                yield document
        if self.val_files and not training_only:
            for document in self.read(self.val_files, on_skip):
                yield replace(document, is_validation=True)

    def read(
        self, files: Sequence[CorpusFile], on_skip: Callable[[str], None] | None = None
    ) -> Iterator[Document]:
        """Yield the documents of files, in order."""
        documents = iter_documents(files, self.data, on_skip)
        if not self.data.special:
            return documents
        end = END_OF_TEXT
        if isinstance(self.tokenizer, Tokenizer):
            known, id_ = self.tokenizer.special_ids, self.tokenizer.end_of_text
            end = next((text for text in known if known[text] == id_), "")
        return split_documents(documents, end) if end else documents


def training_first(
    documents: Iterable[Document], is_validation: Callable[[str], bool], spool: Path
) -> Iterator[Document]:
    """Yield the training documents, then those for validation, both in their original order.

    Args: spool, folder for a temporary copy of the validation documents.
    """
    is_kept = False
    with tempfile.TemporaryFile("w+", encoding="utf-8", dir=spool) as kept:
        for document in documents:
            if document.is_start:
                is_kept = is_validation(document.text)
            if is_kept:
                kept.write(json.dumps(asdict(document)) + "\n")
            else:
                yield document
        kept.seek(0)
        for line in kept:
            yield Document(**json.loads(line) | {"is_validation": True})


def reporter(
    files: Sequence[CorpusFile], stage: str, report: Callable[[PrepareProgress], None]
) -> Callable[[Document], Document]:
    """Return a function that passes documents through and periodically reports the progress."""
    total = sum(file.path.stat().st_size for file in files)
    reported = 0

    def passed(document: Document) -> Document:
        nonlocal reported
        if document.position - reported >= min(PROGRESS_BYTES, total - reported) > 0:
            reported = document.position
            report(PrepareProgress(stage, reported, total))
        return document

    return passed


def versions(files: Iterable[CorpusFile]) -> list[tuple[int, int]]:
    """Return the modification time in nanoseconds and the size of each file."""
    found = []
    for corpus_file in files:
        with reading(corpus_file.name):
            status = corpus_file.path.stat()
        found.append((status.st_mtime_ns, status.st_size))
    return found


def content_hash(files: Iterable[CorpusFile]) -> str:
    """Return the hex SHA-256 of the contents of files in their order; names are not included.

    Raises: DataError or ResourceError if one cannot be read.
    """
    digest = hashlib.sha256()
    for corpus_file in files:
        with reading(corpus_file.name), corpus_file.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{content} {corpus_file.format} {corpus_file.packing}\n".encode())
    return digest.hexdigest()


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Convert errors of reading a file to one that names it."""
    try:
        yield
    except PermissionError:
        raise ResourceError(
            f"{name!r} cannot be read: permission denied. Change its permissions."
        ) from None
    except OSError as error:
        is_special = os.path.realpath(name).startswith(("/proc/", "/sys/", "/dev/"))
        remedy = " Check the path and the disk."
        if is_special:
            remedy = " It is a special system file: name a text file."
        elif error.errno == errno.EINVAL:  # from open_regular, with a remedy in the message
            remedy = ""
        reason = error.strerror or str(error)
        raise DataError(f"{cut(name, 200)} cannot be read: {reason}.{remedy}") from None


def _texts(
    file: BinaryIO, about: CorpusFile, data: DataConfig, on_skip: Callable[[str], None] | None
) -> Iterator[Iterable[str]]:
    """Yield each document of a file, as slices of its text."""
    if about.format == "text":
        if data.chat:
            raise DataError(
                f"{about.name!r} is text, but --chat reads conversations, one per row. Give JSONL "
                'whose lines have "messages", or "prompt" and "completion", or "instruction" and '
                '"output".'
            )
        yield encodings.decoded(file, about.name, data.encoding, BLOCK_BYTES)
        return
    for text in records.texts(file, about.format, about.name, data, on_skip):
        yield (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Join texts and cut them again at token boundaries."""
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) >= (longest := PIECE_CHARS + LOOKAHEAD_CHARS):
            matches = (border.search(waiting, PIECE_CHARS, longest) for border in _BORDERS)
            # Without a boundary, cut before a character that may begin a special token.
            begin = max(waiting.rfind(c, longest - SPECIAL_CHARS, longest) for c in "<[")
            forced = begin if begin > 0 else longest
            cut = next((match.end() for match in matches if match), forced)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting
