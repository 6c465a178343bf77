"""What minigpt train does once its options are read: prepare the text, train, and say so."""

import os
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import typer

from minigpt.checkpoint.disk import resource_errors
from minigpt.checkpoint.folder import ROOT, RunFolder
from minigpt.commands.training_display import TrainingDisplay
from minigpt.config import DataConfig, RunConfig, build, merge, read_toml, to_toml
from minigpt.errors import CheckpointError, ConfigError, nearest
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.presets import preset as preset_settings
from minigpt.text.shards import PreparedData, prepare
from minigpt.training.metrics import MetricsLog
from minigpt.training.trainer import Trainer

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
_NAME = re.compile(r"[\w][\w.-]*")


def start_run(name: str | None, preset: str | None, overrides: dict[str, Any]) -> None:
    """Train a new run in checkpoints/NAME."""
    preset = preset or overrides.pop("preset", None) or "nano"
    settings = merge(preset_settings(preset), _one_budget(overrides), {"preset": preset})
    # Everything that can be refused is refused before the text is prepared.
    probe = merge(settings, {"model": {"vocab_size": 257}})
    build(RunConfig, probe)
    data_config = build(DataConfig, settings.get("data", {}), "data.")
    run = RunFolder(ROOT / (_checked_name(name) if name else _fresh_name(data_config, preset)))
    if run.steps():
        raise ConfigError(
            f"the run {run.path.name!r} is already there. Go on with it by --resume, or give "
            "this one another --name."
        )
    device = resolve_device(settings["training"].get("device", "auto"))
    with TrainingDisplay() as display:
        data = prepare(data_config, on_progress=display.preparing)
        settings = merge({"model": {"vocab_size": data.tokenizer.vocab_size}}, settings)
        config = build(RunConfig, settings)
        with run.lock():
            _train(config, data, run, device, display, resume_from=None)


def resume_run(name: str | None, overrides: dict[str, Any]) -> None:
    """Go on with a run of checkpoints/: NAME, or the newest."""
    run = RunFolder(ROOT / _checked_name(name)) if name else _newest_run()
    latest = run.latest()
    if latest is None:
        names = [path.name for path in ROOT.iterdir() if RunFolder(path).steps()]
        raise CheckpointError(
            f"the run {run.path.name!r} has no checkpoint to resume from. "
            f"{nearest(run.path.name, names) if names else 'Start one without --resume.'}"
        )
    saved = read_toml(run.path / CONFIG_FILE)
    config = build(RunConfig, merge(saved, _one_budget(overrides)))
    device = resolve_device(config.training.device)
    with TrainingDisplay() as display, run.lock():
        data = prepare(config.data, on_progress=display.preparing)
        _train(config, data, run, device, display, resume_from=latest.folder)


def _one_budget(overrides: dict[str, Any]) -> dict[str, Any]:
    """Let one limit that the user gives replace the other one of the preset."""
    training = overrides.get("training", {})
    if "max_minutes" in training and "max_steps" not in training:
        return merge({"training": {"max_steps": 0}}, overrides)
    if "max_steps" in training and "max_minutes" not in training:
        return merge({"training": {"max_minutes": 0.0}}, overrides)
    return overrides


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name!r} is no name for a folder. Use letters, digits, '.', '_' and '-'."
        )
    return name


def _fresh_name(data: DataConfig, preset: str) -> str:
    corpus = "python"
    if data.paths:
        first = data.paths[0]
        corpus = "stdin" if first == "-" else Path(first).name.split(".")[0]
    stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', corpus).strip('-') or 'text'}-{preset}"
    names = [stem, *(f"{stem}-{number}" for number in range(2, 10_000))]
    return next(name for name in names if not RunFolder(ROOT / name).steps())


def _newest_run() -> RunFolder:
    runs = [RunFolder(path) for path in ROOT.iterdir()] if ROOT.is_dir() else []
    latest = {run: pointer for run in runs if (pointer := run.latest())}
    if not latest:
        raise CheckpointError("there is no run to resume in checkpoints/. Start one first.")
    return max(latest, key=lambda run: latest[run].folder.stat().st_mtime_ns)


def _train(
    config: RunConfig,
    data: PreparedData,
    run: RunFolder,
    device: torch.device,
    display: TrainingDisplay,
    *,
    resume_from: Path | None,
) -> None:
    dtype = resolve_dtype(config.training.dtype, device)
    trainer = Trainer(config, data, run, device=device, dtype=dtype, resume_from=resume_from)
    with resource_errors(run.path):
        (run.path / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
        metrics = MetricsLog(run.path / METRICS_FILE, from_step=trainer.step)
    display.start(trainer)
    with _stopping_on_signals(trainer) as received:
        for event in trainer.run():
            with resource_errors(run.path):
                metrics.write(event)
            display.show(event)
    again = f"minigpt train --resume --name {shlex.quote(run.path.name)}"
    display.finish(run, again if trainer.was_stopped else None)
    if trainer.was_stopped:
        raise typer.Exit(128 + received[0])


@contextmanager
def _stopping_on_signals(trainer: Trainer) -> Iterator[list[int]]:
    """Let the first SIGINT or SIGTERM ask the trainer to save and stop, the second one kill."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        received.append(number)
        trainer.request_stop()

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
