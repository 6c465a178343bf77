"""Text files, folders, globs, JSONL and standard input -> documents, one piece at a time."""

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from minigpt.errors import DataError, ResourceError, nearest
from minigpt.files import OTHER_CACHE, resource_errors
from minigpt.rings import has_ring, ring
from minigpt.text.tokenizer import well_formed

BUILTIN = "builtin"
"""Name of the corpus that every Python installation contains."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".jsonl", ".ndjson")
JSONL_SUFFIXES = (".jsonl", ".ndjson")

PIECE_CHARS = 2**20
LOOKAHEAD_CHARS = 2**16
BLOCK_BYTES = 2**20

_DATASETS = "text.datasets"
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}

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

    @property
    def is_jsonl(self) -> bool:
        """Whether the suffix is that of JSONL: each line is a JSON object with a ``text``."""
        return _unpacked_suffix(self.path) in JSONL_SUFFIXES


@dataclass(frozen=True)
class Document:
    """A document, or a piece of one that is too long for memory."""

    text: str
    """Text, never empty."""
    is_start: bool
    """Whether it is the first piece of its document."""
    position: int
    """Bytes of the corpus read so far."""


def find_files(
    paths: Sequence[str],
    cache: Path,
    spool: Path,
    *,
    stdin: BinaryIO | None = None,
    on_download: Callable[[int, int], None] | None = None,
) -> list[CorpusFile]:
    """Find the files that the user names, in their order.

    A path is a file (with any suffix), a folder (its files with one of TEXT_SUFFIXES, packed or
    not, at any depth, sorted, without hidden ones), a glob (``**`` too), a named corpus, or ``-``
    for standard input. Files on the disk take precedence over named corpora. Without paths, the
    built-in corpus is used.

    Args: cache, folder of downloads; spool, a folder for the copies of streams, deleted by the
        caller; stdin, read for ``-``; on_download, called with the bytes done and the total.
    Returns: each file once.
    Raises: DataError if there are no files; ResourceError if a folder may not be read.
    """
    files: list[CorpusFile] = []
    for word in paths or (BUILTIN,):
        path = Path(os.path.expanduser(word))
        with _reading(word):
            if word == "-":
                files.append(_spooled(stdin or sys.stdin.buffer, spool, "standard input"))
            elif path.is_fifo():
                with path.open("rb") as stream:
                    files.append(_spooled(stream, spool, word))
            elif path.is_dir():
                files += _files_in(path)
            elif path.exists():
                files.append(CorpusFile(path, word))
            elif glob.has_magic(word):
                found = sorted(filter(os.path.isfile, glob.glob(str(path), recursive=True)))
                if not found:
                    raise DataError(f"no file matches {word!r}. Check the pattern, and quote it.")
                files += [CorpusFile(Path(name), name) for name in found]
            elif word == BUILTIN or word in _named_corpora():
                path = ring(_DATASETS).dataset_path(word, cache, on_download)
                files.append(CorpusFile(path, word))
            else:
                raise DataError(_missing(path))
    return list({corpus_file.path.resolve(): corpus_file for corpus_file in files}.values())


def iter_documents(files: Iterable[CorpusFile]) -> Iterator[Document]:
    """Yield every document, long ones in pieces of about PIECE_CHARS characters.

    A text file is one document; each line of a JSONL file is one. A byte-order mark is dropped,
    line ends are kept. Memory holds a piece (of JSONL: a line), never a file.

    Raises: DataError if a file is not text, not JSONL or damaged, or if all are empty;
        ResourceError if a file may not be read.
    """
    files = list(files)
    is_empty = True
    n_bytes_before = 0
    for corpus_file in files:
        with _reading(corpus_file.name), corpus_file.path.open("rb") as packed:
            opener = _OPENERS.get(corpus_file.path.suffix)
            file: BinaryIO = opener(packed) if opener else packed
            for pieces in (_lines if corpus_file.is_jsonl else _whole)(file, corpus_file.name):
                for index, piece in enumerate(_pieces(pieces)):
                    is_empty = False
                    yield Document(piece, index == 0, n_bytes_before + packed.tell())
            n_bytes_before += packed.tell()
    if is_empty:
        names = ", ".join(repr(corpus_file.name) for corpus_file in files[:3])
        raise DataError(f"the corpus is empty: no text in {names}. Pass files that have some.")


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
        with _reading(corpus_file.name), corpus_file.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        packing = corpus_file.path.suffix if corpus_file.path.suffix in _OPENERS else ""
        digest.update(f"{content} {corpus_file.is_jsonl} {packing}\n".encode())
    return digest.hexdigest()


def _unpacked_suffix(path: Path) -> str:
    return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix.lower()


def _files_in(folder: Path) -> list[CorpusFile]:
    def refuse(error: OSError) -> None:
        raise error

    found = []
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in files if not name.startswith(".")]
        found += [path for path in paths if path.is_file() or not path.exists()]  # no FIFOs
    found = sorted(path for path in found if _unpacked_suffix(path) in TEXT_SUFFIXES)
    if not found:
        raise DataError(
            f"the folder {str(folder)!r} has no {', '.join(TEXT_SUFFIXES)} files. Name others "
            f"with a glob, as in {str(folder / '**' / '*.py')!r}."
        )
    return [CorpusFile(path, str(path)) for path in found]


def _named_corpora() -> list[str]:
    return [BUILTIN, *ring(_DATASETS).DOWNLOADS] if has_ring(_DATASETS) else []


def _missing(path: Path) -> str:
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return f"the folder {str(path.parent)!r} does not exist. Check the path."
    remedy = nearest(repr(path.name), map(repr, [*siblings, *_named_corpora()]))
    if not remedy.startswith("Did"):  # do not list all names of a folder
        remedy = f"Check the path; the named corpora are {', '.join(_named_corpora())}."
    return f"there is no file or folder {str(path)!r}. {remedy}"


def _spooled(stream: BinaryIO, spool: Path, name: str) -> CorpusFile:
    path = spool / f"stream-{len(os.listdir(spool))}.txt"
    with resource_errors(path, OTHER_CACHE), path.open("wb") as file:
        shutil.copyfileobj(stream, file, BLOCK_BYTES)
    return CorpusFile(path, name)


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn the errors of reading a file into one that names it."""
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


def _lines(file: BinaryIO, name: str) -> Iterator[Iterable[str]]:
    """Yield each document of a JSONL file, in slices."""
    for number, line in enumerate(file, start=1):
        if line.strip():
            text = _text_of_line(line, f"line {number} of {name!r}")
            yield (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


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
        raise DataError(f'{where} is not an object with a "text" string. Add or rename that field.')
    return well_formed(text)


def _whole(file: BinaryIO, name: str) -> Iterator[Iterable[str]]:
    """Yield the one document of a text file, block by block."""
    yield _decoded(file, name)


def _decoded(file: BinaryIO, name: str) -> Iterator[str]:
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
