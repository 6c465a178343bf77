"""Files that a kill, a power cut or a full disk leaves either whole or absent; JSON read safely."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import platformdirs

from minigpt.errors import CheckpointError, ResourceError

_SPACE = "Free some space there, or choose another disk."
_PERMISSION = "Check the owner and the permissions, or choose another folder."
_NAME = "Choose another name or folder."
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "Choose a disk, or a limit of the shell (ulimit -f), that allows larger files.",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: _PERMISSION,
    errno.EEXIST: _NAME,
    errno.ENOTDIR: _NAME,
    errno.ENAMETOOLONG: _NAME,
    errno.EIO: "The disk may be failing: choose another one.",
}


@contextmanager
def resource_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses about files in or at path into ResourceError, with a remedy.

    Any other OSError passes through.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES:
            raise
        where = error.filename or path
        reason = os.strerror(error.errno)
        raise ResourceError(f"{str(where)!r}: {reason}. {_REMEDIES[error.errno]}") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk (where the system can open a folder)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old bytes or the new, never a mixture.

    Raises: ResourceError if the disk is full or the folder is not ours to write.
    """
    aside = path.with_name(f".writing-{path.name}")
    with resource_errors(path):
        try:
            with aside.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
            sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                aside.unlink(missing_ok=True)
            raise


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return a mapping as JSON of an indented line a key, in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, indent=2)
    return f"{text}\n".encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: CheckpointError if the file is missing, unreadable, or not a JSON object; ResourceError
        if it may not be read.
    """
    try:
        with resource_errors(path):
            value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing in {str(path.parent)!r}. A model folder is as `minigpt train` "
            "or Hugging Face's save_pretrained writes it."
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
    """Return a file's SHA-256 in hexadecimal, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


CACHE_VARIABLE = "MINIGPT_CACHE_DIR"


def cache_folder() -> Path:
    """Return MINIGPT_CACHE_DIR if it is set, else the user's cache folder of this system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("minigpt")


@contextmanager
def writing(path: Path, remedy: str = "") -> Iterator[None]:
    """Turn the operating system's errors inside into a ResourceError about ``path``.

    Args: remedy, besides more space; for the cache, that there are other places for it.
    """
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"cannot write {str(path)!r}: {error.strerror or error}. Free some space, or "
            f"{remedy or f'set {CACHE_VARIABLE} to a folder that can be written'}."
        ) from None


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which becomes ``path`` only when all of it is on the disk.

    Raises: ResourceError if it cannot be written.
    """
    aside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with aside.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        finally:
            aside.unlink(missing_ok=True)
