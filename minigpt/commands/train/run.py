"""Run training from the command line: metrics, display, and suggested next commands."""

import os
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Self

import typer

from minigpt.checkpoint.folder import CONFIG_FILE
from minigpt.commands.train.job import Job, Request, open_job
from minigpt.console import note
from minigpt.files import write_atomically
from minigpt.rings import find_ring, ring
from minigpt.settings import to_toml
from minigpt.training.events import Event
from minigpt.training.trainer import Trainer
from minigpt.training.world import ALONE, World

_STOPPING = "commands.train.stopping"


class Display:
    """Plain display of a training run, with a line for each event; the ring's shows more."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End the display."""

    def preparing(self, progress: Any) -> None:
        """Handle a ``text.corpus.PrepareProgress`` while the text is prepared."""

    def note(self, text: str) -> None:
        """Print a note."""
        note(text)

    def start(self, trainer: Trainer) -> None:
        """Handle the start of the run, before its first step."""

    def show(self, event: Event) -> None:
        """Handle an event."""
        values = {name: value for name, value in vars(event).items() if name != "model"}
        note("  ".join(f"{name} {value}" for name, value in values.items()))

    def stopping(self) -> None:
        """Handle a request to stop; safe in a signal handler."""

    def finish(self) -> None:
        """Handle the end of the run."""

    def propose(self, resume: str | None) -> None:
        """Print what to run next. Args: resume, the command that resumes a stopped run."""
        if resume is not None:
            note(f"resume {resume}")


def make_display() -> Display:
    """Return the display of the ring if it is installed, else the plain one."""
    displays = find_ring("commands.train.display")
    return displays.TrainingDisplay() if displays else Display()


def run_training(
    name: str | None,
    overrides: dict[str, Any],
    report_to: str | None,
    *,
    resume: bool,
    threads: int | None,
) -> None:
    """Train as the only process, or as one of those that torchrun started.

    Args: threads, the given number of CPU threads, for the command that resumes the run.
    Raises: as ``open_job`` and ``Trainer.run``.
    """
    with joined() as world, make_display() as display:
        request = Request(name, overrides, world.size, display.preparing)
        with open_job(request, resume=resume) as job:
            for line in job.notes:
                display.note(line)
            again = ""
            if stopping := find_ring(_STOPPING):
                job = stopping.with_command(job, world)
                again = stopping.resume_command(job, world, threads)
            ranks = ring("commands.train.ranks") if world.size > 1 else None
            with ranks.leading(job, world, again, display) if ranks else nullcontext():
                trainer, signal_number = train_job(job, display, report_to, world)
            display.finish()
            display.propose(again if trainer.was_stopped else None)
            if trainer.was_stopped:
                raise typer.Exit(128 + signal_number)


def joined() -> AbstractContextManager[World]:
    """Return the context of the processes that torchrun started, or of this one alone.

    Only rank 0 enters it; another rank follows until the end of the run, and exits.
    """
    if os.environ.get("WORLD_SIZE", "") in ("", "1"):
        return nullcontext(ALONE)
    return ring("commands.train.ranks").joined()


def train_job(
    job: Job, display: Display, report_to: str | None = None, world: World = ALONE
) -> tuple[Trainer, int]:
    """Train a job, and write its events to metrics.jsonl and to the display.

    Returns: the trainer, and the number of the signal that stopped it, or 0.
    """
    trainer = job.trainer(world)
    if trainer.progress < 1:  # else nothing is trained with these settings
        config_toml = to_toml(trainer.config).encode(errors="replace")
        write_atomically(job.run.path / CONFIG_FILE, config_toml)
    from_step = trainer.step if job.resume_from else None

    def stop() -> None:
        trainer.request_stop()
        display.stopping()

    listeners, received = [display.show], []
    with ExitStack() as opened:
        if logs := find_ring("training.metrics"):
            log = logs.logging_to(job.run.path, report_to, from_step=from_step)
            listeners.insert(0, opened.enter_context(log))
        display.start(trainer)
        if stopping := find_ring(_STOPPING):
            received = opened.enter_context(stopping.stopping_on_signals(stop, world))
        for event in trainer.run():
            for listen in listeners:
                listen(event)
        return trainer, world.max(received[0] if received else 0)
