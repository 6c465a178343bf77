"""Stop a training run on a signal, and build the shell commands that start and resume it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

from minigpt.commands.process import command_line, with_text_again
from minigpt.commands.train.job import Job
from minigpt.rings import ring
from minigpt.training.world import World


@contextmanager
def stopping_on_signals(stop: Callable[[], None], world: World) -> Iterator[list[int]]:
    """Call ``stop``, which must be quick, on the first signal; a Ctrl-C after it exits.

    Other signals may arrive more than once for one request: SIGHUP from the shell and the terminal,
    SIGTERM from timeout, and from Linux for each thread of a killed parent. torchrun forwards a
    Ctrl-C that its ranks also receive from the terminal, so they do not exit on the second.

    Yields: the list of received signal numbers.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT and world.size == 1:
            raise SystemExit(128 + number)
        received.append(number)
        stop()

    is_main = threading.current_thread() is threading.main_thread()  # only it may set handlers
    before = {number: signal.getsignal(number) for number in _stop_signals() if is_main}
    for number in before:
        signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_signals() -> list[int]:
    """Return the signals that stop a run, except ignored ones, such as SIGHUP under nohup.

    Batch systems send SIGUSR1 to a job before they preempt it.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


def launch_command(world: World, *words: str) -> str:
    """Return a shell command that runs this program again, with torchrun if it was used."""
    if world.size == 1:
        return command_line(*words)
    return str(ring("commands.train.ranks").torchrun_command(world, *words))


def resume_command(job: Job, world: World, threads: int | None) -> str:
    """Return the shell command that resumes a run, with the given number of CPU threads."""
    words = [] if threads is None else ["--threads", str(threads)]
    command = launch_command(world, "train", "--resume", "--name", job.run.path.name, *words)
    return with_text_again(command, job.config.data)


def with_command(job: Job, world: World) -> Job:
    """Return a job that records the command that started it."""
    if job.resume_from is not None:
        return job
    command = launch_command(world, *sys.argv[1:])
    return replace(job, config=replace(job.config, command=command))
