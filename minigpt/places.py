"""The cache folder, and checks before long work that files can be written."""

import errno
import os
from pathlib import Path

import platformdirs

from minigpt.errors import ResourceError
from minigpt.files import WRITING, resource_errors

CACHE_VARIABLE = "MINIGPT_CACHE_DIR"
OTHER_CACHE = f"set {CACHE_VARIABLE} to a folder that can be written"
"""Remedy if the cache cannot be written."""


def cache_folder() -> Path:
    """Return MINIGPT_CACHE_DIR if it is set, else the user's cache folder of this system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("minigpt")


def require_writable(path: Path, remedy: str = "") -> None:
    """Check that a file can be written, before the long computation of its content.

    Args: remedy, as for ``resource_errors``.
    Raises: ResourceError if it, or its folder, cannot be written.
    """
    with resource_errors(path, remedy):
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        if not path.exists() or path.is_file():
            aside = path.with_name(f"{WRITING}{path.name}.{os.getpid()}")
            aside.touch()
            aside.unlink()


def no_lock(path: Path, error: OSError) -> ResourceError:
    """Return the error for a file on a disk that does not support locks."""
    return ResourceError(
        f"{str(path)!r} cannot be locked: {error.strerror}. Choose a folder on another disk; for "
        f"the cache, {OTHER_CACHE}."
    )
