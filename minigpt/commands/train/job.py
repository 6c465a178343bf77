"""Which run a call of minigpt train is about: a new one, one from a model, or one to go on with."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import CONFIG_FILE, Pointer, RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.resolve import ROOT
from minigpt.commands.train.finetune import finetuning_config, one_lr, read_base
from minigpt.commands.train.run_settings import (
    checked_name,
    fresh_name,
    one_budget,
    require_same,
    settings_of,
    with_vocabulary,
)
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import CheckpointError, ConfigError, nearest
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import LanguageModel
from minigpt.settings import build, merge, read_toml, to_dict
from minigpt.text.building import PrepareProgress
from minigpt.text.shards import PreparedData, prepare
from minigpt.training.distributed import World
from minigpt.training.reports.memory import require_memory
from minigpt.training.trainer import Trainer

Lock = Callable[[RunFolder], AbstractContextManager[None]]
OnProgress = Callable[[PrepareProgress], None]


@dataclass(frozen=True)
class Job:
    """A run, and where it starts: with random weights, those of a model, or a checkpoint."""

    config: RunConfig
    data: PreparedData
    run: RunFolder
    start_from: LanguageModel | None = None
    resume_from: Path | None = None

    def trainer(self, world: World) -> Trainer:
        """Return what trains this process's part of it."""
        device = resolve_device(self.config.training.device)
        return Trainer(
            self.config,
            self.data,
            self.run,
            device=device,
            dtype=resolve_dtype(self.config.training.dtype, device),
            start_from=self.start_from,
            resume_from=self.resume_from,
            world=world,
        )


@contextmanager
def new_job(
    name: str | None, overrides: dict[str, Any], n_ranks: int, lock: Lock, show: OnProgress
) -> Iterator[Job]:
    """Make a new run of checkpoints/NAME, and hold its lock.

    Args: n_ranks, which will share it; show, which is told how the preparation goes.
    Raises: ConfigError if the settings cannot be, or the run is there already; ResourceError if it
        can never fit into memory.
    """
    settings = settings_of(overrides)
    data_config = build(DataConfig, settings.get("data", {}), "data.")
    name = checked_name(name) if name else fresh_name(data_config, settings["preset"])
    run = RunFolder(ROOT / name)
    _require_new(run)
    # What can never be is refused before the text is read.
    device = resolve_device(settings["training"].get("device", "auto"))
    require_memory(with_vocabulary(settings, 1), device, n_ranks)
    data = prepare(data_config, on_progress=show)
    config = with_vocabulary(settings, data.tokenizer.vocab_size)
    require_memory(config, device, n_ranks)
    with lock(run):
        _require_new(run)  # another process may have made it in the meantime
        yield Job(config, data, run)


@contextmanager
def finetuning_job(
    name: str | None, overrides: dict[str, Any], n_ranks: int, lock: Lock, show: OnProgress
) -> Iterator[Job]:
    """Make a new run of checkpoints/NAME that goes on from the model ``overrides["from"]``.

    Raises: CheckpointError if there is no such model, or no tokenizer with it; otherwise as
        ``new_job``.
    """
    if not isinstance(overrides["from"], str):
        raise ConfigError(f"from must name a model: it is {overrides['from']!r}.")
    if name:
        _require_new(RunFolder(ROOT / checked_name(name)))
    base = read_base(overrides["from"])
    config = finetuning_config(overrides, base)
    run = RunFolder(ROOT / (name or fresh_name(config.data, base.name)))
    require_memory(config, resolve_device(config.training.device), n_ranks)
    data = prepare(config.data, on_progress=show, tokenizer=base.tokenizer)
    with lock(run):
        _require_new(run)
        yield Job(config, data, run, start_from=base.model)


@contextmanager
def resumed_job(
    name: str | None, overrides: dict[str, Any], n_ranks: int, lock: Lock, show: OnProgress
) -> Iterator[Job]:
    """Take up a run of checkpoints/, NAME or the newest, from its latest checkpoint.

    Raises: CheckpointError if there is none; ConfigError for a setting that it cannot change.
    """
    run = RunFolder(ROOT / checked_name(name)) if name else _newest_run()
    _require_steps(run)
    with lock(run):
        saved = build(RunConfig, read_toml(run.path / CONFIG_FILE))
        changes = one_budget(overrides if saved.from_ is None else one_lr(overrides))
        config = build(RunConfig, merge(to_dict(saved), changes))
        require_same(saved, config)
        require_memory(config, resolve_device(config.training.device), n_ranks)
        latest = _require_steps(run)
        # What it started from may be gone by now; the checkpoint has the tokenizer too.
        tokenizer = read_model(latest.folder).tokenizer if saved.from_ is not None else None
        data = prepare(config.data, on_progress=show, tokenizer=tokenizer)
        yield Job(config, data, run, resume_from=latest.folder)


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
