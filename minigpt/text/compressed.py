"""Compressed files: gzip, xz, bzip2 and Zstandard."""

import bz2
import gzip
import importlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

from minigpt.errors import DataError, install_extra

_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: _zstd().open(file),
}
SUFFIXES = tuple(_OPENERS)
"""Suffixes of compressed files."""


def packing_of(head: bytes) -> str:
    """Return the suffix of the compression format that a file begins with; empty for none."""
    return next((suffix for magic, suffix in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def unpacked(packed: BinaryIO, packing: str, name: str) -> Iterator[BinaryIO]:
    """Yield a stream of the decompressed bytes of an open file.

    Args: packing, one of SUFFIXES; name, the file's name for error messages.
    Raises: DataError if the bytes are damaged, also while they are read.
    """
    damage: tuple[type[Exception], ...] = (EOFError, OSError, lzma.LZMAError, zlib.error)
    if packing == ".zst":
        damage += (_zstd().ZstdError,)
    try:
        yield _OPENERS[packing](packed)
    except damage as error:
        if getattr(error, "errno", None):  # an error of the disk, not of the format
            raise
        packed.seek(0)
        remedy = "Get it again."
        if packing_of(packed.read(6)) != packing:
            remedy = f"It does not begin like a {packing} file: get it again, or rename it if it "
            remedy += "is not compressed."
        raise DataError(f"{name!r} cannot be decompressed: {error}. {remedy}") from None


def _zstd() -> Any:
    """Return the module for Zstandard, which the standard library has since Python 3.14."""
    for name in ("compression.zstd", "backports.zstd"):
        with suppress(ImportError):
            return importlib.import_module(name)
    raise DataError(
        "files compressed with Zstandard need Python 3.14 or backports.zstd: "
        f"{install_extra('zstd')}"
    )
