"""Named corpora: the built-in ones, and downloads checked by size and sha256."""

import ast
import hashlib
import http.client
import json
import platform
import re
import sys
import sysconfig
import textwrap
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from minigpt.data_config import DEFAULT_TEXT
from minigpt.errors import DataError
from minigpt.files import resource_errors, sha256, writing_aside
from minigpt.places import OTHER_CACHE
from minigpt.text.tokenizer import END_OF_TEXT

BLOCK_BYTES = 2**16
TIMEOUT_S = 30.0

# Some systems package these separately from the standard library, or not at all: without them,
# a version of Python always gives the same corpus.
OPTIONAL_MODULES = frozenset(
    ["distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo"]
)


@dataclass(frozen=True)
class Download:
    """A corpus to download, with its expected size and hash."""

    url: str
    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 of the file, in hex."""


DOWNLOADS = {
    "shakespeare": Download(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        size=1_115_394,
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}


def dataset_path(
    name: str, cache: Path, on_progress: Callable[[int, int], None] | None = None
) -> Path:
    """Return the file of a named corpus, generated or downloaded if it is not in the cache.

    Args: on_progress, called during a download with the bytes received and the total.
    Raises: DataError for an unknown name, a failed download, or an unexpected size or hash;
        ResourceError if the cache cannot be written.
    """
    if name in _BUILTIN:
        return _BUILTIN[name](cache)
    if name not in DOWNLOADS:
        raise DataError(f"unknown corpus {name!r}. Choose from {', '.join(NAMES)}.")
    wanted = DOWNLOADS[name]
    path = cache / "downloads" / f"{name}.txt"
    if path.is_file() and sha256(path) == wanted.sha256:
        return path
    digest, n_bytes = hashlib.sha256(), 0
    with resource_errors(path, OTHER_CACHE), writing_aside(path) as file:
        for block in _received(name, wanted):
            file.write(block)
            digest.update(block)
            n_bytes += len(block)
            if on_progress:
                on_progress(n_bytes, wanted.size)
        if n_bytes != wanted.size:
            raise _failed(name, f"{n_bytes} of {wanted.size} bytes arrived")
        if digest.hexdigest() != wanted.sha256:
            raise _failed(name, "its SHA-256 is not the expected one")
    return path


def _received(name: str, wanted: Download) -> Iterator[bytes]:
    """Yield the blocks of the response, at most one beyond the expected size."""
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "minigpt"})
    n_bytes = 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            while n_bytes <= wanted.size and (block := response.read(BLOCK_BYTES)):
                n_bytes += len(block)
                yield block
    except urllib.error.HTTPError as error:
        error.close()
        raise _failed(name, f"the server answered {error.code}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise _failed(name, str(reason)) from None


def _failed(name: str, reason: str) -> DataError:
    return DataError(
        f"could not download {name} from {DOWNLOADS[name].url}: {reason}. Check the network, or "
        "download the file yourself and pass its path."
    )


def _tales(cache: Path) -> Path:
    """Return the file of the package's short tales, one document each."""
    text = Path(__file__).with_name("tales.txt").read_bytes()
    path = cache / f"builtin-tales-{hashlib.sha256(text).hexdigest()[:16]}.jsonl"
    return _as_jsonl(text.decode().split(END_OF_TEXT), path)


def _python_prose(cache: Path) -> Path:
    """Return the file of the English prose in this Python installation.

    It contains the paragraphs that are sentences of the language reference (``pydoc_data.topics``),
    then of the docstrings of each standard library module. No module is imported. The text is the
    same on every machine with the same version of Python.
    """
    path = cache / f"builtin-1-python-{platform.python_version()}.jsonl"
    return _as_jsonl(("\n\n".join(_prose(text)) for text in _python_texts()), path)


_BUILTIN = {DEFAULT_TEXT: _tales, "builtin:python": _python_prose, "builtin": _tales}
NAMES = ["builtin:tales", "builtin:python", *DOWNLOADS]
"""Names of corpora that messages list. ``builtin`` is an alias of the default text."""


def _as_jsonl(texts: Iterable[str], path: Path) -> Path:
    """Write texts to a JSONL file in the cache, unless it exists."""
    if not path.is_file():
        with resource_errors(path, OTHER_CACHE), writing_aside(path) as file:
            for text in texts:
                if text := text.strip():
                    file.write(json.dumps({"text": text + "\n"}).encode() + b"\n")
    return path


def _python_texts() -> Iterator[str]:
    with suppress(ImportError):  # some minimal systems leave the topics out
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    yield from _library_docstrings()


def _library_docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names - OPTIONAL_MODULES):
        folder = library / module
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [library / f"{module}.py"]
        for path in files:
            if path.is_file() and not {"test", "tests"} & set(path.relative_to(library).parts):
                yield "\n\n".join(_docstrings(ast.parse(path.read_bytes())))


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[str]:
    """Yield the docstrings of a module in source order."""
    if text := ast.get_docstring(node):
        yield text
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)


def _prose(text: str) -> Iterator[str]:
    """Yield the paragraphs that are sentences: mostly letters, ending in a full stop."""
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = textwrap.dedent(paragraph).strip()
        n_plain = sum(c.isalpha() or c in " \n,." for c in paragraph)
        if len(paragraph) >= 60 and n_plain >= 0.93 * len(paragraph) and paragraph[-1] in ".:!?":
            yield paragraph
