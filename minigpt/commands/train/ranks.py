"""minigpt train as one of several processes: orders from rank 0, and what to do if one is lost."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from minigpt.checkpoint.folder import RunFolder
from minigpt.commands.program import command_line
from minigpt.commands.train.finetune import read_base
from minigpt.commands.train.job import Job
from minigpt.commands.train.stopping import stopping_on_signals
from minigpt.config import RunConfig
from minigpt.console import make_console
from minigpt.errors import DivergedError, MinigptError
from minigpt.settings import build, to_dict
from minigpt.text.escape import printable
from minigpt.text.shards import open_prepared
from minigpt.training.distributed import World, is_lost_process


def orders(job: Job) -> dict[str, Any]:
    """Return what rank 0 tells the others of a job, for ``follow``."""
    told = {"config": to_dict(job.config), "data": str(job.data.folder), "run": str(job.run.path)}
    return told | ({"resume_from": str(job.resume_from)} if job.resume_from else {})


def follow(world: World) -> None:
    """Take part in the run that rank 0 plans; it alone writes, speaks, and has an exit code.

    Raises: MinigptError for what this rank alone has met.
    """
    told = world.told()
    if not told:
        return
    config = build(RunConfig, told["config"])
    run = RunFolder(Path(told["run"]))
    resume_from = Path(told["resume_from"]) if "resume_from" in told else None
    is_started_from = config.from_ is not None and resume_from is None
    try:
        with explaining_lost_process(run, world, resume_command(config, run, world)):
            data = open_prepared(Path(told["data"]))
            start_from = read_base(str(config.from_)).model if is_started_from else None
            trainer = Job(config, data, run, start_from, resume_from).trainer(world)
            with stopping_on_signals(trainer.request_stop) as received:
                for _ in trainer.run():
                    pass
                world.largest(received[0] if received else 0)
    except DivergedError:  # rank 0 has met it too, and says so
        return
    except MinigptError as error:
        raise type(error)(f"rank {world.rank}: {error}") from None
    world.leave()


@contextmanager
def explaining_lost_process(
    run: RunFolder, world: World, resume: str, console: Console | None = None
) -> Iterator[None]:
    """End with a word on what to do when another process of the run has died."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not is_lost_process(error):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which comes next: we do end
        # The first of each machine speaks, and the second, for the first may be the one that died.
        if world.local_rank < 2:
            latest = run.latest()
            remedy = "There is no checkpoint yet: start it anew."
            if latest is not None:
                remedy = f"Its last checkpoint is of step {latest.step}. Go on with: {resume}"
            text = (
                "error: another process of this run has ended, so it cannot go on; what that one "
                f"said, or torchrun's report, tells why. {remedy}"
            )
            (console or make_console(is_stderr=True)).print(printable(text))
        raise typer.Exit(1) from error


def launch_command(world: World, *words: str) -> str:
    """Return a shell command that calls this program as it was called, through torchrun or not."""
    if world.size == 1:
        return command_line(*words)
    n_machines = world.size // world.local_size
    several = f"--nnodes {n_machines} --rdzv-backend c10d --rdzv-endpoint THE_SAME_HOST "
    launcher = f"torchrun {several if n_machines > 1 else ''}--nproc-per-node {world.local_size}"
    return f"{launcher} -m {shlex.join(['minigpt', *words])}"


def resume_command(config: RunConfig, run: RunFolder, world: World) -> str:
    """Return the shell command that goes on with a run."""
    command = launch_command(world, "train", "--resume", "--name", run.path.name)
    return f"{command} < THE_SAME_TEXT" if "-" in config.data.paths else command
