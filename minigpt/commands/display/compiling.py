"""Progress and notes while a model is compiled."""

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


def showing(model: LanguageModel, compile: bool | None, n_rows: int) -> AbstractContextManager[Any]:
    """Return a context in which to create a decoder; it shows when the model is being compiled.

    On a terminal, a model that was decoded uncompiled for long enough is compiled in the background
    when the command ends, so that later commands start compiled.

    Args: as for ``fast.is_compiled``.
    """
    fast = find_ring(FAST)
    if fast is None:
        return nullcontext()
    if not fast.is_compiled(model, compile, n_rows):
        if compile is None and n_rows == 1:
            atexit.unregister(_compile_later)  # registered for an earlier decoder
            atexit.register(_compile_later, model, time.monotonic())
        return nullcontext()
    if compile is None and model.device.type == "cpu":
        note("decoding with the compiled graph in the cache; --no-compile turns this off")
        return nullcontext()
    if not sys.stderr.isatty():
        return _noting("compiling the model, which takes a minute or two the first time")
    return ProgressLine("compiling the model")


def showing_start(
    events: Iterator[Any], model: LanguageModel, compile: bool | None
) -> Iterator[Any]:
    """Yield the events of a trace; the progress of compiling is shown until the first one."""
    with showing(model, compile, 1):
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
def _noting(what: str) -> Iterator[None]:
    """Print a note every ten seconds until the block ends."""
    is_done = threading.Event()

    def repeat() -> None:
        n_seconds = 0
        while not is_done.wait(_EVERY_S):
            n_seconds += _EVERY_S
            note(f"{what}: {n_seconds} s")

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_done.set()
        thread.join()
