"""minigpt compare after option parsing: train the runs one after another, print a table."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from minigpt.checkpoint.folder import CONFIG_FILE
from minigpt.commands.compare import ComparisonConfig
from minigpt.commands.options import XAxis
from minigpt.commands.plot.curves import PICTURES, validation_curves, write_picture
from minigpt.commands.process import command_line, with_text_again
from minigpt.commands.tables import aligned, line_width, show, write_json
from minigpt.commands.train.display import TrainingDisplay
from minigpt.commands.train.job import (
    LIMITS,
    Job,
    checked_name,
    fresh_names,
    notes_on,
    settings_of,
    with_vocabulary,
)
from minigpt.commands.train.run import train_job
from minigpt.config import DataConfig, RunConfig
from minigpt.console import note, outlive_reader
from minigpt.errors import ConfigError, DivergedError
from minigpt.figures import require_matplotlib
from minigpt.format import short
from minigpt.model.cost import parameter_count
from minigpt.model.device import resolve_device
from minigpt.rings import find_ring
from minigpt.settings import build, flat, given, read_toml, to_dict
from minigpt.studies.compare import (
    Budget,
    ComparedRun,
    VariantResult,
    compared_runs,
    decoding_speeds,
    parse_budget,
    parse_variants,
    summarize,
)
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.reports.curves import LossCurves, read_curves
from minigpt.training.reports.memory import require_memory
from minigpt.training.run import resolve_for_text
from minigpt.training.schedule import progress, with_max_steps
from minigpt.training.state import read_state

_TITLE = (
    "val loss: nats/token, mean ± sample standard deviation over the runs;",
    "train, decode: tokens/s; cache: bytes/token in float32",
)
_HEAD = ("variant", "params", "runs", "val loss", "bits/byte", "train", "decode", "cache")
_NOT_SETTINGS = {
    "from": "compare trains from random weights",
    "model.arch": "compare takes it from --variants",
    "model.attention": "compare takes it from --variants",
    "training.patience": "all runs of a comparison have the same budget",
}
_MIN_EVALUATIONS = 10  # of a run with a known number of steps


def run_comparison(config: ComparisonConfig, overrides: dict[str, Any], *, is_json: bool) -> None:
    """Train the unfinished runs, and print the results.

    Raises: ConfigError for invalid settings, or if a run exists with other settings; others as
        in ``train_job``.
    """
    if config.out is not None:
        require_matplotlib(config.out, PICTURES, what="--out")
        outlive_reader()
    base, budget, runs, data = _planned(config, overrides)
    signal_number = _train(runs, data)
    finished = [run for run in runs if _is_finished(run)]
    if finished:
        # After Ctrl-C, nothing more is measured.
        speeds = {} if signal_number else _decoding_speeds(finished, base, data)
        results = summarize(finished, speeds)
        if is_json:
            is_complete = len(finished) == len(runs)
            write_json(_record(base, budget, results, is_complete=is_complete))
        else:
            show(_table(results))
        if config.out is not None:
            _draw(config.out, config.x, finished)
            note(f"wrote {config.out}")
    if signal_number:
        note(f"{len(finished)} of {len(runs)} runs are finished. Resume with:")
        note(with_text_again(command_line(*sys.argv[1:]), base.data))
        raise typer.Exit(128 + signal_number)


def _planned(
    config: ComparisonConfig, overrides: dict[str, Any]
) -> tuple[RunConfig, Budget, list[ComparedRun], PreparedData]:
    """Return the base model's settings, the budget of a run, the runs and the text."""
    asked = flat(overrides)
    for setting, reason in _NOT_SETTINGS.items():
        if asked.get(setting) is not None:
            raise ConfigError(f"{setting} is {asked[setting]!r}, but {reason}. Leave it out.")
    variants = parse_variants(config.variants)
    settings = settings_of(overrides)
    data_config = build(DataConfig, settings.get("data", {}), "data.")
    # The prefix itself is not the name of a run, so the derived prefix is always the same.
    name = config.name
    name = next(fresh_names(data_config, "compare")) if name is None else checked_name(name)
    with TrainingDisplay() as display:
        data = prepare(data_config, on_progress=display.preparing)
    base = with_vocabulary(settings, data.tokenizer.vocab_size)
    if overfitting := find_ring("training.overfitting"):
        base = overfitting.with_text_settings(base, overrides, data)
    notes = [*notes_on(base, overrides), *_without_effect(config.budget, overrides)]
    base = replace(base, data=data.manifest.with_split(base.data))
    base = replace(base, training=replace(base.training, patience=0.0))
    if not base.data.val_fraction:
        raise ConfigError("compare sorts by validation loss: val_fraction must not be 0.")
    base = with_max_steps(base, len(data.tokens.split(base.data.val_fraction)[0]))
    budget = parse_budget(config.budget, base)
    runs = compared_runs(base, variants, config.seeds, budget, name)
    if given(overrides, "training", "eval_every") is None:
        runs = [replace(run, config=_evaluated_often(run.config)) for run in runs]
    # As the trainer saves them, so that the same command finds the same settings again.
    runs = [replace(run, config=resolve_for_text(run.config, data)[0]) for run in runs]
    for run in runs:
        checked_name(run.folder.path.name)
        require_memory(run.config, resolve_device(run.config.training.device))
        _require_same(run, data)
    for line in notes:  # not beside an error
        note(f"note   {line}")
    return base, budget, runs, data


def _without_effect(budget: str, overrides: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each given setting that a comparison does not use."""
    # Without a number, steps and flops are those of the given steps or epochs.
    is_own = ":" in budget or budget == "seconds"
    for name in LIMITS if is_own else ("max_minutes",):
        if given(overrides, "training", name):
            yield f"training.{name} has no effect, because --budget {budget} is the only limit"
    if given(overrides, "training", "shard"):
        yield "training.shard has no effect, because compare trains in one process"


def _evaluated_often(config: RunConfig) -> RunConfig:
    """Return the config with enough evaluations for a curve, even in a short run."""
    training = config.training
    every = max(1, training.max_steps // _MIN_EVALUATIONS)
    if not training.max_steps or 0 < (training.eval_every or 0) <= every:
        return config
    return replace(config, training=replace(training, eval_every=every))


def _require_same(run: ComparedRun, data: PreparedData) -> None:
    """Raise ConfigError if a run of this name has other settings or another text."""
    if not run.folder.steps():
        return
    remedy = "Use the settings that it started with, or another --name."
    before, after = (flat(to_dict(config)) for config in (_saved(run), run.config))
    for key in before | after:
        # The text may have moved; its tokens are compared below.
        if key not in ("command", "data.paths") and before.get(key) != after.get(key):
            raise ConfigError(
                f"the run {run.folder.path.name!r} exists with another {key}: "
                f"{before.get(key)!r}, not {after.get(key)!r}. {remedy}"
            )
    latest = run.folder.latest()  # None if the run diverged and left only its best weights
    if latest and read_state(latest.folder).corpus != data.tokens.fingerprint:
        raise ConfigError(f"the run {run.folder.path.name!r} exists with another text. {remedy}")


def _saved(run: ComparedRun) -> RunConfig:
    return build(RunConfig, read_toml(run.folder.path / CONFIG_FILE))


def _is_finished(run: ComparedRun) -> bool:
    latest = run.folder.latest()
    if latest is None:
        return False
    done = read_state(latest.folder)
    return progress(run.config.training, done.step, done.elapsed_s) >= 1


def _train(runs: Sequence[ComparedRun], data: PreparedData) -> int:
    """Train the unfinished runs; return the number of the signal that stopped them, or 0."""
    for number, run in enumerate(runs, start=1):
        with run.folder.lock():
            if _is_finished(run):
                continue
            latest = run.folder.latest(hashes=True)
            command = _saved(run).command if latest else command_line(*sys.argv[1:])
            config = replace(run.config, command=command)
            job = Job(config, data, run.folder, resume_from=latest.folder if latest else None)
            with TrainingDisplay() as display:
                display.note(f"run {number} of {len(runs)}: {run.variant}, seed {run.seed}")
                try:
                    _, signal_number = train_job(job, display)
                except DivergedError as error:
                    raise DivergedError(
                        f"{run.folder.path.name!r}: {error} Set it with --set training.lr=N "
                        f"and another --name, or leave {run.variant} out of --variants."
                    ) from None
                display.finish()
        if signal_number:
            return signal_number
    return 0


def _decoding_speeds(
    finished: Sequence[ComparedRun], base: RunConfig, data: PreparedData
) -> dict[str, float]:
    """Measure the latest checkpoint of the first finished run of each variant."""
    folders: dict[str, Path] = {}
    for run in finished:
        latest = run.folder.latest()
        assert latest is not None, "a finished run has a checkpoint"
        folders.setdefault(run.variant, latest.folder)
    _, val_tokens = data.tokens.split(base.data.val_fraction)
    n_prompt = min(len(val_tokens), base.model.context_length)
    prompt = val_tokens.first_ids(n_prompt)
    return decoding_speeds(folders, prompt, resolve_device(base.training.device).type)


def _record(
    base: RunConfig, budget: Budget, results: Sequence[VariantResult], *, is_complete: bool
) -> dict[str, Any]:
    """Return the results for JSON. Args: is_complete, whether all runs are finished."""
    return {
        "data": list(base.data.paths),
        "tokenizer": base.data.tokenizer,
        "preset": base.preset,
        "budget": asdict(budget),
        "n_parameters_wanted": parameter_count(base.model),
        "spread": "sample standard deviation over the runs",
        "is_complete": is_complete,
        "variants": [asdict(result) for result in results],
    }


def _table(results: Sequence[VariantResult]) -> Iterator[Text]:
    """Yield the title and the lines of the table."""
    yield from (Text(line, "dim") for line in _TITLE)
    rows = [[Text(word, "dim") for word in _HEAD]]
    rows += [[Text(cell) for cell in _cells(result)] for result in results]
    sides = ["left"] + ["right"] * (len(_HEAD) - 1)
    yield from aligned(rows, sides, line_width())


def _cells(result: VariantResult) -> Iterator[str]:
    """Yield the cells of a row of the table."""
    spread, decode = result.val_loss_spread, result.decode_tokens_per_s
    yield result.variant
    yield short(result.n_parameters)
    yield str(len(result.runs))
    yield f"{result.val_loss:.4f}" + ("" if spread is None else f" ± {spread:.4f}")
    yield f"{result.bits_per_byte:.4f}"
    yield short(result.train_tokens_per_s)
    yield "-" if decode is None else short(decode)
    yield f"{result.cache_bytes_per_token:,}"


def _draw(path: Path, x_unit: XAxis, finished: Sequence[ComparedRun]) -> None:
    """Draw the validation losses, a line for each run."""
    groups: dict[str, list[LossCurves]] = {}
    for run in finished:
        groups.setdefault(run.variant, []).append(read_curves(run.folder.path))
    label = "validation loss, nats/token (a line for each run)"
    write_picture(path, validation_curves(groups, x_unit), x_unit=x_unit, y_label=label)
