"""Open the run of a minigpt train call, new or resumed, and resolve its settings."""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import ROOT
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import ConfigError, LockedError
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import LanguageModel
from minigpt.model_config import OWN_TYPE
from minigpt.presets import DEFAULT_PRESET
from minigpt.presets import preset as preset_settings
from minigpt.rings import find_ring, ring
from minigpt.settings import build, given, merge
from minigpt.text.tokens import PreparedData, prepare, prepared_settings
from minigpt.training.run import resolve_for_text
from minigpt.training.trainer import Trainer
from minigpt.training.world import World

LIMITS = {"max_steps": 0, "max_minutes": 0.0, "max_epochs": 0.0}
_NAME = re.compile(r"\w[\w.-]{0,99}")


@dataclass(frozen=True)
class Request:
    """The user's request for a training run."""

    name: str | None
    """Name of the run. None for a derived name, or with --resume for the newest run."""
    overrides: dict[str, Any]
    """Settings from options, --config and --set, nested as in RunConfig."""
    n_ranks: int
    """Number of processes."""
    on_progress: Callable[[Any], None]
    """Function called with each ``text.corpus.PrepareProgress`` while the text is read."""
    lock: Callable[[RunFolder], AbstractContextManager[Any]] = RunFolder.lock
    """Function that returns the lock to hold while a run is trained."""


@dataclass(frozen=True)
class Start:
    """The settings of a new run, its text, and the model that it is fine-tuned from, if any."""

    config: RunConfig
    data: PreparedData
    name: str
    """Name of the preset or of the model, part of the run's derived name."""
    model: LanguageModel | None = None
    """Model to fine-tune. None for random weights."""
    carried: Any = None
    """Files and tensors of the model to keep, a ``checkpoint.carried.Carried``."""
    notes: Sequence[str] = ()
    """Notes for the user about fine-tuning, one per line."""


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
    """Notes for the user about the settings, one per line."""

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
    """Return the context of a new, fine-tuned or resumed run, which holds the run's lock."""
    if given(request.overrides, "training", "shard") and not os.environ.get("WORLD_SIZE"):
        raise ConfigError(
            "--shard shards the model over several processes, but this is the only one. Start "
            "them with torchrun --nproc-per-node N -m minigpt train ..., or leave --shard out."
        )
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
    if overrides.get("from") is not None:
        start = ring("commands.train.finetune").start_from_model(request)
    else:
        start = _start_from_preset(request)
    config = replace(start.config, data=start.data.manifest.with_split(start.config.data))
    resolve_for_text(config, start.data)  # refuses too little text before the run has a folder
    names = fresh_names(config.data, start.name)
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
        notes = [*notes_on(start.config, overrides), *start.notes]
        yield Job(
            config,
            start.data,
            run,
            start_from=start.model,
            carried=start.carried,
            notes=notes,
        )


def _start_from_preset(request: Request) -> Start:
    settings = settings_of(request.overrides)
    config = with_vocabulary(settings, 1)
    require_memory(config, request)  # before the text is read
    data = prepare(config.data, on_progress=request.on_progress)
    config = with_vocabulary(settings, data.tokenizer.vocab_size)
    if overfitting := find_ring("training.overfitting"):
        config = overfitting.with_text_settings(config, request.overrides, data)
    require_memory(config, request)
    return Start(config, data, config.preset)


def notes_on(config: RunConfig, overrides: dict[str, Any]) -> list[str]:
    """Return a line for each user setting that has no effect because of another."""
    usage = find_ring("commands.help.usage")
    return list(usage.without_effect(config, overrides)) if usage else []


def _require_new(run: RunFolder) -> None:
    """Raise ConfigError if a run has checkpoints already."""
    if run.steps():
        remedy = "Resume it with --resume, or give this one another --name."
        if run.latest() is None:  # killed or failed before its first checkpoint, or damaged
            remedy = "It has no checkpoint to resume from, so give this one another --name."
        raise ConfigError(f"the run {run.path.name!r} exists already. {remedy}")


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
    corpus = "stdin" if first == "-" else Path(first).absolute().name.split(".")[0]
    stem = f"{_plain(corpus) or 'text'}-{_plain(start) or 'model'}"
    names = (stem if number == 1 else f"{stem}-{number}" for number in count(1))
    return (name for name in names if not RunFolder(ROOT / name).steps())


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_")[:48]


def settings_of(overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge the user's settings over those of the preset, and check them.

    Raises: ConfigError for invalid settings; DataError for a prepared folder that cannot be used.
    """
    overrides = {"preset": DEFAULT_PRESET} | overrides
    if not isinstance(overrides["preset"], str):
        raise ConfigError(f"preset must be the name of a preset: it is {overrides['preset']!r}.")
    preset = _adapted(preset_settings(overrides["preset"]), overrides)
    settings = merge(preset, one_budget(overrides))
    config = build(RunConfig, merge({"model": {"vocab_size": 1}}, settings))
    # The tokenizer and the split of a prepared folder win over those of the preset.
    own = prepared_settings(config.data)
    return merge(settings, {"data": own}, {"data": overrides.get("data", {})})


def _adapted(preset: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop or adapt the preset's values that depend on a shape or batch the user changed."""
    model, training = dict(preset["model"]), dict(preset["training"])
    is_recurrent = given(overrides, "model", "arch") in ("lstm", "lstm-attention")
    if given(overrides, "model", "family") == "gpt2" or is_recurrent:
        for name in ("qk_norm", "n_kv_head", "d_mlp"):
            model.pop(name, None)
    if is_recurrent:
        model["n_head"] = 1
    if given(overrides, "model", "d_model") is not None:
        model.pop("d_mlp", None)
    n_head = given(overrides, "model", "n_head")
    if isinstance(n_head, int) and "n_kv_head" in model:
        model["n_kv_head"] = gcd(n_head, model["n_kv_head"])
    context = given(overrides, "model", "context_length")
    if isinstance(context, int) and context % training.get("context_warmup_length", 1):
        training["context_warmup_length"] = 0
    batch = given(overrides, "training", "batch_size")
    if isinstance(batch, int) and "micro_batch_size" in training:
        training["micro_batch_size"] = gcd(batch, training["micro_batch_size"])
    return preset | {"model": model, "training": training}


def with_vocabulary(settings: dict[str, Any], vocab_size: int) -> RunConfig:
    """Build the config of a run from its settings and its tokenizer's size.

    Raises: ConfigError if the user asked for a smaller vocabulary.
    """
    config = build(RunConfig, merge({"model": {"vocab_size": vocab_size}}, settings))
    if config.model.vocab_size < vocab_size:
        raise ConfigError(
            f"model.vocab_size must be at least {vocab_size}, the size of the tokenizer: it is "
            f"{config.model.vocab_size}. Leave it out."
        )
    if config.model.model_type == OWN_TYPE:
        return config
    return replace(config, model=ring("checkpoint.published_models").canonical(config.model))


def one_budget(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the preset's or run's limits if the user gives any limit."""
    if all(given(overrides, "training", name) is None for name in LIMITS):
        return dict(overrides)
    return merge({"training": LIMITS}, overrides)
