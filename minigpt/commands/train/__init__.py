"""minigpt train; the docstring of the command is its --help."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.commands import options
from minigpt.config import ARCHS, ATTENTIONS, DEVICES, DTYPES, FAMILIES, RunConfig
from minigpt.errors import ConfigError
from minigpt.presets import PRESETS
from minigpt.presets import preset as preset_settings
from minigpt.settings import build, merge, parse_assignment, read_toml

_DEFAULT_PRESET = "nano"
REPORTS = ("tensorboard", "none")
"""Where a run's metrics can go beside its metrics.jsonl."""
_DEFAULTS = build(
    RunConfig, merge(preset_settings(_DEFAULT_PRESET), {"model": {"vocab_size": 257}})
)

# Where each flag's value belongs in RunConfig.
_FLAG_PLACES = {
    "tokenizer": "data",
    "context_length": "model",
    "family": "model",
    "arch": "model",
    "attention": "model",
    "n_layer": "model",
    "n_head": "model",
    "d_model": "model",
    "lr": "training",
    "max_steps": "training",
    "max_minutes": "training",
    "max_epochs": "training",
    "batch_size": "training",
    "seed": "training",
    "device": "training",
    "dtype": "training",
    "on_nan": "training",
    "compile": "training",
    "shard": "training",
    "recompute": "training",
    "eval_every": "training",
    "save_every": "training",
    "sample_every": "training",
}


def _default(flag: str) -> Any:
    name = flag.removeprefix("--").replace("-", "_")
    return getattr(getattr(_DEFAULTS, _FLAG_PLACES[name]), name)


def _number(flag: str, kind: type[int] | type[float], text: str, group: str) -> Any:
    return options.number(flag, kind, text, group=group, default=_default(flag))


def _choice(flag: str, choices: tuple[str, ...], group: str) -> Any:
    return options.choice(flag, choices, group=group, default=_default(flag))


def train(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Files, folders, globs, - for standard input, or shakespeare [the "
            "English prose in Python]",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str | None,
        options.option(
            "--name",
            "Folder in checkpoints/",
            group="Run",
            metavar="NAME",
            default="of data and preset",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        options.choice("--preset", tuple(PRESETS), group="Run", default=_DEFAULT_PRESET),
    ] = None,
    config: Annotated[
        str | None,
        options.option("--config", "Settings from a TOML file", group="Run", metavar="FILE"),
    ] = None,
    from_: Annotated[
        str | None,
        options.option(
            "--from",
            "Model to go on from: a folder, run, or hub name",
            group="Run",
            metavar="PATH",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        options.option(
            "--set",
            "Any setting, as in model.d_mlp=512; repeat",
            group="Run",
            metavar="NAME=VALUE",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with --name, or the newest run", rich_help_panel="Run"
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the plan and train nothing", rich_help_panel="Run"),
    ] = False,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print the plan as JSON", rich_help_panel="Run"),
    ] = False,
    tokenizer: Annotated[
        str | None,
        options.option(
            "--tokenizer",
            "bytes, bpe, bpe:N, gpt2, cl100k_base, o200k_base",
            group="Model",
            metavar="NAME",
            default=_default("--tokenizer"),
        ),
    ] = None,
    context_length: Annotated[
        int | None, _number("--context-length", int, "Tokens that the model sees", "Model")
    ] = None,
    family: Annotated[str | None, _choice("--family", FAMILIES, "Model")] = None,
    arch: Annotated[str | None, _choice("--arch", ARCHS, "Model")] = None,
    attention: Annotated[str | None, _choice("--attention", ATTENTIONS, "Model")] = None,
    n_layer: Annotated[int | None, _number("--n-layer", int, "Blocks", "Model")] = None,
    n_head: Annotated[int | None, _number("--n-head", int, "Query heads", "Model")] = None,
    d_model: Annotated[int | None, _number("--d-model", int, "Width", "Model")] = None,
    max_steps: Annotated[
        int | None, _number("--max-steps", int, "Optimizer steps", "Training")
    ] = None,
    max_minutes: Annotated[
        float | None,
        options.number(
            "--max-minutes", float, "Minutes of training, in place of steps", group="Training"
        ),
    ] = None,
    max_epochs: Annotated[
        float | None,
        options.number(
            "--max-epochs", float, "Passes over the text, in place of steps", group="Training"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, _number("--batch-size", int, "Sequences per step", "Training")
    ] = None,
    lr: Annotated[
        float | None, _number("--lr", float, "Peak learning rate of the matrices", "Training")
    ] = None,
    seed: Annotated[
        int | None, _number("--seed", int, "Of weights, data order and dropout", "Training")
    ] = None,
    device: Annotated[str | None, _choice("--device", DEVICES, "Training")] = None,
    dtype: Annotated[str | None, _choice("--dtype", DTYPES, "Training")] = None,
    on_nan: Annotated[
        str | None,
        options.option(
            "--on-nan",
            "stop, or skip steps that give no number",
            group="Training",
            metavar="NAME",
            default=_default("--on-nan"),
        ),
    ] = None,
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Run through torch.compile [no-compile]",
            show_default=False,
            rich_help_panel="Training",
        ),
    ] = None,
    shard: Annotated[
        bool | None,
        typer.Option(
            "--shard/--no-shard",
            help="With torchrun: part weights among GPUs [no-shard]",
            show_default=False,
            rich_help_panel="Training",
        ),
    ] = None,
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute",
            help="Save memory: run blocks twice [no-recompute]",
            show_default=False,
            rich_help_panel="Training",
        ),
    ] = None,
    eval_every: Annotated[
        int | None, _number("--eval-every", int, "Steps between validation passes", "Reports")
    ] = None,
    save_every: Annotated[
        int | None, _number("--save-every", int, "Steps between checkpoints", "Reports")
    ] = None,
    sample_every: Annotated[
        int | None,
        options.number(
            "--sample-every",
            int,
            "Steps between samples; 0: none",
            group="Reports",
            default="a line at a terminal's evaluations",
        ),
    ] = None,
    report_to: Annotated[
        str | None,
        options.choice(
            "--report-to", REPORTS, group="Reports", default="none; of a resumed run, as before"
        ),
    ] = None,
    debug: options.Debug = False,
) -> None:
    """Train a model from text.

    Writes checkpoints/NAME: a Hugging Face model folder per checkpoint, config.toml and
    metrics.jsonl. Ctrl-C saves and says how to go on.

    Later settings win: preset, --config, options, --set. With --resume, the model, the text, the
    seed, the batch size and the optimizer are the run's own; all else may change.

    With --from, model and tokenizer are what they are there, --context-length is that of the
    training sequences alone, and what is left out suits fine-tuning: AdamW, low rates, few steps.

    torchrun --nproc-per-node N -m minigpt train ... does the same on N GPUs.

    In brackets: what holds if the option is left out, for the preset nano.
    """
    flags = {key: value for key, value in locals().items() if key in _FLAG_PLACES}
    if resume and from_ is not None:
        raise ConfigError(
            "--from starts a run, and --resume goes on with one. Give one of them; a run that "
            "began with --from is resumed without it."
        )
    if json and not dry_run:
        raise ConfigError("--json is for --dry-run. A run's numbers are in its metrics.jsonl.")
    given = {"preset": preset, "from": from_, "data": {"paths": data} if data else None}
    overrides = _overrides(given, flags, config, set_ or [])
    from minigpt.commands.train.run import plan_training, run_training
    from minigpt.training.reports.tensorboard import summary_writer

    if report_to == "tensorboard":
        summary_writer()  # before anything long begins
    if dry_run:
        plan_training(name, overrides, resume=resume, is_json=json)
    else:
        run_training(name, overrides, report_to, resume=resume)


def _overrides(
    given: dict[str, Any], flags: dict[str, Any], config: str | None, assignments: list[str]
) -> dict[str, Any]:
    """Return what the user asked for beyond the preset, nested as in RunConfig."""
    given = {key: value for key, value in given.items() if value is not None}
    file = read_toml(Path(config)) if config else {}
    changes = [parse_assignment(text) for text in assignments]
    has_model = "from" in merge(file, given, *changes)
    for flag, value in flags.items():
        # The context of a model that is there is its own: we choose how much of it to train on.
        is_sequence = flag == "context_length" and has_model
        place = ("training", "sequence_length") if is_sequence else (_FLAG_PLACES[flag], flag)
        if value is not None:
            given.setdefault(place[0], {})[place[1]] = value
    return merge(file, given, *changes)
