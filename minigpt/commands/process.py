"""The process of a command: its streams, and how it was called."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def open_streams() -> None:
    """Make sure that stdin, stdout and stderr exist, and that no character makes them fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def close_streams() -> None:
    """Silence streams that can no longer be written, so that Python's last flush does not fail."""
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            from minigpt.console import silence

            silence(stream)


def command_line(*words: str) -> str:
    """Return a shell command that calls this program, as it was called, with other arguments."""
    called = Path(sys.argv[0])
    program = [_shortest(Path(sys.executable)), sys.argv[0]]  # python cli.py
    if called.name == "__main__.py":
        program[1:] = ["-m", "minigpt"]
    elif called.suffix != ".py":
        program = [_shortest(called)]
    return shlex.join([*program, *words])


def _shortest(executable: Path) -> str:
    """Return the name alone if the shell finds this file by it, else a path."""
    found = shutil.which(executable.name)
    if found and os.path.abspath(found) == os.path.abspath(executable):
        return executable.name
    relative = os.path.relpath(executable)
    return str(executable) if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)
