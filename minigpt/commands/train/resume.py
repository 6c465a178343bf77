"""minigpt train --resume: continue a run from its latest checkpoint."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minigpt.checkpoint.folder import CONFIG_FILE, Pointer, RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import read_model
from minigpt.checkpoint.resolve import ROOT, models_in, names_in, newest_run
from minigpt.commands.train.job import (
    Job,
    Request,
    checked_name,
    notes_on,
    one_budget,
    require_memory,
)
from minigpt.config import DataConfig, RunConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, cut, nearest
from minigpt.format import count
from minigpt.rings import find_ring, ring
from minigpt.settings import build, flat, given, merge, read_toml, to_dict
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.schedule import lr_scale, steps_of_max_epochs
from minigpt.training.state import MAX_LR_RISE, computed_on, read_state
from minigpt.training.trainer import Trainer

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
    "training.eval_tokens",  # the losses of its checkpoints are compared
)


@contextmanager
def resumed_job(request: Request) -> Iterator[Job]:
    """Resume a run in checkpoints/ from its latest checkpoint.

    Raises: CheckpointError if there is none; ConfigError for a setting that cannot change.
    """
    name = request.name
    names = names_in(ROOT)
    for path in given(request.overrides, "data", "paths") or ():
        if not os.path.lexists(path) and path in names:
            raise ConfigError(f"{path!r} is a run, not a text. Resume it with --name {path}.")
    if name is not None and name not in names:  # a run may have been renamed
        checked_name(name)
    run = _newest_run() if name is None else RunFolder(ROOT / name)
    _require_checkpoint(run, hashes=False)
    with request.lock(run):
        saved = _saved_config(run)
        _require_same(saved, request.overrides)  # checked before settings that depend on each other
        is_tuned, overrides = saved.from_ is not None, request.overrides
        if is_tuned:
            overrides = ring("commands.train.finetune").one_lr(overrides)
        config = build(RunConfig, merge(to_dict(saved), one_budget(overrides)))
        notes = notes_on(config, overrides)
        require_memory(config, request)
        # With a changed byte, training would continue but not end with the same bits.
        latest = _require_checkpoint(run, hashes=True)
        data = _prepare_again(request, run, saved, config.data, latest.folder)
        carried = ring("checkpoint.carried").read_carried(latest.folder) if is_tuned else None
        notes += _lifted_limit(saved, config, data)
        yield Job(config, data, run, resume_from=latest.folder, carried=carried, notes=notes)


def _saved_config(run: RunFolder) -> RunConfig:
    """Read the settings of a run.

    Raises: CheckpointError if they are missing, damaged, or of another version of minigpt.
    """
    try:
        settings = read_toml(run.path / CONFIG_FILE)
        if given(settings, "data", "val") is None:  # saved before other splits existed
            settings = merge(settings, {"data": {"val_split": "tail"}})
        return build(RunConfig, settings)
    except ConfigError as error:
        name = run.path.name
        raise CheckpointError(
            f"the run {name!r} cannot be resumed: {error} Restore its config.toml, or start a "
            f"new run from its weights with --from {name}."
        ) from None


def _prepare_again(
    request: Request, run: RunFolder, saved: RunConfig, text: DataConfig, checkpoint: Path
) -> PreparedData:
    """Prepare the text of a resumed run.

    Raises: DataError if it cannot be read, or is not the one that the run started with.
    """
    settings = to_dict(text)
    settings.pop("chat_template", None)  # the checkpoint has it
    # The model that a run was fine-tuned from may be gone; the checkpoint has its tokenizer.
    tokenizer = read_model(checkpoint).tokenizer if saved.from_ is not None else None
    try:
        data = prepare(
            build(DataConfig, settings),
            on_progress=request.on_progress,
            tokenizer=tokenizer,
            chat_model=checkpoint,
        )
    except DataError as error:
        names = (fixed.rpartition(".")[2].replace("_", "-") for fixed in _FIXED)
        if any(f"--{name}" in str(error) for name in names):  # its remedy would be refused
            raise _other_text(run, saved, request.overrides) from error
        if given(request.overrides, "data", "paths"):
            raise
        raise DataError(f"the run's own text: {error} If it has moved, give DATA.") from None
    if read_state(checkpoint).corpus != data.tokens.fingerprint:
        raise _other_text(run, saved, request.overrides)
    return data


def _require_checkpoint(run: RunFolder, *, hashes: bool) -> Pointer:
    latest = run.latest(hashes=hashes)
    if latest is None and (steps := run.steps()):
        reason = "its checkpoints have weights only."
        try:
            verify(run.step_folder(steps[-1]), hashes=hashes)
        except CheckpointError as error:
            reason = str(error).partition(" Use another step")[0]
        raise CheckpointError(
            f"the run {run.path.name!r} cannot be resumed: {reason} Start a new run under another "
            f"--name; --from {run.path.name} starts it from these weights if they are intact."
        )
    if latest is None:
        names = [path.name for path in models_in(ROOT) if RunFolder(path).steps()]
        remedy = nearest(run.path.name, names) if names else "Start one without --resume."
        if (run.path / CONFIG_FILE).exists():  # it ended before its first checkpoint
            remedy = "Start it again without --resume."
        raise CheckpointError(
            f"the run {run.path.name!r} has no checkpoint to resume from. {remedy}"
        )
    if refusals := find_ring("checkpoint.tools.refusals"):
        refusals.warn_of_damage(run, latest.step, hashes=hashes)
    return latest


def _newest_run() -> RunFolder:
    if run := newest_run():
        return RunFolder(run)
    raise CheckpointError(
        f"there is no run to resume in {str(ROOT)!r}. Start one without --resume."
    )


def _require_same(saved: RunConfig, overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that --resume cannot change, and that differs."""
    before = flat(to_dict(saved))
    for key, value in flat(overrides).items():
        is_fixed = any(key == fixed or key.startswith(f"{fixed}.") for fixed in _FIXED)
        is_fixed |= key == "data.val" and not saved.data.val
        is_known = key in before or key in _FIXED  # unknown ones are refused with the nearest one
        if is_fixed and is_known and before.get(key) != value:
            raise ConfigError(
                f"--resume cannot change {key}: it is {cut(before.get(key))} in this run, not "
                f"{cut(value)}. Leave it out, or start a new run under another --name."
            )


def _other_text(run: RunFolder, saved: RunConfig, overrides: Mapping[str, Any]) -> DataError:
    """Return the error for a text that is not the run's, naming a setting that changes it."""
    before = flat({"data": to_dict(saved.data)})
    other = f"the corpus is not the one that the run {run.path.name!r} started with:"
    for key, value in flat({"data": overrides.get("data", {})}).items():
        if before.get(key) != value:
            was = "the default" if key not in before else cut(before[key])
            return DataError(
                f"{other} {key} is {was} in this run, not {cut(value)}. Leave it out, or start a "
                "new run under another --name."
            )
    text = ", ".join(map(repr, saved.data.paths)) or "the built-in corpus"
    return DataError(
        f"{other} the text of {text} has changed. Give the same text as DATA, or start a new run "
        "under another --name."
    )


def _lifted_limit(saved: RunConfig, config: RunConfig, data: PreparedData) -> list[str]:
    """Return a line if a resumed run will train for more epochs than its limit allowed."""
    epochs, budget = saved.training.max_epochs, config.training
    if not epochs or budget.max_epochs:
        return []
    n_steps = steps_of_max_epochs(saved, len(data.tokens.split(config.data.val_fraction)[0]))
    if 0 < budget.max_steps <= n_steps:
        return []
    wanted = f"--max-steps {budget.max_steps}" if budget.max_steps else "--max-minutes"
    limits = f"{count(epochs, 'epoch')} ({count(n_steps, 'step')})"
    return [f"{wanted} lifts this run's limit of {limits}: --max-epochs {epochs:.3g} keeps it"]


def resumed_notes(trainer: Trainer) -> Iterator[str]:
    """Yield how a resumed run differs from an uninterrupted one."""
    training, seam = trainer.config.training, trainer.seam
    if trainer.moved_from is not None:
        yield (
            f"saved on {trainer.moved_from}, and resumed on {computed_on(trainer)}: the run "
            "continues, but rounds differently from here on"
        )
    is_limited = lr_scale(training, trainer.progress) > trainer.lr_scale
    if seam and seam.step == trainer.step and is_limited:
        yield (
            f"the learning rate rises from {training.lr * seam.lr_scale:.1e} by at most "
            f"{MAX_LR_RISE - 1:.0%} per step until it reaches the new budget's schedule"
        )
