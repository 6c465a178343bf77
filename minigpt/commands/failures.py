"""Exceptions as one line that says what, the value and the remedy, with an exit code."""

import errno
import sys
from typing import Any

from minigpt.commands.layout import COMMANDS
from minigpt.errors import ConfigError, MinigptError, ResourceError, nearest

_RESOURCES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EMFILE,
    errno.ENOMEM,
)


def describe(error: BaseException) -> tuple[str, int]:
    """Return the message for an error, and its exit code."""
    if isinstance(error, MinigptError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # a usage error of typer, or of click below it
        return _usage(error), ConfigError.exit_code
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("minigpt"):
        return f"{error.name} is not installed. Install minigpt again with its dependencies.", 1
    if _is_out_of_memory(error):
        return "out of memory. Try a smaller model, --batch-size or --context-length.", 6
    if isinstance(error, OSError):
        where = f"{error.filename!r}: " if error.filename else ""
        reason = error.strerror or str(error) or type(error).__name__
        code = ResourceError.exit_code if error.errno in _RESOURCES else 1
        return f"{where}{reason}. Check the path, its permissions and the disk.", code
    return f"{type(error).__name__}: {error}. This is a bug of minigpt; --debug shows more.", 1


def _is_out_of_memory(error: BaseException) -> bool:
    is_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or "OutOfMemory" in type(error).__name__ or is_torch


def _usage(error: Any) -> str:
    command = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    page = f"See minigpt {command} --help." if command else "See minigpt --help."
    takes_prompt = command in ("generate", "attention-trace")
    message = str(error.format_message()).splitlines()[0].rstrip(".")
    if type(error).__name__ == "NoSuchOption":
        message = f"unknown option {error.option_name!r}"
        if takes_prompt and " " in error.option_name:
            page = "Put -- before a prompt that begins with a dash."
        else:
            parameters = error.ctx.command.get_params(error.ctx)
            known = [flag for p in parameters for flag in (*p.opts, *p.secondary_opts)]
            remedy = nearest(error.option_name, known)
            page = remedy if remedy.startswith("Did") else page  # not a list of thirty names
    elif "unexpected extra argument" in message and takes_prompt:
        page = "A prompt is one argument: put it in quotes."
    return f"{message[:1].lower()}{message[1:]}. {page}"
