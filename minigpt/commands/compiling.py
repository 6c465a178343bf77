"""What is shown while a model is compiled."""

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from minigpt.commands.output import note
from minigpt.commands.progress import ProgressLine

_EVERY_S = 10


def showing() -> AbstractContextManager[Any]:
    """Show that the model is being compiled: on a terminal, or in a line now and then."""
    if not sys.stderr.isatty():
        return _saying("compiling the model, the first time for a minute or two")
    return ProgressLine("compiling the model")


@contextmanager
def _saying(what: str) -> Iterator[None]:
    """Write a line every ten seconds until the block ends."""
    is_done = threading.Event()

    def say() -> None:
        n_seconds = 0
        while not is_done.wait(_EVERY_S):
            n_seconds += _EVERY_S
            note(f"{what}: {n_seconds} s")

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
