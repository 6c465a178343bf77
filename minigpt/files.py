"""Files: atomic writes, fsync, locks, disk and permission errors, and JSON."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, BinaryIO

from minigpt.errors import CheckpointError, LockedError, ResourceError
from minigpt.rings import find_ring

WRITING = ".writing-"
"""Prefix of the names of unfinished files and folders."""
_remedies = find_ring("remedies")  # imported early: it reports too many open files
MAX_READ_BYTES = 2**28
"""Maximum size in bytes of a file that is read at once. The largest tokenizer.json has 2**25."""

MAX_LINE_BYTES = 2**20
"""Maximum length in bytes of a line that is read at once."""


@contextmanager
def resource_errors(path: Path, remedy: str = "") -> Iterator[None]:
    """Convert OSErrors about disk space, memory, permissions or file names to ResourceError.

    Any other OSError passes through.

    Args: path, named in the message if the error names no file; remedy, the alternative to freeing
        space or changing permissions there, as the end of a sentence.
    """
    try:
        yield
    except OSError as error:
        message = _remedies and _remedies.disk_message(error, path, remedy, WRITING)
        if message is None:
            raise
        raise ResourceError(message) from error


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk; does nothing on Windows, which cannot open folders."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems do not sync folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def sync_file(file: IO[Any]) -> None:
    """Flush an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def open_regular(path: Path, *, may_be_pipe: bool = False) -> BufferedReader:
    """Open a regular file for reading, or also a FIFO if ``may_be_pipe``.

    Raises: OSError whose strerror says what the path is instead.
    """
    if _remedies:
        _remedies.require_regular(path, may_be_pipe=may_be_pipe)
    return open(path, "rb")


def read_bytes(path: Path, *, may_be_pipe: bool = False) -> bytes:
    """Return the bytes of a regular file of at most MAX_READ_BYTES; see ``open_regular``."""
    with open_regular(path, may_be_pipe=may_be_pipe) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= MAX_READ_BYTES:
            data = file.read((size or MAX_READ_BYTES) + 1)  # a pipe's size is 0
            if len(data) <= MAX_READ_BYTES:
                return data
        reason = f"it has more than {MAX_READ_BYTES:,} bytes"
        raise OSError(errno.EINVAL, reason, str(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a regular file of any size; one of over MAX_LINE_BYTES in pieces."""
    with open_regular(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            yield line


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Create a folder and its parents, unless it exists.

    Raises: OSError; EPERM, not ENOENT, where no folder can be created, as in /proc or in a deleted
        working directory.
    """
    try:
        path.mkdir(mode, parents=True, exist_ok=True)
    except FileNotFoundError:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path)) from None


@contextmanager
def writing_aside(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that is renamed to ``path`` when the block ends without an exception.

    Readers see the old file or the complete new one, even after a crash. Creates the folder.
    """
    make_folder(path.parent)
    aside = path.with_name(f"{WRITING}{path.name}.{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            sync_file(file)
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException:
        remove(aside)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old bytes or the new, even after a crash.

    Raises: ResourceError if the disk is full or the folder cannot be written.
    """
    with resource_errors(path), writing_aside(path) as file:
        file.write(data)


def remove(path: Path) -> None:
    """Delete a file or folder if possible; it may be missing, and errors are ignored."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, message: str = "") -> Iterator[None]:
    """Hold a lock file that excludes other processes; its folder is created if needed.

    Args: message, of the error if another process holds the lock; empty to wait for it.
    Raises: LockedError; ResourceError if the folder cannot be written, or does not support locks.
    """
    from filelock import FileLock, Timeout  # slow to import, and not needed for --help

    lock = FileLock(path, timeout=0 if message else -1)
    with resource_errors(path.parent):
        make_folder(path.parent)
        try:
            lock.acquire()
        except Timeout:
            raise LockedError(message) from None
        except OSError as error:
            # With a file name, opening failed, and importing a ring could fail in the same way.
            if error.filename or not (places := find_ring("places")):
                raise
            raise places.no_lock(path, error) from None
    try:
        yield
    finally:
        lock.release()


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return a mapping as indented JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    return f"{text}\n".encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointError if the file is missing, unreadable, or not a JSON object; ResourceError
        if permission to read it is denied.
    """
    try:
        with resource_errors(path):
            value = json.loads(read_bytes(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {str(path.parent)!r}. A model folder has the files that "
            "`minigpt train` or Hugging Face's save_pretrained writes."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
        raise CheckpointError(
            f"{str(path)!r} is not JSON: {str(error)[:100]}. Write or download it again."
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{str(path)!r} must hold a JSON object. Write or download it again.")
    return value


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal, read in chunks."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
