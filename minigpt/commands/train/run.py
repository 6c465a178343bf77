"""Training as the user sees it: signals, metrics, the display, and the next commands."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from types import FrameType
from typing import Any, Self

import typer

from minigpt.checkpoint.folder import CONFIG_FILE
from minigpt.commands.output import note
from minigpt.commands.process import command_line
from minigpt.commands.train.job import Job, Request, open_job
from minigpt.files import write_atomically
from minigpt.rings import find_ring, ring
from minigpt.settings import to_toml
from minigpt.text.tokens import PrepareProgress
from minigpt.training.events import Event
from minigpt.training.trainer import Trainer
from minigpt.training.world import ALONE, World, join


class Display:
    """What a training run tells about itself: a line for each event, and more with the ring."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the display."""

    def preparing(self, progress: PrepareProgress) -> None:
        """Take the progress of preparing the text."""

    def note(self, text: str) -> None:
        """Print a note."""
        note(text)

    def start(self, trainer: Trainer) -> None:
        """Take the run, before its first step."""

    def show(self, event: Event) -> None:
        """Take an event."""
        facts = {name: value for name, value in vars(event).items() if name != "model"}
        note("  ".join(f"{name} {value}" for name, value in facts.items()))

    def stopping(self) -> None:
        """Hear that a stop was requested; safe in a signal handler."""

    def finish(self) -> None:
        """Take the end of the run."""

    def propose(self, resume: str | None) -> None:
        """Print what to run next. Args: resume, the command that resumes a run that was stopped."""
        if resume is not None:
            note(f"resume {resume}")


def make_display() -> Display:
    """Return the display of the ring if it is there, else the plain one."""
    displays = find_ring("commands.train.display")
    display: Display = displays.TrainingDisplay() if displays else Display()
    return display


def run_training(
    name: str | None, overrides: dict[str, Any], report_to: str | None, *, resume: bool
) -> None:
    """Train as the only process, or as one of those that torchrun started.

    Raises: as ``open_job`` and ``Trainer.run``.
    """
    world = join()
    if not world.is_first:
        ring("commands.train.ranks").follow(world)
        return
    with releasing_ranks(world), make_display() as display:
        request = Request(name, overrides, world.size, display.preparing)
        with open_job(request, resume=resume) as job:
            for line in job.notes:
                display.note(line)
            _train(job, display, report_to, world)


@contextmanager
def releasing_ranks(world: World) -> Iterator[None]:
    """Tell the other ranks to exit if rank 0 fails before it has sent a plan."""
    try:
        yield
    except BaseException:
        world.send_plan({})
        raise


def _train(job: Job, display: Display, report_to: str | None, world: World) -> None:
    if job.resume_from is None:  # the config keeps the command that started the run
        command = launch_command(world, *sys.argv[1:])
        job = replace(job, config=replace(job.config, command=command))
    resume = resume_command(job, world)
    leading: AbstractContextManager[None] = nullcontext()
    if world.size > 1:
        leading = ring("commands.train.ranks").leading(job, world, resume, display)
    with leading:
        trainer, signal_number = train_job(job, display, report_to, world)
    world.close()
    display.finish()
    display.propose(resume if trainer.was_stopped else None)
    if trainer.was_stopped:
        raise typer.Exit(128 + signal_number)


def train_job(
    job: Job, display: Display, report_to: str | None = None, world: World = ALONE
) -> tuple[Trainer, int]:
    """Train a job, and write its events to metrics.jsonl and to the display.

    Returns: the trainer, and the number of the signal that stopped it, or 0.
    Raises: as ``Job.trainer`` and ``Trainer.run``.
    """
    trainer = job.trainer(world)
    config_toml = to_toml(trainer.config).encode(errors="replace")
    write_atomically(job.run.path / CONFIG_FILE, config_toml)
    from_step = trainer.step if job.resume_from else None

    def stop() -> None:
        trainer.request_stop()
        display.stopping()

    logs = find_ring("training.metrics")
    logging: AbstractContextManager[Any] = nullcontext(lambda event: None)
    if logs:
        logging = logs.logging_to(job.run.path, report_to, from_step=from_step)
    with logging as log:
        display.start(trainer)
        with stopping_on_signals(stop) as received:
            for event in trainer.run():
                log(event)
                display.show(event)
            return trainer, world.max(received[0] if received else 0)


@contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Call ``stop``, which must be quick, on the first signal, and exit on the second.

    Yields: the list of received signal numbers.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
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
    """Return the signals that stop a run, without those that are ignored, as SIGHUP under nohup.

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


def resume_command(job: Job, world: World) -> str:
    """Return the shell command that resumes a run."""
    command = launch_command(world, "train", "--resume", "--name", job.run.path.name)
    return f"{command} < THE_SAME_TEXT" if "-" in job.config.data.paths else command
