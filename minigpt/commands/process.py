"""The shell command that calls this program again."""

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any


def command_line(*words: str) -> str:
    """Return a shell command that calls this program the same way, with other arguments."""
    called = Path(sys.argv[0])
    program = [_shortest(Path(sys.executable)), sys.argv[0]]  # python cli.py
    if called.name == "__main__.py":
        program[1:] = ["-m", "minigpt"]
    elif called.suffix != ".py":
        program = [_shortest(called)]
    return shlex.join([*program, *words])


def with_text_again(command: str, data: Any) -> str:
    """Return a command that is given the same standard input again, if its text is from there.

    Args: data, the ``DataConfig`` of the run.
    """
    paths = (*data.paths, *getattr(data, "val", ()))  # val is a setting of the ring of corpora
    return f"{command} < THE_SAME_TEXT" if "-" in paths else command


def _shortest(executable: Path) -> str:
    """Return the name alone if the shell finds this file by it, else a path."""
    found = shutil.which(executable.name)
    if found and os.path.abspath(found) == os.path.abspath(executable):
        return executable.name
    relative = os.path.relpath(executable)
    return str(executable) if relative.startswith(os.pardir) else os.path.join(os.curdir, relative)
