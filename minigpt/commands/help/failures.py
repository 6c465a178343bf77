"""Handling of signals, warnings, and exceptions of other packages."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from minigpt.commands.help import usage
from minigpt.errors import ConfigError, MinigptWarning, ResourceError
from minigpt.files import WRITING
from minigpt.remedies import disk_message
from minigpt.streams import close_streams, open_streams, wrapped
from minigpt.text.escape import printable

_HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
_OUT_OF_MEMORY = (
    "can't allocate memory",  # the CPU's allocator
    "CUDA error: out of memory",  # memory outside torch's allocator: contexts, graphs, kernels
    "_STATUS_ALLOC_FAILED",  # cuBLAS and cuDNN have their own allocators,
    "CUBLAS_STATUS_NOT_INITIALIZED",  # and cannot start without memory
    "MPS backend out of memory",
)
_ACCELERATOR_REMEDIES = {
    "no kernel image": "Install a torch that was built for this GPU, or use --device cpu.",
    "busy or unavailable": "Wait for the process that uses the GPU, or use --device cpu.",
    "driver version": "Update the GPU's driver or install an older torch, or use --device cpu.",
    "NCCL error": "Check that all processes run and can connect; NCCL_DEBUG=INFO shows more.",
    "CUDA error": "Start again; if it recurs, CUDA_LAUNCH_BLOCKING=1 and --debug show where.",
    "cuDNN error": "Start again; if it recurs, --debug shows where.",
}
"""Words in the message of a GPU error -> its remedy; the first match counts."""


@contextmanager
def handling_failures() -> Iterator[None]:
    """Keep streams usable and clean up after signals in the block; show warnings in one line."""
    open_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    if _HANGUP and signal.getsignal(_HANGUP) != signal.SIG_IGN:  # ignored under nohup
        signal.signal(_HANGUP, _interrupt)
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    if on_ctrl_c != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    warnings.showwarning = _show_warning
    try:
        yield
    finally:
        close_streams()
        signal.signal(signal.SIGINT, on_ctrl_c)


def check_folder() -> None:
    """Raise ResourceError if the working directory was deleted: torch cannot start from it."""
    try:
        os.getcwd()
    except OSError:
        raise ResourceError("the working directory was deleted. Change to another one.") from None


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Raise an exception, so that unfinished work is cleaned up.

    Exits immediately while torch is being imported: its C++ code swallows exceptions, or aborts.
    """
    torch = sys.modules.get("torch")
    if torch is not None and getattr(torch.__spec__, "_initializing", False):
        if number == signal.SIGINT:
            os.write(2, b"interrupted\n")
        os._exit(128 + number)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number == _HANGUP:  # sent by the shell and the terminal
        signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, one of a library with its category and location."""
    text = str(message)
    if not issubclass(category, MinigptWarning):
        text = f"{category.__name__}: {text} ({filename}:{lineno})"
    print(*wrapped(" ".join(printable(text).split())), sep="\n", file=sys.stderr)  # noqa: T201


def describe(error: BaseException) -> tuple[str, int] | None:
    """Return the message and exit code of a usage, import, memory or disk error, else None."""
    if hasattr(error, "format_message"):  # a usage error of typer or click
        return usage.message(error), ConfigError.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("minigpt"):
        return f"{error.name} is not installed. Install minigpt again with its dependencies.", 1
    if _is_out_of_memory(error):
        remedy = "Try a smaller model, --batch-size or --context-length."
        return f"out of memory. {remedy}", ResourceError.exit_code
    if isinstance(error, RuntimeError):
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        for name, remedy in _ACCELERATOR_REMEDIES.items():
            if name in reason:
                return f"{reason}. {remedy}", 1
    return _describe_os_error(error) if isinstance(error, OSError) else None


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _describe_os_error(error: OSError) -> tuple[str, int]:
    if message := disk_message(error, None, "", WRITING):
        return message, ResourceError.exit_code
    where = f"{error.filename!r}: " if error.filename else ""
    if isinstance(error, IsADirectoryError):
        text = f"{where}it is a folder, not a file. Rename it, or choose another name."
        return text, ResourceError.exit_code
    reason = error.strerror or str(error) or type(error).__name__
    is_missing = isinstance(error, FileNotFoundError)
    check = "Check the path" + ("." if is_missing else ", its permissions and the disk.")
    return f"{where}{reason}. {check}", 1
