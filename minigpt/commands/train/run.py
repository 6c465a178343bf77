"""What minigpt train does once its options are read: train, and say so; or say what it would do."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import typer

from minigpt.checkpoint.folder import CONFIG_FILE, RunFolder
from minigpt.commands.program import command_line
from minigpt.commands.train.display import TrainingDisplay
from minigpt.commands.train.job import Job, Lock, finetuning_job, new_job, resumed_job
from minigpt.commands.train.plan import show_plan
from minigpt.commands.train.ranks import (
    explaining_lost_process,
    follow,
    launch_command,
    orders,
    resume_command,
)
from minigpt.commands.train.stopping import stopping_on_signals
from minigpt.errors import DataError
from minigpt.files import write_atomically
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.settings import to_toml
from minigpt.training.distributed import ALONE, World, join
from minigpt.training.metrics import logging_to
from minigpt.training.reports.plan import make_plan
from minigpt.training.state import Progress, read_progress
from minigpt.training.trainer import Trainer

_PROMPT = "Once upon a time"


def run_training(
    name: str | None, overrides: dict[str, Any], report_to: str | None, *, resume: bool
) -> None:
    """Train, as the one process or as one of those that torchrun started.

    Raises: what the makers of jobs raise, and ``Trainer.run``.
    """
    world = join()
    if not world.is_first:
        follow(world)
        return
    with (
        _giving_up_for_all(world),
        TrainingDisplay() as display,
        _job(name, overrides, world, display, RunFolder.lock, resume=resume) as job,
    ):
        _train(job, display, report_to, world)


def plan_training(
    name: str | None, overrides: dict[str, Any], *, resume: bool, is_json: bool
) -> None:
    """Print what ``run_training`` would do; nothing of it is written to the runs' folder.

    Raises: what the makers of jobs raise.
    """
    world = join()
    if not world.is_first:
        follow(world)
        return
    with _giving_up_for_all(world):
        with (
            TrainingDisplay() as display,
            _job(name, overrides, world, display, _unlocked, resume=resume) as job,
        ):
            device = resolve_device(job.config.training.device)
            plan = make_plan(
                job.config,
                job.data,
                job.run,
                device=device,
                dtype=resolve_dtype(job.config.training.dtype, device),
                world=world,
                done=read_progress(job.resume_from) if job.resume_from else Progress(),
            )
        show_plan(plan, job.config, is_json=is_json)
        world.tell({})


def _unlocked(run: RunFolder) -> AbstractContextManager[None]:
    return nullcontext()


@contextmanager
def _giving_up_for_all(world: World) -> Iterator[None]:
    """Let nobody wait for orders that will not come."""
    try:
        yield
    except BaseException:
        world.tell({})
        raise


def _job(
    name: str | None,
    overrides: dict[str, Any],
    world: World,
    display: TrainingDisplay,
    lock: Lock,
    *,
    resume: bool,
) -> AbstractContextManager[Job]:
    start = finetuning_job if overrides.get("from") is not None else new_job
    make = resumed_job if resume else start
    return make(name, overrides, world.size, lock, display.preparing)


def _train(job: Job, display: TrainingDisplay, report_to: str | None, world: World) -> None:
    if job.resume_from is None:  # later words do not say how the run began
        command = launch_command(world, *sys.argv[1:])
        job = replace(job, config=replace(job.config, command=command))
    training, run = job.config.training, job.run
    # What cannot be is refused before the others begin.
    world.micro_batch_size(training.batch_size, training.micro_batch_size)
    world.tell(orders(job))
    resume = resume_command(job.config, run, world)
    with explaining_lost_process(run, world, resume, display.console):
        trainer, signal_number = train_job(job, display, report_to, world)
    world.leave()
    display.finish()
    if trainer.was_stopped:
        display.propose("resume", [resume])
        raise typer.Exit(128 + signal_number)
    display.propose("next", _next_commands(trainer))


def train_job(
    job: Job, display: TrainingDisplay, report_to: str | None = None, world: World = ALONE
) -> tuple[Trainer, int]:
    """Train, while metrics.jsonl and the display are told what happens.

    Returns: the trainer when it has ended, and the signal that came meanwhile; 0 if none did.
    Raises: as ``Job.trainer`` and ``Trainer.run``.
    """
    run = job.run
    trainer = job.trainer(world)
    config_toml = to_toml(trainer.config).encode(errors="replace")
    write_atomically(run.path / CONFIG_FILE, config_toml)
    from_step = trainer.step if job.resume_from else None
    with logging_to(run.path, report_to, from_step=from_step) as log:
        display.start(trainer)
        if world.size > 1:
            resume = resume_command(job.config, run, world)
            display.note(f"if one of the processes dies, all end; go on with: {resume}")
        with _stopping(trainer, display) as received:
            for event in trainer.run():
                log(event)
                display.show(event)
            return trainer, world.largest(received[0] if received else 0)


def _stopping(trainer: Trainer, display: TrainingDisplay) -> AbstractContextManager[list[int]]:
    def stop() -> None:
        trainer.request_stop()
        display.stopping()

    return stopping_on_signals(stop)


def _next_commands(trainer: Trainer) -> list[str]:
    model = ["--model", trainer.folder.path.name]
    prompt = [_PROMPT] if _fits(trainer, _PROMPT) else []
    commands = [command_line("generate", *model, *prompt)]
    if trainer.config.model.n_attention_layer:
        tracing = ("attention-trace", *model, "--max-new-tokens", "40", *prompt)
        commands.append(command_line(*tracing))
    return commands


def _fits(trainer: Trainer, prompt: str) -> bool:
    try:
        n_tokens = len(trainer.data.tokenizer.encode_prompt(prompt))
    except DataError:  # a vocabulary without one of its characters
        return False
    return n_tokens <= trainer.config.model.context_length
