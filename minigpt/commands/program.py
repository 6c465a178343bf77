"""How this program was called, so that the commands that it suggests can be pasted."""

import os
import shlex
import shutil
import sys
from pathlib import Path


def command_line(*words: str) -> str:
    """Return a shell command that calls this program with other arguments."""
    return shlex.join([*_program(), *words])


def _program() -> list[str]:
    called = Path(sys.argv[0])
    if called.name == "__main__.py":  # python -m minigpt
        return [_shortest(Path(sys.executable)), "-m", "minigpt"]
    if called.suffix == ".py":  # python cli.py
        return [_shortest(Path(sys.executable)), sys.argv[0]]
    return [_shortest(called)]


def _shortest(executable: Path) -> str:
    """Return the name alone if the shell finds this file by it, else a path."""
    found = shutil.which(executable.name)
    if found and os.path.abspath(found) == os.path.abspath(executable):
        return executable.name
    relative = os.path.relpath(executable)
    return str(executable) if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)
