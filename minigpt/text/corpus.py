"""Files -> documents, one piece at a time."""

import codecs
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from minigpt.config import DataConfig
from minigpt.errors import DataError, ResourceError
from minigpt.rings import has_ring, ring

PIECE_CHARS = 2**20
LOOKAHEAD_CHARS = 2**16
BLOCK_BYTES = 2**20

_SOURCES = "text.sources"
_ENCODINGS = "text.encodings"

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
        with reading(self.name), self.path.open("rb") as packed:
            if not self.packing:
                yield packed, packed
            else:
                with ring("text.compressed").unpacked(packed, self.packing, self.name) as file:
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


def find_files(
    paths: Sequence[str], cache: Path, spool: Path, data: DataConfig | None = None, **options: Any
) -> list[CorpusFile]:
    """Find the files that the user names, in their order, and the format of each.

    Without the ring ``text.sources``, which has the other arguments, a path is a text file.

    Raises: DataError if there are no files; ResourceError if one may not be read.
    """
    if has_ring(_SOURCES):
        found: list[CorpusFile] = ring(_SOURCES).find_files(
            paths, cache, spool, data or DataConfig(), **options
        )
        return found
    return [CorpusFile(Path(path), path) for path in paths]


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
        raise DataError(
            f"{name!r} cannot be read: {error.strerror or error}. Check the disk."
        ) from None


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
        yield _decoded(file, about, data.encoding)
        return
    for text in ring("text.records").texts(file, about.format, about.name, data, on_skip):
        yield (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _decoded(file: BinaryIO, about: CorpusFile, encoding: str) -> Iterator[str]:
    """Decode a text file block by block."""
    decoder = codecs.getincrementaldecoder(encoding)()
    is_first, block = True, b"text"
    while block:
        block = file.read(BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError:
            raise _not_text(about, encoding) from None
        if "\0" in text:
            raise _not_text(about, encoding)
        yield text.removeprefix("\ufeff") if is_first else text
        is_first = False


def _not_text(about: CorpusFile, encoding: str) -> DataError:
    """Return the error for a file that is binary or in another encoding."""
    if has_ring(_ENCODINGS):
        with about.opened() as (_, file):
            error: DataError = ring(_ENCODINGS).refusal(file, about.name, encoding, BLOCK_BYTES)
            return error
    return DataError(f"{about.name!r} is binary, or not {encoding}. Convert it to UTF-8.")


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Join texts and cut them again, at token borders."""
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) >= (longest := PIECE_CHARS + LOOKAHEAD_CHARS):
            matches = (border.search(waiting, PIECE_CHARS, longest) for border in _BORDERS)
            cut = next((match.end() for match in matches if match), longest)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting
