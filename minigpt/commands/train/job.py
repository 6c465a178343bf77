"""Which run a call of minigpt train is about, and its settings: a new run, or a resumed one."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import ROOT
from minigpt.commands.train.settings import settings_of, with_vocabulary
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import ConfigError, LockedError
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.trainer import Trainer
from minigpt.training.world import World

_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str | None
    """Name of the run. None for a derived name, or with --resume for the newest run."""
    overrides: dict[str, Any]
    """Settings from options, --config and --set, nested as in RunConfig."""
    n_ranks: int
    """Number of processes."""
    on_progress: Callable[[Any], None]
    """Called with each ``text.corpus.PrepareProgress`` while the text is read."""
    lock: Callable[[RunFolder], AbstractContextManager[Any]] = RunFolder.lock
    """Returns the lock to hold while a run is trained."""


@dataclass(frozen=True)
class Job:
    """A run and where it starts: from random weights, a model, or a checkpoint."""

    config: RunConfig
    data: PreparedData
    run: RunFolder
    start_from: LanguageModel | None = None
    resume_from: Path | None = None
    carried: Any = None
    notes: Sequence[str] = ()
    """What the user should know of the settings, in lines."""

    def trainer(self, world: World) -> Trainer:
        """Return this process's trainer of the run."""
        device = resolve_device(self.config.training.device)
        return Trainer(
            self.config,
            self.data,
            self.run,
            device=device,
            dtype=resolve_dtype(self.config.training.dtype, device),
            start_from=self.start_from,
            resume_from=self.resume_from,
            carried=self.carried,
            world=world,
        )


def open_job(request: Request, *, resume: bool) -> AbstractContextManager[Job]:
    """Return the context of a new, fine-tuning or resumed run, which holds its lock."""
    if not resume:
        return _new_job(request)
    return ring("commands.train.resume").resumed_job(request)


@contextmanager
def _new_job(request: Request) -> Iterator[Job]:
    """Start a run in checkpoints/NAME from a preset, or from the model ``overrides["from"]``.

    Raises: ConfigError for invalid settings, or if the run exists; CheckpointError if the model or
        its tokenizer cannot be read; ResourceError if the run can never fit into memory.
    """
    name, overrides = request.name, request.overrides
    if name is not None:
        _require_new(RunFolder(ROOT / checked_name(name)))
    base: Any = None
    if overrides.get("from") is not None:
        finetune = ring("commands.train.finetune")
        base = finetune.read_base(overrides["from"])
        config = finetune.finetuning_config(overrides, base)
    else:
        settings = settings_of(overrides)
        config = with_vocabulary(settings, 1)
    require_memory(config, request)  # before the text is read
    data = prepare(
        config.data,
        on_progress=request.on_progress,
        tokenizer=base.tokenizer if base else None,
        chat_model=base.folder if base else None,
    )
    if base is None:
        config = with_vocabulary(settings, data.tokenizer.vocab_size)
        if overfitting := find_ring("training.overfitting"):
            config = overfitting.suited_to_text(config, overrides, data)
        require_memory(config, request)
    notes = notes_on(config, overrides)
    config = replace(config, data=data.manifest.with_split(config.data))
    names = fresh_names(config.data, base.name if base else config.preset)
    with ExitStack() as held:
        while True:
            run = RunFolder(ROOT / (name or next(names)))
            try:
                held.enter_context(request.lock(run))
                _require_new(run)
                break
            except (LockedError, ConfigError):  # another run took the name meanwhile
                if name:
                    raise
                held.close()
        carried = ring("checkpoint.carried").read_carried(base.folder) if base else None
        start = base.model if base else None
        yield Job(config, data, run, start_from=start, carried=carried, notes=notes)


def notes_on(config: RunConfig, overrides: dict[str, Any]) -> list[str]:
    """Return a line for each of the user's settings that others make void."""
    usage = find_ring("commands.help.usage")
    return list(usage.without_effect(config, overrides)) if usage else []


def _require_new(run: RunFolder) -> None:
    """Raise ConfigError if a run has checkpoints already."""
    if run.steps():
        raise ConfigError(
            f"the run {run.path.name!r} exists already. Resume it with --resume, or give this one "
            "another --name."
        )


def require_memory(config: RunConfig, request: Request) -> None:
    """Raise ResourceError if a run can never fit into memory."""
    if memory := find_ring("training.reports.memory"):
        device = resolve_device(config.training.device)
        memory.require_memory(config, device, request.n_ranks)


def checked_name(name: str) -> str:
    """Return a name if it is a valid folder name on every system; else raise ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"--name {name[:120]!r} is not a folder name. Use up to 100 letters, digits, '.', "
            "'_' and '-', beginning with a letter or digit."
        )
    return name


def fresh_names(data: DataConfig, start: str) -> Iterator[str]:
    """Yield unused names for a run. Args: start, the preset or the model it starts from."""
    first = data.paths[0].removeprefix("builtin:")
    corpus = "stdin" if first == "-" else Path(first).name.split(".")[0]
    stem = f"{_plain(corpus) or 'text'}-{_plain(start) or 'model'}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return (name for name in names if not RunFolder(ROOT / name).steps())


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:48]
