"""Messages and remedies for OS errors, and the check that a path is a regular file."""

import errno
import os
import stat
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec/"
_MAX_POINTER_BYTES = 1024  # the limit of Git LFS
_SPACE = "free some space there, or "
_NAME = "choose another name or folder"
_PERMISSION = "check the owner and the permissions, or "
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or ",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: "mount it for writing, or ",
    errno.EEXIST: _NAME,
    errno.ENOTDIR: _NAME,
    errno.ENAMETOOLONG: _NAME,
    errno.EIO: "the disk may be failing: ",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENOMEM: "free some memory",
}


def disk_message(error: OSError, path: Path | None, remedy: str, writing: str) -> str | None:
    """Return the message and remedy for an OSError; None if no remedy is known.

    Args: path and remedy, as for ``files.resource_errors``, but the path may be None; writing,
        ``files.WRITING``.
    """
    advice = _REMEDIES.get(error.errno or 0, "")
    if writing in str(error.filename):  # in /proc, no file can be created
        advice = advice or _NAME
    if not advice:
        return None
    where = error.filename or path
    if path and writing in str(where):  # the user knows the file, not its unfinished copy
        where = str(path).replace(writing, "")
    if advice.endswith(" "):
        advice += remedy or "choose another folder or disk"
    elif advice == _NAME:
        advice = remedy or _NAME
    reason = f"{os.strerror(error.errno or 0)}. {advice[0].upper()}{advice[1:]}."
    return f"{str(where)!r}: {reason}" if where else reason


def require_regular(path: Path, *, may_be_pipe: bool) -> None:
    """Raise OSError if a path is not a regular file: a FIFO may block, a device may never end.

    A Git LFS pointer, which stands in for a file that was not fetched, is refused too.

    Args: may_be_pipe, whether a FIFO is also allowed.
    """
    status = os.stat(path)
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not (stat.S_ISREG(mode) or (may_be_pipe and stat.S_ISFIFO(mode))):
        kind = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}.get(stat.S_IFMT(mode), "device")
        raise OSError(errno.EINVAL, f"it is a {kind}, not a regular file", str(path))
    if stat.S_ISREG(mode) and 0 < status.st_size < _MAX_POINTER_BYTES:
        with open(path, "rb") as file:
            if file.read(len(_LFS)) == _LFS:
                reason = "it is a Git LFS pointer: run `git lfs pull` in its repository"
                raise OSError(errno.EINVAL, reason, str(path))
