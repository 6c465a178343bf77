"""Text files, folders, globs, JSONL and standard input -> documents, a piece at a time."""

import codecs
import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from minigpt.errors import DataError, ResourceError, nearest
from minigpt.files import OTHER_CACHE, resource_errors
from minigpt.text.datasets import BUILTIN, DOWNLOADS, dataset_path
from minigpt.text.tokenizer import well_formed

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson")
JSONL_SUFFIXES = (".jsonl", ".ndjson")
PACKED_SUFFIXES = (".gz", ".xz")

PIECE_CHARS = 2**20
LOOKAHEAD_CHARS = 2**16
BLOCK_BYTES = 2**20

# Where a text can be cut so that the tokens of the pieces are those of the whole: the split
# patterns of gpt2, cl100k_base, o200k_base and ours end a token there, and begin one after it.
_BORDERS = (re.compile(r"\S\n(?=[^\W_])"), re.compile(r"[A-Za-z](?= [A-Za-z])"))


@dataclass(frozen=True)
class Source:
    """One file of a corpus."""

    path: Path
    """Where its bytes are."""
    name: str
    """What the user calls it."""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON object with a ``text``; told by the name."""
        return _unpacked_suffix(self.path) in JSONL_SUFFIXES


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one that is too long to hold."""

    text: str
    """Never empty."""
    source: Source
    """Where it is from."""
    is_start: bool
    """Whether it is the first piece of its document."""
    file_position: int
    """Bytes of the source's file that have been read by now."""


def find_sources(
    paths: Sequence[str],
    cache: Path,
    spool: Path,
    *,
    stdin: BinaryIO | None = None,
    on_download: Callable[[int, int], None] | None = None,
) -> list[Source]:
    """Find the files that the user's words stand for, in their order.

    A word is a file (read as it is, whatever its suffix), a folder (its files with one of
    TEXT_SUFFIXES, packed or not, at any depth, sorted; hidden ones left out), a glob (``**``
    too), a named corpus, or ``-`` for standard input. What is on the disk goes before a named
    corpus of that name. No words at all stand for the built-in corpus.

    Args: cache, where downloads are kept; spool, a folder for the copies of streams, which are
        read more than once and are the caller's to delete; stdin, read for ``-``; on_download,
        called with the bytes done and in all.
    Returns: each file once.
    Raises: DataError if there is none; ResourceError if a folder may not be read.
    """
    sources: list[Source] = []
    for word in paths or (BUILTIN,):
        path = Path(os.path.expanduser(word))
        with _reading(word):
            if word == "-":
                sources.append(_spooled(stdin or sys.stdin.buffer, spool, "standard input"))
            elif path.is_fifo():
                with path.open("rb") as stream:
                    sources.append(_spooled(stream, spool, word))
            elif path.is_dir():
                sources += _files_in(path)
            elif path.exists():
                sources.append(Source(path, word))
            elif glob.has_magic(word):
                sources += _files_matching(str(path))
            elif word in (BUILTIN, *DOWNLOADS):
                sources.append(Source(dataset_path(word, cache, on_download), word))
            else:
                raise DataError(_missing(path))
    return list({source.path.resolve(): source for source in sources}.values())


def iter_documents(sources: Iterable[Source]) -> Iterator[Document]:
    """Yield every document, long ones in pieces of about PIECE_CHARS characters.

    A text file is one document; each line of a JSONL file is one. A byte-order mark is dropped,
    line ends stay as they are. Memory holds a piece (of JSONL: a line), never a file.

    Raises: DataError for what is not text, not JSONL, damaged, or empty altogether;
        ResourceError if a file may not be read.
    """
    sources = list(sources)
    is_empty = True
    for source in sources:
        for document in _jsonl(source) if source.is_jsonl else _text(source):
            is_empty = False
            yield document
    if is_empty:
        names = ", ".join(repr(source.name) for source in sources[:3])
        raise DataError(f"the corpus is empty: no text in {names}. Pass files that have some.")


def content_hash(sources: Iterable[Source]) -> str:
    """Return a sha256 in hex over what the files say and in which order, not what they are called.

    Raises: DataError or ResourceError if one cannot be read.
    """
    digest = hashlib.sha256()
    for source in sources:
        with _reading(source.name), source.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        packing = source.path.suffix if source.path.suffix in PACKED_SUFFIXES else ""
        digest.update(f"{content} {source.is_jsonl} {packing}\n".encode())
    return digest.hexdigest()


def _unpacked_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path).suffix.lower()


def _files_in(folder: Path) -> list[Source]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(root, name) for name in files if not name.startswith(".")]
    found = sorted(path for path in found if _unpacked_suffix(path) in TEXT_SUFFIXES)
    if not found:
        raise DataError(
            f"the folder {str(folder)!r} has no {', '.join(TEXT_SUFFIXES)} files. Name others "
            f"with a glob, as in {str(folder / '**' / '*.py')!r}."
        )
    return [Source(path, str(path)) for path in found]


def _files_matching(pattern: str) -> list[Source]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError(f"no file matches {pattern!r}. Check the pattern, and quote it.")
    return [Source(Path(name), name) for name in found]


def _missing(path: Path) -> str:
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return f"the folder {str(path.parent)!r} does not exist. Check the path."
    remedy = nearest(repr(path.name), map(repr, [*siblings, BUILTIN, *DOWNLOADS]))
    if not remedy.startswith("Did"):  # all the names of a folder help nobody
        remedy = f"Check the path; the named corpora are {', '.join([BUILTIN, *DOWNLOADS])}."
    return f"there is no file or folder {str(path)!r}. {remedy}"


def _spooled(stream: BinaryIO, spool: Path, name: str) -> Source:
    path = spool / f"stream-{len(os.listdir(spool))}.txt"
    with resource_errors(path, OTHER_CACHE), path.open("wb") as file:
        shutil.copyfileobj(stream, file, BLOCK_BYTES)
    return Source(path, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what can go wrong with a file into an error that names it."""
    try:
        yield
    except PermissionError:
        raise ResourceError(
            f"{name!r} may not be read: permission denied. Change its permissions."
        ) from None
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{name!r} cannot be unpacked: {error}. Fetch it again.") from None
    except OSError as error:
        raise DataError(
            f"{name!r} cannot be read: {error.strerror or error}. Check the disk."
        ) from None


@contextmanager
def _opened(source: Source) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a source as its text's bytes, and its file's own for the position."""
    with _reading(source.name), source.path.open("rb") as raw:
        match source.path.suffix:
            case ".gz":
                with gzip.open(raw) as file:
                    yield cast(BinaryIO, file), raw
            case ".xz":
                with lzma.open(raw) as file:
                    yield cast(BinaryIO, file), raw
            case _:
                yield raw, raw


def _text(source: Source) -> Iterator[Document]:
    with _opened(source) as (file, raw):
        is_start = True
        for piece in _pieces(_decoded(file, source.name)):
            yield Document(piece, source, is_start, raw.tell())
            is_start = False


def _jsonl(source: Source) -> Iterator[Document]:
    with _opened(source) as (file, raw):
        for number, line in enumerate(file, start=1):
            if line.strip():
                text = _text_of_line(line, f"line {number} of {source.name!r}")
                slices = (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))
                for index, piece in enumerate(_pieces(slices)):
                    yield Document(piece, source, index == 0, raw.tell())


def _text_of_line(line: bytes, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is not JSON: {error}. JSONL has one object a line; rename the file to .txt "
            "if it is plain text."
        ) from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where} is no object with a "text" string. Add or rename that field.')
    return well_formed(text)


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_before = 0
    is_last = False
    while not is_last:
        block = file.read(BLOCK_BYTES)
        is_last = not block
        if (index := block.find(b"\0")) >= 0 and not _is_utf16(block, n_before):
            raise DataError(
                f"{name!r} looks binary: byte {n_before + index} is NUL. Pass text files."
            )
        try:
            text = decoder.decode(block, final=is_last)
        except UnicodeDecodeError as error:
            waiting = len(error.object) - len(block)
            raise DataError(
                f"{name!r} is not UTF-8: byte {n_before - waiting + error.start} does not fit. "
                f"Convert it: iconv -f {'UTF-16' if _is_utf16(block, n_before) else 'LATIN1'} "
                "-t UTF-8 OLD > NEW"
            ) from None
        yield text.removeprefix("\ufeff") if n_before == 0 else text
        n_before += len(block)


def _is_utf16(block: bytes, n_before: int) -> bool:
    return n_before == 0 and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Join texts and cut them again, at borders of tokens."""
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
