"""What is shown while a model is compiled."""

import atexit
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from minigpt.commands.display.progress import ProgressLine
from minigpt.console import note
from minigpt.generation.forward import FAST
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring

_EVERY_S = 10


def showing(
    model: LanguageModel, compiles: bool | None, n_rows: int
) -> AbstractContextManager[Any]:
    """Return the context of making a decoder, which shows that the model is being compiled.

    On a terminal, a model that could be compiled but is not is compiled in the background when the
    command ends, for later starts, if it was decoded for long enough.

    Args: as for ``fast.is_compiled``.
    """
    fast = find_ring(FAST)
    if fast is None:
        return nullcontext()
    if not fast.is_compiled(model, compiles, n_rows):
        if compiles is None and n_rows == 1:
            atexit.unregister(_compile_later)  # of an earlier decoder
            atexit.register(_compile_later, model, time.monotonic())
        return nullcontext()
    if compiles is None and model.device.type == "cpu":
        note("decoding through the compiled graph in the cache; --no-compile does without it")
        return nullcontext()
    if not sys.stderr.isatty():
        return _saying("compiling the model, the first time for a minute or two")
    return ProgressLine("compiling the model")


def showing_start(
    events: Iterator[Any], model: LanguageModel, compiles: bool | None
) -> Iterator[Any]:
    """Yield the events of a trace; the progress of compiling is shown until the first one."""
    with showing(model, compiles, 1):
        first = next(events)
    yield first
    yield from events


def _compile_later(model: LanguageModel, began_at: float) -> None:
    background = ring(f"{FAST}.background")
    if time.monotonic() - began_at >= background.compile_after() and background.start(model):
        note(
            "compiling the model in the background, for a minute or two: later starts will be "
            f"faster. {background.VARIABLE}=never turns this off"
        )


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
