"""Signals -> a run that saves and stops at the next step, or at once if asked twice."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Let the first signal call ``stop``, which must be quick, and the second one end the program.

    Yields: the numbers of the signals that came.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)
        stop()

    before = {number: signal.getsignal(number) for number in ending_signals()}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending_signals() -> list[int]:
    """Return the signals that ask for an end; under nohup a closed terminal does not.

    SIGUSR1 is what batch systems send to a job some time before they take its machine away.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
