"""Compressed files: gzip, xz, bzip2 and Zstandard."""

import bz2
import gzip
import importlib
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from minigpt.errors import DataError, install_extra

_MAGIC = {b"\x1f\x8b": ".gz", b"\xfd7zXZ\0": ".xz", b"BZh": ".bz2", b"\x28\xb5\x2f\xfd": ".zst"}
_OPENERS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".bz2": bz2.open,
    ".zst": lambda file: io.BufferedReader(_ZstdFile(file)),
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
    try:
        yield _OPENERS[packing](packed)
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        if getattr(error, "errno", None):  # an error of the disk, not of the format
            raise
        packed.seek(0)
        remedy = "Get it again."
        if packing_of(packed.read(6)) != packing:
            remedy = f"It does not begin like a {packing} file: get it again, or rename it if it "
            remedy += "is not compressed."
        raise DataError(f"{name!r} cannot be decompressed: {error}. {remedy}") from None


class _ZstdFile(io.RawIOBase):
    """Decompresses Zstandard; unlike the reader of ``zstandard``, it detects a truncated file."""

    _READ_BYTES = 2**12  # a block can expand a thousandfold

    def __init__(self, file: BinaryIO) -> None:
        try:  # since Python 3.14
            zstd: Any = importlib.import_module("compression.zstd")
            self._new_frame = zstd.ZstdDecompressor
        except ImportError:
            try:
                zstd = importlib.import_module("zstandard")
            except ImportError:
                raise DataError(
                    "files compressed with Zstandard need Python 3.14 or zstandard: "
                    f"{install_extra('zstd')}"
                ) from None
            self._new_frame = lambda: zstd.ZstdDecompressor().decompressobj()
        self._error: type[Exception] = zstd.ZstdError
        self._file, self._frame, self._packed, self._unpacked = file, self._new_frame(), b"", b""
        self._is_between_frames = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            self._packed = self._packed or self._file.read(self._READ_BYTES)
            if not self._packed:
                if not self._is_between_frames:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self._unpacked = self._frame.decompress(self._packed)
            except self._error as error:
                raise EOFError(str(error)) from None
            self._is_between_frames, self._packed = self._frame.eof, b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, self._new_frame()
        n_bytes = min(len(buffer), len(self._unpacked))
        buffer[:n_bytes] = self._unpacked[:n_bytes]
        self._unpacked = self._unpacked[n_bytes:]
        return n_bytes
