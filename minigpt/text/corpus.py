"""Files, folders, globs and standard input -> documents, one piece at a time."""

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import re
import shutil
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from minigpt.config import DataConfig
from minigpt.errors import DataError, ResourceError, did_you_mean
from minigpt.files import OTHER_CACHE, resource_errors
from minigpt.rings import has_ring, ring

BUILTIN = "builtin"
"""Name of the corpus that every Python installation contains."""

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Suffixes of files whose rows are documents. A folder gives these files and TEXT_SUFFIXES."""
_NAMES = {"text": "text", "jsonl": "JSONL", "json": "JSON", "csv": "CSV", "parquet": "Parquet"}

PIECE_CHARS = 2**20
LOOKAHEAD_CHARS = 2**16
BLOCK_BYTES = 2**20
HEAD_BYTES = 2**16
"""Bytes of a file that its format is recognized by."""

_DATASETS = "text.datasets"
_RECORDS = "text.records"
_ENCODINGS = "text.encodings"
_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}
_OPENERS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: ring(_RECORDS).open_zstd(file),
}

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
    looks_like: str = ""
    """Format that the content suggests, if the user names none. Empty if it was not looked at."""

    @property
    def is_surprising(self) -> bool:
        """Whether the format is not that of the suffix, or the content suggests another one."""
        by_suffix = FORMATS.get(_suffixes(self.path)[0], "text")
        looks_like = self.looks_like if self.format == "text" else ""
        return bool(self.looks_like) and not self.format == by_suffix == (looks_like or by_suffix)

    @contextmanager
    def opened(self) -> Iterator[tuple[BinaryIO, BinaryIO]]:
        """Open the file; yield its bytes as they are on the disk, and unpacked."""
        with _reading(self.name), self.path.open("rb") as packed:
            yield packed, _OPENERS[self.packing](packed) if self.packing else packed


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
    paths: Sequence[str],
    cache: Path,
    spool: Path,
    data: DataConfig | None = None,
    *,
    stdin: BinaryIO | None = None,
    on_download: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[CorpusFile]:
    """Find the files that the user names, in their order, and the format of each.

    A path is a file (with any suffix), a folder (its files with one of TEXT_SUFFIXES or FORMATS,
    packed or not, at any depth, sorted, without hidden ones), a glob (``**`` too), a named corpus,
    or ``-`` for standard input. Links are followed; each folder is entered once. Files on the disk
    take precedence over named corpora. Without paths, the built-in corpus is used.

    Args: cache, folder of downloads; spool, a folder for the copies of streams, deleted by the
        caller; data, how files are read; stdin, read for ``-``; on_download, called with the bytes
        done and the total; on_note, called with a line about what is read and what is left out, for
        a folder or a glob, or if a file is not what its suffix says.
    Returns: each file once.
    Raises: DataError if there are no files; ResourceError if a folder may not be read.
    """
    data = data or DataConfig()
    files: list[CorpusFile] = []
    left_out: Counter[str] = Counter()
    glob_of_rest = ""
    is_folder = False
    for word in paths or (BUILTIN,):
        path = Path(os.path.expanduser(word))
        with _reading(word):
            if word == "-":
                stream = _spooled(stdin or sys.stdin.buffer, spool)
                files.append(_recognized(stream, "standard input", data))
            elif path.is_fifo():
                with path.open("rb") as opened:
                    files.append(_recognized(_spooled(opened, spool), word, data))
            elif path.is_dir():
                is_folder = True
                files += _files_in(path, data, rest := Counter[str]())
                glob_of_rest = glob_of_rest or _other_files(path, rest)
                left_out += rest
            elif path.exists():
                files.append(_recognized(path, word, data))
            elif path.is_symlink():
                raise DataError(
                    f"{word!r} is a link to {os.readlink(path)!r}, which does not exist. Restore "
                    "that file, or name another."
                )
            elif glob.has_magic(word):
                found = _matching(str(path), left_out)
                is_folder |= len(found) > 1
                if not found:
                    raise DataError(f"no file matches {word!r}. Check the pattern, and quote it.")
                files += [_recognized(Path(name), name, data) for name in found]
            elif word == BUILTIN or word in _named_corpora():
                path = ring(_DATASETS).dataset_path(word, cache, on_download)
                is_jsonl = path.suffix == ".jsonl"
                files.append(CorpusFile(path, word, "jsonl" if is_jsonl else "text"))
            elif "://" in word:
                raise DataError(f"{word!r} is a URL. Download the text first: curl -LO {word}")
            else:
                raise DataError(_missing(path))
    files = list({corpus_file.path.resolve(): corpus_file for corpus_file in files}.values())
    is_told = is_folder or left_out.total() or any(file.is_surprising for file in files)
    if on_note and is_told:
        on_note(_summary(files, left_out, glob_of_rest, data))
    return files


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
        with _reading(corpus_file.name), corpus_file.path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{content} {corpus_file.format} {corpus_file.packing}\n".encode())
    return digest.hexdigest()


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of the format and of the compression, both in lower case."""
    packing = path.suffix.lower()
    if packing not in _OPENERS:
        return packing, ""
    return path.with_suffix("").suffix.lower(), packing


def _written_suffix(path: Path) -> str:
    """Return the suffixes of the format and of the compression as they are written."""
    is_packed = path.suffix.lower() in _OPENERS
    return path.with_suffix("").suffix + path.suffix if is_packed else path.suffix


def _recognized(path: Path, name: str, data: DataConfig) -> CorpusFile:
    """Return a file with its format: as the user says, else by its suffix, else by its content."""
    suffix, packing = _suffixes(path)
    with _reading(name), path.open("rb") as file:
        magic = file.read(6)
    packing = packing or next((_MAGIC[m] for m in _MAGIC if magic.startswith(m)), "")
    by_suffix = FORMATS.get(suffix, "text")
    found = CorpusFile(path, name, data.format or by_suffix, packing)
    if data.format or not has_ring(_RECORDS):
        return found
    with found.opened() as (_, unpacked):
        head = unpacked.read(HEAD_BYTES)
    content = ring(_RECORDS).sniffed(head, data.encoding, is_whole=len(head) < HEAD_BYTES)
    is_json = by_suffix in ("json", "jsonl") and content in ("json", "jsonl")
    is_open = suffix not in (*FORMATS, *TEXT_SUFFIXES)
    return replace(found, format=content if is_json or is_open else by_suffix, looks_like=content)


def _folders(top: str) -> Iterator[tuple[str, list["os.DirEntry[str]"]]]:
    """Yield each folder from ``top`` down and its entries; links are followed, each folder once."""
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real not in seen:
            seen.add(real)
            with os.scandir(folder) as entries:
                found = list(entries)
            yield folder, found
            waiting += [e.path for e in found if e.name[0] != "." and os.path.isdir(e.path)]


def _files_in(folder: Path, data: DataConfig, left_out: Counter[str]) -> list[CorpusFile]:
    found, fieldless = [], ""
    entries = [entry for _, entries in _folders(str(folder)) for entry in entries]
    for entry in sorted(entries, key=lambda entry: Path(entry.path)):
        path, is_file = Path(entry.path), os.path.isfile(entry.path)
        suffix = _suffixes(path)[0]
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif not is_file:
            if not os.path.isdir(entry.path):
                left_out["dangling link" if entry.is_symlink() else "not a file"] += 1
        elif suffix not in TEXT_SUFFIXES and suffix not in FORMATS:
            left_out[_written_suffix(path) or "without a suffix"] += 1
        else:
            file = _recognized(path, str(path), data)
            if _lacks_field(file, data):
                left_out[f'{suffix} without "{data.field}"'] += 1
                fieldless = fieldless or str(path)
            else:
                found.append(file)
    if found:
        return found
    if fieldless:  # one error that names its fields
        return [_recognized(Path(fieldless), fieldless, data)]
    there = f" ({_counted(left_out)})" if left_out.total() else ""
    raise DataError(
        f"the folder {str(folder)!r} has no {', '.join((*TEXT_SUFFIXES, *FORMATS))} files{there}. "
        f"Name others with a glob, as in {_other_files(folder, left_out) or '**/*.py'!r}."
    )


def _lacks_field(file: CorpusFile, data: DataConfig) -> bool:
    """Return whether a file of a folder has rows, but not the field of the text: it is no text."""
    if file.format == "text" or not has_ring(_RECORDS):
        return False
    with file.opened() as (_, unpacked):
        return not ring(_RECORDS).has_field(unpacked, file.format, file.name, data)


def _other_files(folder: Path, left_out: Counter[str]) -> str:
    """Return a glob for the files of a folder that are left out most; empty for none."""
    for kind, _ in left_out.most_common():
        last = {"hidden": ".*", "without a suffix": "*"}.get(kind, f"*{glob.escape(kind)}")
        if kind in ("hidden", "without a suffix") or (kind[0] == "." and " " not in kind):
            return os.path.join(glob.escape(str(folder)), "**", last)
    return ""


def _matching(pattern: str, left_out: Counter[str]) -> list[str]:
    """Return the files that match a glob, sorted."""
    names = _expanded(pattern)
    left_out["dangling link"] += sum(os.path.islink(n) and not os.path.exists(n) for n in names)
    return sorted(filter(os.path.isfile, names))


def _expanded(pattern: str) -> set[str]:
    """Expand a glob as ``glob.glob`` does, but enter each folder once, so loops of links end."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(glob.glob(pattern))
    at = parts.index("**")
    rest = parts[at + 1 :] or ("*",)
    tops = filter(os.path.isdir, glob.glob(os.path.join(*parts[:at])) if at else ["."])
    folders = (folder for top in tops for folder, _ in _folders(top))
    patterns = (os.path.join(glob.escape(folder), *rest) for folder in folders)
    return {os.path.normpath(name) for pattern in patterns for name in _expanded(pattern)}


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {kind}" for kind, n in counts.most_common(6) if n)


def _summary(
    files: Sequence[CorpusFile], left_out: Counter[str], glob_of_rest: str, data: DataConfig
) -> str:
    """Say in one line which files are read as what, and which are left out."""
    kinds = Counter(_NAMES[file.format] for file in files)
    rows = f", field {data.field!r}" if set(kinds) != {"text"} else ""
    if len(files) == 1:
        line = f"{files[0].name!r} is read as {min(kinds)}{rows}"
    else:
        line = f"{len(files):,} files are read: {_counted(kinds)}{rows}"
    odd = next((file for file in files if file.is_surprising), None)
    name = repr(odd.name) if odd and len(files) > 1 else "it"
    if odd and odd.format == "text":
        other = _NAMES[odd.looks_like]
        line += f"; {name} looks like {other}: --format {odd.looks_like} reads its rows"
    elif odd:
        line += f"; {name} is recognized by its content: --format text reads it as it is"
    if left_out.total():
        line += f"; left out: {_counted(left_out)}"
        if glob_of_rest:
            line += f" (a glob takes them: {glob_of_rest!r})"
    return line


def _named_corpora() -> list[str]:
    return [BUILTIN, *ring(_DATASETS).DOWNLOADS] if has_ring(_DATASETS) else []


def _missing(path: Path) -> str:
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return f"the folder {str(path.parent)!r} does not exist. Check the path."
    remedy = did_you_mean(repr(path.name), map(repr, [*siblings, *_named_corpora()]))
    remedy = remedy or f"Check the path; the named corpora are {', '.join(_named_corpora())}."
    return f"there is no file or folder {str(path)!r}. {remedy}"


def _spooled(stream: BinaryIO, spool: Path) -> Path:
    path = spool / f"stream-{len(os.listdir(spool))}"
    with resource_errors(path, OTHER_CACHE), path.open("wb") as file:
        shutil.copyfileobj(stream, file, BLOCK_BYTES)
    return path


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


def _texts(
    file: BinaryIO, about: CorpusFile, data: DataConfig, on_skip: Callable[[str], None] | None
) -> Iterator[Iterable[str]]:
    """Yield each document of a file, in slices."""
    if about.format == "text":
        if data.chat:
            raise DataError(
                f"{about.name!r} is text, and --chat reads rows, each a conversation. Give JSONL "
                'whose lines have "messages", or "prompt" and "completion".'
            )
        yield _decoded(file, about.name, data.encoding)
        return
    for text in ring(_RECORDS).texts(file, about.format, about.name, data, on_skip):
        yield (text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS))


def _decoded(file: BinaryIO, name: str, encoding: str) -> Iterator[str]:
    """Decode a text file block by block."""
    decoder = codecs.getincrementaldecoder(encoding)()
    is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
    n_before = n_chars = 0
    is_last = False
    while not is_last:
        block = file.read(BLOCK_BYTES)
        is_last = not block
        try:
            if is_utf8 and (index := block.find(b"\0")) >= 0:
                raise _not_text(name, block, n_before + index, 0, is_binary=True)
            text = decoder.decode(block, final=is_last)
        except UnicodeDecodeError as error:
            waiting = len(error.object) - len(block)
            position = n_before - waiting + error.start
            if not is_utf8:
                raise DataError(
                    f"{name!r} is not {encoding}: byte {position} does not fit. Give another "
                    "--encoding."
                ) from None
            n_multibyte = n_before - waiting - n_chars
            is_end = is_last and error.reason == "unexpected end of data"
            sample = error.object + file.read(HEAD_BYTES)
            raise _not_text(name, sample, position, n_multibyte, is_end=is_end) from None
        except UnicodeError as error:  # no byte-order mark, or an encoding that is not for texts
            raise DataError(
                f"{name!r} is not {encoding}: {error}. Give another --encoding."
            ) from None
        if "\0" in text:
            raise DataError(f"{name!r} is not {encoding}, or binary: it has NUL characters.")
        yield text.removeprefix("\ufeff") if n_before == 0 else text
        n_before += len(block)
        n_chars += len(text)


def _not_text(
    name: str,
    data: bytes,
    position: int,
    n_multibyte: int,
    *,
    is_end: bool = False,
    is_binary: bool = False,
) -> DataError:
    """Return the error for bytes that are not UTF-8, with a remedy that keeps the text."""
    remedy = "Convert it to UTF-8."
    if has_ring(_ENCODINGS):
        encodings = ring(_ENCODINGS)
        is_binary = is_binary and not encodings.wide_encoding(data)
        remedy = encodings.advice(data, position, n_multibyte=n_multibyte, is_end=is_end)
    if is_binary:
        return DataError(f"{name!r} looks binary: byte {position} is NUL. Pass text files.")
    return DataError(f"{name!r} is not UTF-8: byte {position} does not fit. {remedy}")


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
