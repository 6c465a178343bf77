"""Delay Ctrl-C, SIGTERM and SIGHUP until rows are computed or shown."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def delay_signals() -> Iterator[None]:
    """Delay these signals until the end of a block; a second signal is not delayed.

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
    names = ("SIGINT", "SIGTERM", "SIGHUP") if is_main else ()
    kinds = [getattr(signal, name) for name in names if hasattr(signal, name)]
    # None means a handler that was not installed from Python, which it cannot restore.
    handlers = {n: signal.signal(n, receive) for n in kinds if signal.getsignal(n) is not None}
    try:
        yield
    finally:
        end()
