"""Consoles on stdout and stderr, and the escaping of untrusted text before it is printed.

stdout carries the result, stderr everything else.
"""

import errno
import sys

from rich.console import Console

from minigpt.rings import find_ring
from minigpt.text.escape import one_line, printable

_PIPE_WIDTH = 100
_streams, _styles = find_ring("streams"), find_ring("styles")


def make_console(*, is_stderr: bool) -> Console:
    """Return a console for the current stdout or stderr, plain if that is not a terminal.

    Writing to stderr never fails: a closed terminal or pipe must not end a training run.
    """
    stream = sys.stderr if is_stderr else sys.stdout
    return Console(
        file=_streams.Unfailing(stream) if is_stderr and _streams else None,
        stderr=is_stderr,
        theme=_styles.THEME if _styles else None,
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=True,
        width=None if stream.isatty() else _PIPE_WIDTH,
    )


def write_result(text: str) -> None:
    """Write model text to stdout and flush: verbatim to a pipe or file, escaped on a terminal."""
    sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def outlive_reader() -> None:
    """Drop output once the reader of stdout is gone, as with ``| head``, or its terminal is closed.

    For a command that has files to write too.
    """
    if _streams:
        gone = {errno.EPIPE, errno.EIO} if sys.stdout.isatty() else {errno.EPIPE}
        sys.stdout = _streams.Unfailing(sys.stdout, gone)


def note(text: str) -> None:
    """Print a one-line note to stderr, wrapped if that is a terminal."""
    lines = _streams.wrapped(one_line(text)) if _streams else [one_line(text)]
    make_console(is_stderr=True).print(*lines, sep="\n", style="dim")
