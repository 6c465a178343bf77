"""Ctrl-C and SIGTERM that wait until rows are computed or shown."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def signals_later() -> Iterator[None]:
    """Let Ctrl-C or SIGTERM wait for the end of a block; a second one does not wait.

    Only the main thread receives signals.
    """
    waiting: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        if len(waiting) > 1:
            end()

    def end() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[-1])

    is_main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    # None stands for a handler that Python cannot restore.
    handlers = {n: signal.signal(n, receive) for n in kinds if signal.getsignal(n) is not None}
    try:
        yield
    finally:
        end()
