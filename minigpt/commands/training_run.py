"""What minigpt train does once its options are read: prepare the text, train, and say so."""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import typer
from rich.console import Console

from minigpt.checkpoint.disk import write_atomically
from minigpt.checkpoint.folder import CONFIG_FILE, ROOT, Pointer, RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.commands.finetuning import finetuning_config, one_lr, read_base
from minigpt.commands.program import command_line
from minigpt.commands.run_settings import (
    checked_name,
    fresh_name,
    one_budget,
    require_same,
    settings_of,
    with_vocabulary,
)
from minigpt.commands.training_display import TrainingDisplay
from minigpt.config import DataConfig, RunConfig
from minigpt.console import make_console
from minigpt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    MinigptError,
    nearest,
)
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.gpt import GPT
from minigpt.settings import build, merge, read_toml, to_dict, to_toml
from minigpt.text.shards import PreparedData, open_prepared, prepare
from minigpt.text.visible import printable
from minigpt.training.distributed import World, is_lost_process, join
from minigpt.training.metrics import logging_to
from minigpt.training.trainer import Trainer

_PROMPT = "Once upon a time"


def run_training(
    name: str | None, overrides: dict[str, Any], report_to: str | None, *, resume: bool
) -> None:
    """Train, as the one process or as one of those that torchrun started.

    Raises: what ``resume_run``, ``start_run`` and ``start_run_from`` raise.
    """
    world = join()
    if not world.is_first:
        follow(world)
        return
    start = start_run_from if overrides.get("from") is not None else start_run
    try:
        (resume_run if resume else start)(name, overrides, report_to, world)
    except BaseException:
        world.tell({})  # who waits for a plan shall not wait for ever
        raise


def start_run(
    name: str | None, overrides: dict[str, Any], report_to: str | None, world: World
) -> None:
    """Train a new run in checkpoints/NAME.

    Raises: ConfigError if the settings cannot be, or the run is there already.
    """
    settings = settings_of(overrides)
    data_config = build(DataConfig, settings.get("data", {}), "data.")
    name = checked_name(name) if name else fresh_name(data_config, settings["preset"])
    run = RunFolder(ROOT / name)
    _require_new(run)
    resolve_device(settings["training"].get("device", "auto"))  # refused before the text is read
    with TrainingDisplay() as display:
        data = prepare(data_config, on_progress=display.preparing)
        with run.lock():
            _require_new(run)  # another process may have made it in the meantime
            config = with_vocabulary(settings, data.tokenizer.vocab_size)
            _train(config, data, run, display, report_to, world)


def start_run_from(
    name: str | None, overrides: dict[str, Any], report_to: str | None, world: World
) -> None:
    """Train a new run in checkpoints/NAME that goes on from the model ``overrides["from"]``.

    Raises: CheckpointError if there is no such model, or no tokenizer with it; ConfigError if the
        settings cannot be, or the run is there already.
    """
    if not isinstance(overrides["from"], str):
        raise ConfigError(f"from must name a model: it is {overrides['from']!r}.")
    if name:
        _require_new(RunFolder(ROOT / checked_name(name)))
    base = read_base(overrides["from"])
    config = finetuning_config(overrides, base)
    run = RunFolder(ROOT / (name or fresh_name(config.data, base.name)))
    resolve_device(config.training.device)
    with TrainingDisplay() as display:
        data = prepare(config.data, on_progress=display.preparing, tokenizer=base.tokenizer)
        with run.lock():
            _require_new(run)
            _train(config, data, run, display, report_to, world, start_from=base.model)


def resume_run(
    name: str | None, overrides: dict[str, Any], report_to: str | None, world: World
) -> None:
    """Go on with a run of checkpoints/: NAME, or the newest.

    Raises: CheckpointError if there is none; ConfigError for a setting that it cannot change.
    """
    run = RunFolder(ROOT / checked_name(name)) if name else _newest_run()
    _require_steps(run)
    with TrainingDisplay() as display, run.lock():
        saved = build(RunConfig, read_toml(run.path / CONFIG_FILE))
        changes = one_budget(overrides if saved.from_ is None else one_lr(overrides))
        config = build(RunConfig, merge(to_dict(saved), changes))
        require_same(saved, config)
        resolve_device(config.training.device)
        latest = _require_steps(run)
        # What it started from may be gone by now; the checkpoint has the tokenizer too.
        tokenizer = read_model(latest.folder).tokenizer if saved.from_ is not None else None
        data = prepare(config.data, on_progress=display.preparing, tokenizer=tokenizer)
        _train(config, data, run, display, report_to, world, resume_from=latest.folder)


def _require_steps(run: RunFolder) -> Pointer:
    """Return the newest intact checkpoint of a run that is to be resumed."""
    latest = run.latest()
    if latest is None:
        names = [path.name for path in _folders() if RunFolder(path).steps()]
        raise CheckpointError(
            f"the run {run.path.name!r} has no checkpoint to resume from. "
            f"{nearest(run.path.name, names) if names else 'Start one without --resume.'}"
        )
    return latest


def _require_new(run: RunFolder) -> None:
    if run.steps():
        raise ConfigError(
            f"the run {run.path.name!r} is already there. Go on with it by --resume, or give "
            "this one another --name."
        )


def _folders() -> list[Path]:
    return [path for path in ROOT.iterdir() if path.is_dir()] if ROOT.is_dir() else []


def _newest_run() -> RunFolder:
    runs = [RunFolder(path) for path in _folders()]
    latest = {run: pointer for run in runs if (pointer := run.latest())}
    if not latest:
        raise CheckpointError(
            f"there is no run to resume in {str(ROOT)!r}. Start one without --resume."
        )
    return max(latest, key=lambda run: latest[run].folder.stat().st_mtime_ns)


def _train(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    display: TrainingDisplay,
    report_to: str | None,
    world: World,
    *,
    start_from: GPT | None = None,
    resume_from: Path | None = None,
) -> None:
    if resume_from is None:  # later words do not say how the run began
        config = replace(config, command=_command(world, *sys.argv[1:]))
    # What cannot be is refused before the others begin.
    world.micro_batch_size(config.training.batch_size, config.training.micro_batch_size)
    plan = {"config": to_dict(config), "data": str(data.folder), "run": str(run.path)}
    world.tell(plan | ({"resume_from": str(resume_from)} if resume_from else {}))
    resume = _resume_command(config, run, world)
    with explaining_lost_process(run, world, resume, display.console):
        trainer = _trainer(config, data, run, world, start_from, resume_from)
        write_atomically(run.path / CONFIG_FILE, to_toml(config).encode(errors="replace"))
        with logging_to(run.path, report_to, from_step=trainer.step) as log:
            display.start(trainer)
            if world.size > 1:
                display.note(f"if one of the processes dies, all end; go on with: {resume}")
            with _stopping_on_signals(trainer, display) as received:
                for event in trainer.run():
                    log(event)
                    display.show(event)
                signal_number = world.largest(received[0] if received else 0)
    world.leave()
    display.finish()
    if trainer.was_stopped:
        display.propose("resume", [resume])
        raise typer.Exit(128 + signal_number)
    display.propose("next", _next_commands(trainer))


def _trainer(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    world: World,
    start_from: GPT | None,
    resume_from: Path | None,
) -> Trainer:
    device = resolve_device(config.training.device)
    return Trainer(
        config,
        data,
        run,
        device=device,
        dtype=resolve_dtype(config.training.dtype, device),
        start_from=start_from,
        resume_from=resume_from,
        world=world,
    )


def follow(world: World) -> None:
    """Take part in the run that rank 0 plans; it alone writes, speaks, and has an exit code.

    Raises: MinigptError for what this rank alone has met.
    """
    plan = world.told()
    if not plan:
        return
    config = build(RunConfig, plan["config"])
    run = RunFolder(Path(plan["run"]))
    resume_from = Path(plan["resume_from"]) if "resume_from" in plan else None
    is_started_from = config.from_ is not None and resume_from is None
    try:
        with explaining_lost_process(run, world, _resume_command(config, run, world)):
            data = open_prepared(Path(plan["data"]))
            start_from = read_base(str(config.from_)).model if is_started_from else None
            trainer = _trainer(config, data, run, world, start_from, resume_from)
            with _stopping_on_signals(trainer) as received:
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


def _command(world: World, *words: str) -> str:
    """Return a shell command that calls this program as it was called, through torchrun or not."""
    if world.size == 1:
        return command_line(*words)
    n_machines = world.size // world.local_size
    several = f"--nnodes {n_machines} --rdzv-backend c10d --rdzv-endpoint THE_SAME_HOST "
    launcher = f"torchrun {several if n_machines > 1 else ''}--nproc-per-node {world.local_size}"
    return f"{launcher} -m {shlex.join(['minigpt', *words])}"


def _resume_command(config: RunConfig, run: RunFolder, world: World) -> str:
    command = _command(world, "train", "--resume", "--name", run.path.name)
    return f"{command} < THE_SAME_TEXT" if "-" in config.data.paths else command


def _next_commands(trainer: Trainer) -> list[str]:
    model = ["--model", trainer.folder.path.name]
    prompt = [_PROMPT] if _fits(trainer, _PROMPT) else []
    return [
        command_line("generate", *model, *prompt),
        command_line("attention-trace", *model, "--max-new-tokens", "40", *prompt),
    ]


def _fits(trainer: Trainer, prompt: str) -> bool:
    try:
        n_tokens = len(trainer.data.tokenizer.encode_prompt(prompt))
    except DataError:  # a vocabulary without one of its characters
        return False
    return n_tokens <= trainer.config.model.context_length


@contextmanager
def _stopping_on_signals(
    trainer: Trainer, display: TrainingDisplay | None = None
) -> Iterator[list[int]]:
    """Let the first signal ask the trainer to save and stop, the second one stop at once.

    Yields: the numbers of the signals that came.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            raise SystemExit(128 + number)
        received.append(number)
        trainer.request_stop()
        if display is not None:
            display.stopping()

    before = {number: signal.getsignal(number) for number in _ending_signals()}
    for number in before:
        signal.signal(number, stop)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ending_signals() -> list[int]:
    """Return the signals that ask for an end; under nohup a closed terminal does not.

    SIGUSR1 is what batch systems send to a job some time before they take its machine away.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
