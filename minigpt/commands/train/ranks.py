"""minigpt train under torchrun: the plan that rank 0 sends, and the error if a rank is lost."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from minigpt.checkpoint.folder import RunFolder
from minigpt.commands.train.job import Job
from minigpt.commands.train.run import Display
from minigpt.commands.train.stopping import stopping_on_signals
from minigpt.config import RunConfig
from minigpt.console import make_console
from minigpt.errors import DivergedError, MinigptError
from minigpt.rings import ring
from minigpt.settings import build, to_dict
from minigpt.text.escape import printable
from minigpt.text.shard_files import StoredData, open_prepared
from minigpt.training.distributed import DistributedWorld, is_lost_process, join


@contextmanager
def joined() -> Iterator[DistributedWorld]:
    """Join the processes of a run, and yield on rank 0; another rank follows it and exits."""
    world = join()
    if world.rank:
        follow(world)
        raise typer.Exit
    try:
        yield world
    finally:
        world.send_plan({})  # makes ranks that are still waiting for a plan exit


@contextmanager
def leading(job: Job, world: DistributedWorld, resume: str, display: Display) -> Iterator[None]:
    """Send a job's plan to the other ranks; if one of them is lost, print how to resume."""
    # Refuse an invalid batch size before the other ranks begin.
    world.micro_batch_size(job.config.training)
    display.note(f"if one process dies, all of them end; resume with: {resume}")
    assert isinstance(job.data, StoredData), "tokens that every rank can open"
    plan = {"config": to_dict(job.config), "data": str(job.data.folder), "run": str(job.run.path)}
    plan["resume"] = resume
    world.send_plan(plan | ({"resume_from": str(job.resume_from)} if job.resume_from else {}))
    with _explaining_lost_process(job.run, world, resume):
        yield
    world.close()


def follow(world: DistributedWorld) -> None:
    """Train as another rank than 0, with its plan. Only rank 0 writes files and messages.

    Raises: MinigptError for an error of this rank alone.
    """
    plan = world.receive_plan()
    if not plan:
        return
    try:
        config = build(RunConfig, plan["config"])
        start: dict[str, Any] = {}
        if "resume_from" in plan:
            start = {"resume_from": Path(plan["resume_from"])}
        elif config.from_ is not None:
            base = ring("commands.train.finetune").read_base(config.from_)
            start = {"start_from": base.model}
        data, run = open_prepared(Path(plan["data"])), RunFolder(Path(plan["run"]))
        job = Job(config, data, run, **start)
        with _explaining_lost_process(job.run, world, plan["resume"]):
            trainer = job.trainer(world)
            with stopping_on_signals(trainer.request_stop, world) as received:
                for _ in trainer.run():
                    pass
                world.max(received[0] if received else 0)
    except DivergedError:  # rank 0 reports it
        return
    except MinigptError as error:
        raise type(error)(f"rank {world.rank}: {error}") from None
    world.close()


@contextmanager
def _explaining_lost_process(
    run: RunFolder, world: DistributedWorld, resume: str
) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it next
        # Two ranks of each machine print this, because one of them may be the one that died.
        if world.local_rank < 2:
            latest = run.latest()
            remedy = "There is no checkpoint yet: start again."
            if latest is not None:
                remedy = f"The last checkpoint is of step {latest.step}. Resume with: {resume}"
            text = (
                "error: another process of this run has ended, so this one ends too. Its own "
                f"message, or torchrun's report, has the reason. {remedy}"
            )
            make_console(is_stderr=True).print(printable(text))
        raise typer.Exit(1) from error


def torchrun_command(world: DistributedWorld, *words: str) -> str:
    """Return a shell command that runs this program with as many processes as now."""
    n_machines = world.size // world.local_size
    several = f"--nnodes {n_machines} --rdzv-backend c10d --rdzv-endpoint THE_SAME_HOST "
    launcher = f"torchrun {several if n_machines > 1 else ''}--nproc-per-node {world.local_size}"
    return f"{launcher} -m {shlex.join(['minigpt', *words])}"
