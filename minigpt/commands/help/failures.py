"""Warnings, and exceptions of other packages, as the user reads them."""

import os
import sys
import warnings
from typing import Any

from minigpt.commands.help import usage
from minigpt.errors import ConfigError, MinigptWarning, ResourceError
from minigpt.files import resource_errors
from minigpt.text.escape import printable


def prepare() -> None:
    """Show warnings in one line, and check the working directory, before a command runs.

    Raises: ResourceError if that directory was deleted: torch cannot start from it.
    """
    warnings.showwarning = _show_warning
    try:
        os.getcwd()
    except OSError:
        raise ResourceError("the working directory was deleted. Change to another one.") from None


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Print a warning of ours as one line, and those of libraries with their place."""
    text = str(message)
    if not issubclass(category, MinigptWarning):
        text = f"{category.__name__}: {text} ({filename}:{lineno})"
    print(" ".join(printable(text).split()), file=sys.stderr)  # noqa: T201


def describe(error: BaseException) -> tuple[str, int] | None:
    """Return an error's message and exit code: usage, missing modules, memory and the disk.

    None if it is another one.
    """
    if hasattr(error, "format_message"):  # a usage error of typer, or of click below it
        return usage.message(error), ConfigError.exit_code
    if isinstance(error, ModuleNotFoundError):
        if str(error.name).startswith("minigpt"):
            text = f"this installation lacks {error.name}. Install all of minigpt to use it."
            return text, ConfigError.exit_code
        return f"{error.name} is not installed. Install minigpt again with its dependencies.", 1
    # The CPU's allocator, and cuBLAS, which allocates by itself.
    is_torch = isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "_STATUS_ALLOC_FAILED" in str(error)
    )
    if is_torch or isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__:
        remedy = "Try a smaller model, --batch-size or --context-length."
        return f"out of memory. {remedy}", ResourceError.exit_code
    if isinstance(error, OSError):
        try:
            with resource_errors(None):
                raise error
        except ResourceError as resource:
            return str(resource), resource.exit_code
        except OSError:
            where = f"{error.filename!r}: " if error.filename else ""
            reason = error.strerror or str(error) or type(error).__name__
            is_missing = isinstance(error, FileNotFoundError)
            check = "Check the path" + ("." if is_missing else ", its permissions and the disk.")
            return f"{where}{reason}. {check}", 1
    return None
