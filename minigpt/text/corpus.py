"""A corpus: files, and their documents, one piece at a time."""

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
SPECIAL_CHARS = 64  # more than special tokens have

# Places where cutting a text does not change its tokens: the split patterns of gpt2, cl100k_base,
# o200k_base and ours end a token there.
_BORDERS = (re.compile(r"\S\n(?=[^\W_])"), re.compile(r"[A-Za-z](?= [A-Za-z])"))


@dataclass(frozen=True)
class CorpusFile:
    """One file of a corpus."""

    path: Path
    """Path of its bytes."""
    name: str
    """Name that the user gave."""
    format: str = "text"
    """Format: text, which is one document, or one whose rows are documents."""
    packing: str = ""
    """Suffix of its compression; empty for none."""

    @contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file; yield its bytes as they are on the disk, and unpacked."""
        with reading(self.name), open_regular(self.path, may_be_pipe=True) as packed:
            if not self.packing:
                yield packed, packed
            else:
                with compressed.unpacked(packed, self.packing, self.name) as file:
                    yield packed, file


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one that is too long for memory."""

    text: str
    """Text, never empty."""
    is_start: bool
    """Whether it is the first piece of its document."""
    position: int
    """Bytes of the corpus read so far."""
    is_validation: bool = False
    """Whether its document is kept for validation."""


def iter_documents(
    files: Iterable[CorpusFile],
    data: DataConfig | None = None,
    on_skip: Callable[[str], None] | None = None,
) -> Iterator[Document]:
    """Yield every document, long ones in pieces of about PIECE_CHARS characters.

    A text file is one document; each row of another one is one. A byte-order mark is dropped,
    line ends are kept. Memory holds a piece (of rows: a row), never a file.

    Args: data, how files are read; on_skip, called with a message for each row that
        ``data.skip_bad`` leaves out.
    Raises: DataError if a file is not of its format or damaged, or if all are empty; ResourceError
        if a file may not be read.
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
            f"the corpus is empty: no text in {names}{reason}. Pass files that have some."
        )


def split_documents(documents: Iterable[Document], end: str) -> Iterator[Document]:
    """Split documents at each occurrence of a text that ends a document."""
    for document in documents:
        is_start = document.is_start
        for text in document.text.split(end):
            if text:
                yield replace(document, text=text, is_start=is_start)
            is_start = True


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

    files: Sequence[CorpusFile]
    val_files: Sequence[CorpusFile]
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
        """Yield the documents of files in their order."""
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
    """Yield the training documents, then those for validation, each in their order.

    Args: spool, a folder for a copy of the latter, which is deleted.
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


def content_hash(files: Iterable[CorpusFile]) -> str:
    """Return a sha256 in hex over the contents of the files and their order, not their names.

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
    """Turn the errors of reading a file into one that names it."""
    try:
        yield
    except PermissionError:
        raise ResourceError(
            f"{name!r} may not be read: permission denied. Change its permissions."
        ) from None
    except OSError as error:
        is_special = os.path.realpath(name).startswith(("/proc/", "/sys/", "/dev/"))
        remedy = " Check the path and the disk."
        if is_special:
            remedy = " It is a special file of the system: name a file of text."
        elif error.errno == errno.EINVAL:  # of open_regular, which says it
            remedy = ""
        reason = error.strerror or str(error)
        raise DataError(f"{cut(name, 200)} cannot be read: {reason}.{remedy}") from None


def _texts(
    file: BinaryIO, about: CorpusFile, data: DataConfig, on_skip: Callable[[str], None] | None
) -> Iterator[Iterable[str]]:
    """Yield each document of a file, in slices."""
    if about.format == "text":
        if data.chat:
            raise DataError(
                f"{about.name!r} is text, and --chat reads rows, each a conversation. Give JSONL "
                'whose lines have "messages", or "prompt" and "completion", or "instruction" and '
                '"output".'
            )
        yield encodings.decoded(file, about.name, data.encoding, BLOCK_BYTES)
        return
    for text in records.texts(file, about.format, about.name, data, on_skip):
        yield (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Join texts and cut them again, at token borders."""
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) >= (longest := PIECE_CHARS + LOOKAHEAD_CHARS):
            matches = (border.search(waiting, PIECE_CHARS, longest) for border in _BORDERS)
            # Without a border, cut before what may be the beginning of a special token.
            begin = max(waiting.rfind(c, longest - SPECIAL_CHARS, longest) for c in "<[")
            forced = begin if begin > 0 else longest
            cut = next((match.end() for match in matches if match), forced)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting
