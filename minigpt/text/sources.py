"""Find the text that the user names: files, folders, globs, pipes, standard input, named corpora.

The format of each file is recognized by its suffix or content.
"""

import codecs
import glob
import mimetypes
import os
import re
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError, did_you_mean
from minigpt.files import resource_errors
from minigpt.places import OTHER_CACHE
from minigpt.text import compressed, datasets, records
from minigpt.text.corpus import BLOCK_BYTES, CorpusFile, reading

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""Suffixes of files whose rows are documents. Folders are searched for them and TEXT_SUFFIXES."""

_HEAD_BYTES = 2**16  # read to recognize a format
_RTF = b"{\\rtf"  # RTF is ASCII, so no other check refuses it
_HTML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype\s+html|html)\b", re.IGNORECASE)
_TAGGED = "html"
_NAMES = {"text": "text", "jsonl": "JSONL", "json": "JSON", "csv": "CSV", "parquet": "Parquet"}


@dataclass(frozen=True)
class FoundFile(CorpusFile):
    """A file of a corpus, and the format that its content suggests."""

    looks_like: str = ""
    """Format that the content suggests, or html. Empty if the content was not checked."""
    is_empty: bool = False
    """Whether it has no bytes, or only a byte-order mark."""

    @property
    def is_surprising(self) -> bool:
        """Whether the format differs from the suffix's, or the content suggests another one."""
        by_suffix = FORMATS.get(_suffixes(self.path)[0].lower(), "text")
        looks_like = self.looks_like if self.format == "text" else ""
        return bool(self.looks_like) and not self.format == by_suffix == (looks_like or by_suffix)


def find_files(
    paths: Sequence[str],
    cache: Path,
    spool: Path,
    data: DataConfig,
    *,
    stdin: BinaryIO | None = None,
    on_download: Callable[[int, int], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> list[FoundFile]:
    """Find the files that the user names, in order, and the format of each.

    A path is a file (with any suffix), a folder (its files with one of TEXT_SUFFIXES or FORMATS,
    compressed or not, at any depth, sorted, without hidden files, runs and models), a glob (``**``
    too), a named corpus, or ``-`` for standard input. Links are followed; each folder is visited
    once. Files on disk take precedence over named corpora.

    Args: cache, folder for downloads; spool, folder for copies of streams, which the caller
        deletes; data, settings for reading the files; stdin, read for ``-``; on_download, called
        with the bytes received and the total; on_note, called with a one-line summary of the files
        read and left out, for a folder or a glob, or if a file's content differs from its suffix.
    Returns: each file once.
    Raises: DataError if there are no files; ConfigError for a format that a named corpus does not
        have; ResourceError if permission to read a folder is denied.
    """
    search = _Search(cache, spool, data, stdin, on_download, on_note)
    found = [file for word in paths for file in search.files(word)]
    files = list({file.path.resolve(): file for file in found}.values())
    read = [file for file in files if not file.is_empty] or files
    search.left_out["empty"] += len(files) - len(read)
    has_several = search.is_folder or search.left_out.total()
    if on_note and (has_several or any(file.is_surprising for file in read)):
        on_note(_summary(read, search.left_out, search.glob_of_rest, data))
    return files


@dataclass
class _Search:
    """The arguments of ``find_files``, and facts about the files found so far."""

    cache: Path
    spool: Path
    data: DataConfig
    stdin: BinaryIO | None
    on_download: Callable[[int, int], None] | None
    on_note: Callable[[str], None] | None
    left_out: Counter[str] = field(default_factory=Counter)
    """Kind of file -> number of such files left out."""
    glob_of_rest: str = ""
    """Glob for text files that were left out of the first folder that has any; empty for none."""
    is_folder: bool = False
    """Whether a folder, or a glob that matches several files, was named."""

    def files(self, word: str) -> list[FoundFile]:
        """Return the files that a path, a glob, a named corpus or ``-`` stands for."""
        if not word:  # an unset shell variable, which Path would turn into the current folder
            raise DataError("the path of a text is empty. Name a file, or '.' for this folder.")
        path = Path(os.path.expanduser(word))
        with reading(word):
            if word == "-":
                return [self._standard_input()]
            if path.is_fifo():
                with path.open("rb") as opened:
                    return [_recognized(_spooled(opened, self.spool), word, self.data)]
            if path.is_dir():
                return self._folder(path)
            if path.is_file():
                return [_recognized(path, word, self.data)]
            if path.exists():
                raise _device_error(word)
            if path.is_symlink():
                raise DataError(
                    f"{word!r} is a link to {os.readlink(path)!r}, which does not exist. Restore "
                    "that file, or name another."
                )
            if glob.has_magic(word):
                return self._glob(word)
            if word.partition(":")[0] == "builtin" or word in datasets.NAMES:
                return [self._named_corpus(word)]
            if "://" in word:
                raise DataError(f"{word!r} is a URL. Download the text first: curl -LO {word}")
            raise DataError(_missing(path))

    def _standard_input(self) -> FoundFile:
        source = self.stdin or sys.stdin.buffer
        if _is_endless(source):
            raise _device_error("standard input")
        if self.on_note and source.isatty():
            self.on_note("type or paste the text; Ctrl-D ends it")
        return _recognized(_spooled(source, self.spool), "standard input", self.data)

    def _folder(self, folder: Path) -> list[FoundFile]:
        left_out: Counter[str] = Counter()
        files = _files_in(folder, self.data, left_out)
        self.is_folder = True
        self.left_out += left_out
        self.glob_of_rest = self.glob_of_rest or _other_files(folder, left_out)
        return files

    def _glob(self, pattern: str) -> list[FoundFile]:
        names = _expanded(str(Path(os.path.expanduser(pattern))))
        found = sorted(filter(os.path.isfile, names))
        if not found:
            raise DataError(f"no file matches {pattern!r}. Check the pattern, and quote it.")
        is_lost = [os.path.islink(name) and not os.path.exists(name) for name in names]
        self.left_out["dangling link"] += sum(is_lost)
        self.is_folder |= len(found) > 1
        return [_recognized(Path(name), name, self.data) for name in found]

    def _named_corpus(self, name: str) -> FoundFile:
        path = datasets.dataset_path(name, self.cache, self.on_download)
        format = "jsonl" if path.suffix == ".jsonl" else "text"
        if self.data.format not in (None, format):
            raise ConfigError(
                f"--format {self.data.format} is for files, and {name!r} is {_NAMES[format]}. "
                "Leave it out."
            )
        return FoundFile(path, name, format)


def _suffixes(path: Path) -> tuple[str, str]:
    """Return the suffixes of the format and of the compression, in their original case."""
    is_packed = path.suffix.lower() in compressed.SUFFIXES
    return (path.with_suffix("").suffix, path.suffix) if is_packed else (path.suffix, "")


def _recognized(path: Path, name: str, data: DataConfig) -> FoundFile:
    """Return a file with its format: the user's, else by its suffix, else by its content."""
    suffix, packing = map(str.lower, _suffixes(path))
    with reading(name), path.open("rb") as file:
        magic = file.read(6)
    packing = packing or compressed.packing_of(magic)
    by_suffix = FORMATS.get(suffix, "text")
    is_empty = magic in (b"", codecs.BOM_UTF8)
    found = FoundFile(path, name, data.format or by_suffix, packing, is_empty=is_empty)
    if data.format:
        return found
    with found.opened() as (_, unpacked):
        head = unpacked.read(_HEAD_BYTES)
    if head.startswith(_RTF):
        raise DataError(
            f"{name!r} is RTF, text with formatting codes. Save it as plain text, or give "
            "--format text to train on the codes too."
        )
    if by_suffix == "text" and _HTML.match(head):
        return replace(found, looks_like=_TAGGED)
    content = records.sniffed(head, data.encoding, is_whole=len(head) < _HEAD_BYTES)
    is_json = by_suffix in ("json", "jsonl") and content in ("json", "jsonl")
    is_open = suffix not in (*FORMATS, *TEXT_SUFFIXES)
    return replace(found, format=content if is_json or is_open else by_suffix, looks_like=content)


def _folders(top: str, left_out: Counter[str]) -> Iterator[tuple[str, list["os.DirEntry[str]"]]]:
    """Yield each folder from ``top`` down once, with its entries; links are followed.

    Runs and models are left out: otherwise, training on the current folder would add the run's own
    model cards to the text, and the run could not be resumed.
    """
    waiting, seen = [top], set()
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real not in seen:
            seen.add(real)
            with os.scandir(folder) as entries:
                found = list(entries)
            if folder != top and _is_run_or_model({entry.name for entry in found}):
                left_out["run or model"] += 1
                continue
            yield folder, found
            waiting += [e.path for e in found if e.name[0] != "." and os.path.isdir(e.path)]


def _is_run_or_model(names: set[str]) -> bool:
    """Return whether a folder with files of these names is a training run or a model."""
    has_weights = any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)
    return {"config.toml", "metrics.jsonl"} <= names or ("config.json" in names and has_weights)


def _files_in(folder: Path, data: DataConfig, left_out: Counter[str]) -> list[FoundFile]:
    found: list[FoundFile] = []
    fieldless: list[FoundFile] = []
    entries = [entry for _, entries in _folders(str(folder), left_out) for entry in entries]
    for entry in sorted(entries, key=lambda entry: Path(entry.path)):
        path, is_file = Path(entry.path), os.path.isfile(entry.path)
        suffix = _suffixes(path)[0].lower()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif not is_file:
            if not os.path.isdir(entry.path):
                left_out["dangling link" if entry.is_symlink() else "not a file"] += 1
        elif suffix not in TEXT_SUFFIXES and suffix not in FORMATS:
            left_out["".join(_suffixes(path)) or "without a suffix"] += 1
        else:
            file = _recognized(path, str(path), data)
            if not _has_text_field(file, data):
                left_out[f'{suffix} without "{data.field}"'] += 1
                fieldless.append(file)
            else:
                found.append(file)
    if found:
        return found
    if _is_run_or_model(set(os.listdir(folder))):
        raise DataError(
            f"{str(folder)!r} is the folder of a run or a model, and has no text. Name a text; "
            "--from fine-tunes a model, and --resume continues a run."
        )
    if fieldless:  # reading it raises an error that names its fields
        return fieldless[:1]
    there = f" ({_counted(left_out)})" if left_out.total() else ""
    raise DataError(
        f"the folder {str(folder)!r} has no {', '.join((*TEXT_SUFFIXES, *FORMATS))} files{there}. "
        f"Name others with a glob, as in {_other_files(folder, left_out) or '**/*.py'!r}."
    )


def _has_text_field(file: FoundFile, data: DataConfig) -> bool:
    """Return whether a file is text, or its rows have the text field."""
    if file.format == "text":
        return True
    with file.opened() as (_, unpacked):
        return records.has_field(unpacked, file.format, file.name, data)


def _other_files(folder: Path, left_out: Counter[str]) -> str:
    """Return a glob for the most common kind of text files left out of a folder; empty for none."""
    for kind, _ in left_out.most_common():
        medium = (mimetypes.guess_type(f"x{kind}")[0] or "").partition("/")[0]
        is_suffix = kind[0] == "." and " " not in kind and medium not in ("image", "audio")
        if is_suffix or kind == "without a suffix":
            last = f"*{glob.escape(kind)}" if is_suffix else "*"
            return os.path.join(glob.escape(str(folder)), "**", last)
    return ""


def _expanded(pattern: str) -> set[str]:
    """Expand a glob as ``glob.glob`` does, but visit each folder once, so that link loops end."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return set(glob.glob(pattern))
    at = parts.index("**")
    rest = parts[at + 1 :] or ("*",)
    tops = filter(os.path.isdir, glob.glob(os.path.join(*parts[:at])) if at else ["."])
    folders = (folder for top in tops for folder, _ in _folders(top, Counter()))
    patterns = (os.path.join(glob.escape(folder), *rest) for folder in folders)
    return {os.path.normpath(name) for pattern in patterns for name in _expanded(pattern)}


def _counted(counts: Counter[str]) -> str:
    plurals = {"dangling link": "dangling links", "run or model": "runs or models"}
    names = {kind: plurals.get(kind, kind) if n > 1 else kind for kind, n in counts.items()}
    return ", ".join(f"{n:,} {names[kind]}" for kind, n in counts.most_common(6) if n)


def _summary(
    files: Sequence[FoundFile], left_out: Counter[str], glob_of_rest: str, data: DataConfig
) -> str:
    """Describe in one line the files read, by format, and the files left out."""
    kinds = Counter(_NAMES[file.format] for file in files)
    rows = f", field {data.field!r}" if set(kinds) != {"text"} else ""
    if len(files) == 1:
        line = f"{files[0].name!r} is read as {min(kinds)}{rows}"
    else:
        of = f" as {min(kinds)}" if len(kinds) == 1 else f": {_counted(kinds)}"
        line = f"{len(files):,} files are read{of}{rows}"
    odd = next((file for file in files if file.is_surprising), None)
    name = repr(odd.name) if odd and len(files) > 1 else "it"
    if odd and odd.looks_like == _TAGGED:
        line += f"; {name} is HTML, and its tags are a part of the text"
    elif odd and odd.format == "text":
        other = _NAMES[odd.looks_like]
        line += f"; {name} looks like {other}: --format {odd.looks_like} reads its rows"
    elif odd:
        line += f"; {name} is recognized by its content: --format text reads it as it is"
    if left_out.total():
        line += f"; left out: {_counted(left_out)}"
        if glob_of_rest:
            line += f" (to read those, name them with a glob, as in {glob_of_rest!r})"
    return line


def _missing(path: Path) -> str:
    try:
        siblings = os.listdir(path.parent)
    except OSError:
        return f"the folder {str(path.parent)!r} does not exist. Check the path."
    remedy = did_you_mean(repr(path.name), map(repr, [*siblings, *datasets.NAMES]))
    remedy = remedy or f"Check the path; the named corpora are {', '.join(datasets.NAMES)}."
    return f"there is no file or folder {str(path)!r}. {remedy}"


def _device_error(name: str) -> DataError:
    return DataError(
        f"{name!r} is a device or a socket, which may be endless. Name a file, or pipe its text in."
    )


def _is_endless(stream: BinaryIO) -> bool:
    """Return whether a stream is a device such as /dev/zero, and not a terminal or a pipe."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, AttributeError):  # a stream in memory
        return False
    return stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not stream.isatty())


def _spooled(stream: BinaryIO, spool: Path) -> Path:
    path = spool / f"stream-{len(os.listdir(spool))}"
    with resource_errors(path, OTHER_CACHE), path.open("wb") as file:
        shutil.copyfileobj(stream, file, BLOCK_BYTES)
    return path
