"""Compiled graphs on the disk: one file each, whose name says what it was compiled for.

A package is machine code that is loaded into this process. So it is only taken from a folder and a
file that are the user's own and that no one else may write, and only if it is what was once written
there: the name ends in its own SHA-256. Anything else is compiled again.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from minigpt.errors import ResourceError
from minigpt.files import (
    CACHE_VARIABLE,
    OTHER_CACHE,
    cache_folder,
    resource_errors,
    writing_aside,
)


def package(key: str, compile_to: Callable[[Path], None]) -> Path:
    """Return the file that ``compile_to`` once wrote for this key; let it write one if need be.

    Raises: ResourceError if the cache folder cannot be written or is not the user's own.
    """
    folder = cache_folder() / "compiled"
    with resource_errors(folder, OTHER_CACHE):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_ours(folder):
        raise ResourceError(
            f"others may write to {str(folder)!r}, and what is there would be executed. Take their "
            f"permission away, or set {CACHE_VARIABLE} to a folder of your own."
        )
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    for path in folder.glob(f"{name}-*.pt2"):
        if _is_ours(path) and path.stem == f"{name}-{_digest(path.read_bytes())}":
            return path
        path.unlink()  # damaged, or not ours
    with tempfile.TemporaryDirectory() as aside:
        compiled = Path(aside) / "model.pt2"
        compile_to(compiled)
        data = compiled.read_bytes()
    path = folder / f"{name}-{_digest(data)}.pt2"
    with resource_errors(folder, OTHER_CACHE), writing_aside(path) as file:
        os.chmod(file.fileno(), 0o600)
        file.write(data)
    return path


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _is_ours(path: Path) -> bool:
    """Tell whether only this user can have written there."""
    if os.name == "nt":  # its user folders are the user's own, and it has no such bits
        return True
    status = path.lstat()
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.getuid() and not status.st_mode & 0o022
