"""Which run a call of minigpt train is about, and its settings: a new run, or a resumed one."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from math import gcd
from pathlib import Path
from typing import Any, Literal

from minigpt.checkpoint.families import canonical
from minigpt.checkpoint.folder import CONFIG_FILE, Pointer, RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import Carried, read_carried, read_model
from minigpt.checkpoint.resolve import ROOT, models_in, warn_of_damage
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LockedError,
    cut,
    nearest,
)
from minigpt.model.cost import parameter_count
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import LanguageModel
from minigpt.presets import DEFAULT_PRESET, for_text
from minigpt.presets import preset as preset_settings
from minigpt.rings import has_ring, ring
from minigpt.settings import build, merge, read_toml, to_dict, without_effect
from minigpt.text.building import PrepareProgress
from minigpt.text.shards import PreparedData, prepare, prepared_settings
from minigpt.training.schedule import with_max_steps
from minigpt.training.state import read_state
from minigpt.training.trainer import Trainer
from minigpt.training.world import World

_NAME = re.compile(r"\w[\w.-]{0,99}")
# Settings that --resume cannot change. The text is not among them, because it may have moved: the
# trainer compares the tokens.
_FIXED = (
    "preset",
    "from",
    "model",
    "data.tokenizer",
    "data.val_fraction",
    "data.val_split",
    "training.seed",
    "training.batch_size",
    "training.sequence_length",
    "training.optimizer",
)
_LIMITS = {"max_steps": 0, "max_minutes": 0.0, "max_epochs": 0.0}


@dataclass(frozen=True)
class Request:
    """What the user asked for."""

    name: str | None
    """Name of the run. None for a derived name, or with --resume for the newest run."""
    overrides: dict[str, Any]
    """Settings from options, --config and --set, nested as in RunConfig."""
    n_ranks: int
    """Number of processes."""
    on_progress: Callable[[PrepareProgress], None]
    """Callback for the preparation of the text."""
    is_dry_run: bool = False
    """Whether nothing may be written, so that the run is not locked either."""

    def lock(self, run: RunFolder) -> AbstractContextManager[None]:
        """Return the lock to hold while the run is trained."""
        return nullcontext() if self.is_dry_run else run.lock()


@dataclass(frozen=True)
class Job:
    """A run and where it starts: from random weights, a model, or a checkpoint."""

    config: RunConfig
    data: PreparedData
    run: RunFolder
    start_from: LanguageModel | None = None
    resume_from: Path | None = None
    carried: Carried | None = None
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
    return _resumed_job(request) if resume else _new_job(request)


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
        own = prepared_settings(config.data.paths) | {"tokenizer": config.data.tokenizer}
        own |= overrides.get("data", {})
        config = build(RunConfig, merge(to_dict(config), {"data": own}))
    else:
        settings = settings_of(overrides)
        config = with_vocabulary(settings, 1)
    _require_memory(config, request)  # before the text is read
    tokenizer = base.tokenizer if base else None
    data = prepare(
        config.data,
        on_progress=request.on_progress,
        tokenizer=tokenizer,
        template=chat_template(config.data, base.folder if base else None),
    )
    if base is None:
        config = with_vocabulary(settings, data.tokenizer.vocab_size)
        config = suited_to_text(config, overrides, data)
        _require_memory(config, request)
    notes = without_effect(config, overrides)
    config = with_split(config, data)
    names = fresh_names(config.data, base.name if base else config.preset)
    with ExitStack() as held:
        while True:
            run = RunFolder(ROOT / (name or next(names)))
            try:
                held.enter_context(request.lock(run))
                _require_new(run)  # another process may have created it meanwhile
                break
            except (LockedError, ConfigError):
                if name:
                    raise
                held.close()  # another run took the name that was free: take the next one
        carried = read_carried(base.folder) if base else None
        start = base.model if base else None
        yield Job(config, data, run, start_from=start, carried=carried, notes=notes)


@contextmanager
def _resumed_job(request: Request) -> Iterator[Job]:
    """Resume a run of checkpoints/ from its latest checkpoint.

    Raises: CheckpointError if there is none; ConfigError for a setting that cannot change.
    """
    is_named = request.name is not None
    run = RunFolder(ROOT / checked_name(request.name or "")) if is_named else _newest_run()
    _require_checkpoint(run)
    with request.lock(run):
        settings = read_toml(run.path / CONFIG_FILE)
        if "val" not in settings.get("data", {}):  # saved before there were other splits
            settings = merge(settings, {"data": {"val_split": "tail"}})
        saved = build(RunConfig, settings)
        _require_same(saved, request.overrides)  # before settings that depend on each other
        overrides = request.overrides if saved.from_ is None else one_lr(request.overrides)
        config = build(RunConfig, merge(to_dict(saved), one_budget(overrides)))
        notes = without_effect(config, overrides)
        _require_memory(config, request)
        latest = _require_checkpoint(run)
        # The model that a run was fine-tuned from may be gone; the checkpoint has its tokenizer.
        is_tuned = saved.from_ is not None
        tokenizer = read_model(latest.folder).tokenizer if is_tuned else None
        carried = read_carried(latest.folder) if is_tuned else None
        data = prepare(
            config.data,
            on_progress=request.on_progress,
            tokenizer=tokenizer,
            template=chat_template(replace(config.data, chat_template=None), latest.folder),
        )
        if read_state(latest.folder).corpus != data.tokens.fingerprint:
            raise _other_text(saved, request.overrides)
        notes += _lifted_limit(saved, config, data)
        yield Job(config, data, run, resume_from=latest.folder, carried=carried, notes=notes)


def chat_template(data: DataConfig, folder: Path | None) -> Any:
    """Return the template of conversations; None for other text.

    Args: folder, of the model that brings it; None for a vocabulary of our own.
    """
    if not data.chat or prepared_settings(data.paths):
        return None
    return ring("text.chat").training_template(data.chat_template, folder)


def _require_new(run: RunFolder) -> None:
    """Raise ConfigError if a run has checkpoints already."""
    if run.steps():
        raise ConfigError(
            f"the run {run.path.name!r} exists already. Resume it with --resume, or give this one "
            "another --name."
        )


def _require_memory(config: RunConfig, request: Request) -> None:
    """Raise ResourceError if a run can never fit into memory."""
    if has_ring("training.reports.memory"):
        device = resolve_device(config.training.device)
        ring("training.reports.memory").require_memory(config, device, request.n_ranks)


def _require_checkpoint(run: RunFolder) -> Pointer:
    latest = run.latest()
    if latest is None and (steps := run.steps()):
        reason = "its checkpoints have weights only."
        try:
            verify(run.step_folder(steps[-1]))
        except CheckpointError as error:
            reason = str(error).replace(" Use another step; if", " If")
        raise CheckpointError(
            f"the run {run.path.name!r} cannot be resumed: {reason} Otherwise start a new run "
            "under another --name."
        )
    if latest is None:
        names = [path.name for path in models_in(ROOT) if RunFolder(path).steps()]
        raise CheckpointError(
            f"the run {run.path.name!r} has no checkpoint to resume from. "
            f"{nearest(run.path.name, names) if names else 'Start one without --resume.'}"
        )
    warn_of_damage(run, latest.step)
    return latest


def _newest_run() -> RunFolder:
    runs = [RunFolder(path) for path in models_in(ROOT)]
    latest = {run: pointer for run in runs if (pointer := run.latest())}
    if not latest:
        raise CheckpointError(
            f"there is no run to resume in {str(ROOT)!r}. Start one without --resume."
        )
    return max(latest, key=lambda run: latest[run].folder.stat().st_mtime_ns)


def _require_same(saved: RunConfig, overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that --resume cannot change, and that differs."""
    before = flat(to_dict(saved))
    for key, value in flat(overrides).items():
        is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)
        is_fixed |= key == "data.val" and not saved.data.val
        is_known = key in before or key in _FIXED  # the others are refused with the nearest one
        if is_fixed and is_known and before.get(key) != value:
            raise ConfigError(
                f"--resume cannot change {key}: it is {cut(before.get(key))} in this run, not "
                f"{cut(value)}. Leave it out, or start a new run under another --name."
            )


def _other_text(saved: RunConfig, overrides: Mapping[str, Any]) -> DataError:
    """Return the error for a text that is not the run's, with what reads it differently."""
    before = flat({"data": to_dict(saved.data)})
    for key, value in flat({"data": overrides.get("data", {})}).items():
        if before.get(key) != value:
            was = "the default" if key not in before else cut(before[key])
            return DataError(
                f"the corpus is not the one that this run started with: {key} is {was} in this "
                f"run, not {cut(value)}. Leave it out, or start a new run under another --name."
            )
    return DataError(
        "the corpus is not the one that this run started with: the text of "
        f"{', '.join(map(repr, saved.data.paths)) or 'the built-in corpus'} has changed. Give the "
        "same text as DATA, or start a new run under another --name."
    )


def _lifted_limit(saved: RunConfig, config: RunConfig, data: PreparedData) -> list[str]:
    """Return a line if a resumed run will read its text more often than its limit allowed."""
    epochs, budget = saved.training.max_epochs, config.training
    if not epochs or budget.max_epochs:
        return []
    n_tokens = len(data.tokens.split(config.data.val_fraction)[0])
    limit = with_max_steps(replace(saved, training=replace(saved.training, max_steps=0)), n_tokens)
    n_steps = limit.training.max_steps
    if 0 < budget.max_steps <= n_steps:
        return []
    wanted = f"--max-steps {budget.max_steps}" if budget.max_steps else "--max-minutes"
    return [
        f"{wanted} lifts this run's limit of {epochs:.3g} epochs ({n_steps} steps): "
        f"--max-epochs {epochs:.3g} keeps it"
    ]


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
    own = prepared_settings(config.data.paths)
    return merge(settings, {"data": own}, {"data": overrides.get("data", {})})


def with_split(config: RunConfig, data: PreparedData) -> RunConfig:
    """Return the config with the split of the text, so that a resumed run has the same."""
    kind = data.manifest.val_split
    if kind == "own":
        return config
    split: Literal["documents", "tail"] = "documents" if kind == "documents" else "tail"
    return replace(config, data=replace(config.data, val_split=split))


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
    return replace(config, model=canonical(config.model))


def suited_to_text(
    config: RunConfig, overrides: Mapping[str, Any], data: PreparedData
) -> RunConfig:
    """Set what depends on the size of the text, such as dropout, where the user gives no value."""
    n_train_tokens = len(data.tokens.split(config.data.val_fraction)[0])
    step_tokens = config.training.batch_size * config.sequence_length
    suited = for_text(max(n_train_tokens, 1), parameter_count(config.model), step_tokens)
    if given(overrides, "model", "dropout") is not None:
        suited["training"].pop("dropout_start", None)  # the user's dropout begins at once
    own = {
        table: {key: value for key, value in values.items() if given(overrides, table, key) is None}
        for table, values in suited.items()
    }
    return build(RunConfig, merge(to_dict(config), own))


def one_budget(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Drop the preset's or run's limits if the user gives any limit."""
    if all(given(overrides, "training", name) is None for name in _LIMITS):
        return dict(overrides)
    return merge({"training": _LIMITS}, overrides)


def one_lr(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Use the user's learning rate for embeddings too, unless they have one."""
    lr = given(overrides, "training", "lr")
    return merge({} if lr is None else {"training": {"embedding_lr": lr}}, overrides)


def given(overrides: Mapping[str, Any], table: str, name: str) -> Any:
    """Return the user's value of a setting; None if there is none."""
    values = overrides.get(table)
    return values.get(name) if isinstance(values, Mapping) else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names, as in ``--set``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        is_table = isinstance(value, Mapping)
        result |= flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}": value}
    return result


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
