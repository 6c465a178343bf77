"""The cache of compiled packages.

A package is machine code that is loaded into this process. So its folder and file must be owned by
the user and not writable by others, and its SHA-256 must match the one in its name. Otherwise, it
is compiled again.
"""

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from minigpt.errors import ResourceError
from minigpt.files import make_folder, resource_errors, writing_aside
from minigpt.places import CACHE_VARIABLE, OTHER_CACHE, cache_folder, require_writable

_MAX_PACKAGES = 32  # of some MB each


def find_package(key: str) -> Path | None:
    """Return the package of a key in the cache; None if missing or damaged.

    Deletes a damaged one, if the folder can be written.
    """
    folder = _folder()
    if not folder.is_dir() or not _is_ours(folder):
        return None
    for path in folder.glob(f"{_name(key)}-*.pt2"):
        if _is_ours(path) and path.stem == f"{_name(key)}-{_digest(path.read_bytes())}":
            with suppress(OSError):
                os.utime(path)
            return path
        with suppress(OSError):
            path.unlink()  # damaged, or not ours
    return None


def cached_package(key: str, compile_to: Callable[[Path], None]) -> Path:
    """Return the package of a key, written by ``compile_to`` if there is none in the cache.

    Raises: ResourceError if the cache folder cannot be written or others may write to it.
    """
    folder = _folder()
    with resource_errors(folder, OTHER_CACHE):
        make_folder(folder, 0o700)
    if not _is_ours(folder):
        raise ResourceError(
            f"others may write to {str(folder)!r}, and files there would be executed. Remove their "
            f"write permission, or set {CACHE_VARIABLE} to a folder of your own."
        )
    if found := find_package(key):
        return found
    require_writable(folder / _name(key), OTHER_CACHE)  # compiling takes a minute
    with tempfile.TemporaryDirectory() as aside:
        compiled = Path(aside) / "model.pt2"
        compile_to(compiled)
        data = compiled.read_bytes()
    path = folder / f"{_name(key)}-{_digest(data)}.pt2"
    with resource_errors(folder, OTHER_CACHE), writing_aside(path) as file:
        os.chmod(file.fileno(), 0o600)
        file.write(data)
    packages = sorted(folder.glob("*.pt2"), key=lambda one: one.lstat().st_mtime)
    for old in packages[:-_MAX_PACKAGES]:
        old.unlink(missing_ok=True)
    return path


def lock_path(key: str) -> Path:
    """Return the path of the lock file of the process that compiles a package in the background."""
    return _folder() / f"{_name(key)}.lock"


def failure_path(key: str) -> Path:
    """Return the path of the file with the error of a failed background compilation."""
    return _folder() / f"{_name(key)}.failed"


def slower_path(key: str) -> Path:
    """Return the path of the file that says that a package is slower than the eager step here."""
    return _folder() / f"{_name(key)}.slower"


def _folder() -> Path:
    return cache_folder() / "compiled"


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _is_ours(path: Path) -> bool:
    """Return whether only this user can write to a file or folder."""
    if os.name == "nt":  # user folders are private, and there are no permission bits
        return True
    status = path.lstat()
    is_plain = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
    return is_plain and status.st_uid == os.getuid() and not status.st_mode & 0o022
