"""Where downloads, built corpora and token shards are kept, and how files get there whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import platformdirs

from minigpt.errors import ResourceError

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
