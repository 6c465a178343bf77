"""minigpt compare; the docstring of the command is its --help."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt.commands import options
from minigpt.config import ARCHS, ATTENTIONS, DEVICES, DTYPES
from minigpt.errors import ConfigError
from minigpt.presets import PRESETS
from minigpt.settings import merge, parse_assignment, read_toml

_X_AXES = ("steps", "tokens", "seconds")
_VARIANTS = "scaled_dot,additive,general,lstm"
_N_SEEDS = 3


def compare(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="As of train: files, folders, globs, - or shakespeare [the English prose in "
            "Python]",
            show_default=False,
        ),
    ] = None,
    variants: Annotated[
        str | None,
        options.option(
            "--variants",
            f"{', '.join(ATTENTIONS)}, {', '.join(ARCHS[1:])}",
            group="Comparison",
            metavar="NAME,NAME",
            default=_VARIANTS,
        ),
    ] = None,
    budget: Annotated[
        str | None,
        options.option(
            "--budget",
            "Of a run: steps, seconds or flops, as in seconds:60",
            group="Comparison",
            metavar="NAME:N",
            default="steps, of the preset",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        options.number("--seeds", int, "Runs of a variant", group="Comparison", default=_N_SEEDS),
    ] = None,
    name: Annotated[
        str | None,
        options.option(
            "--name",
            "How the runs' names begin in checkpoints/",
            group="Comparison",
            metavar="NAME",
            default="of data",
        ),
    ] = None,
    preset: Annotated[
        str | None, options.choice("--preset", tuple(PRESETS), group="Runs", default="nano")
    ] = None,
    config: Annotated[
        str | None,
        options.option("--config", "Settings from a TOML file", group="Runs", metavar="FILE"),
    ] = None,
    set_: Annotated[
        list[str] | None,
        options.option(
            "--set",
            "Any setting, as in model.d_mlp=512; repeat",
            group="Runs",
            metavar="NAME=VALUE",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        options.option(
            "--tokenizer", "As of train", group="Runs", metavar="NAME", default="of the preset"
        ),
    ] = None,
    seed: Annotated[
        int | None,
        options.number("--seed", int, "Of the first run of each", group="Runs", default=1337),
    ] = None,
    device: Annotated[
        str | None, options.choice("--device", DEVICES, group="Runs", default="auto")
    ] = None,
    dtype: Annotated[
        str | None, options.choice("--dtype", DTYPES, group="Runs", default="auto")
    ] = None,
    x: Annotated[
        str | None, options.choice("--x", _X_AXES, group="Output", default="steps")
    ] = None,
    out: Annotated[
        str | None,
        options.option(
            "--out",
            "Draw the validation losses: .svg or .png",
            group="Output",
            metavar="FILE",
            default="no picture",
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object", rich_help_panel="Output"),
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Compare kinds of attention, and life without it.

    Trains each variant from each seed, on the same text in the same order, and prints a table, the
    least validation loss first. Each has as many parameters as the preset, within 3 %: the MLP, or
    of an lstm all of it, is made as wide as that takes. All other settings are the same.

    --budget is for each run: optimizer steps, seconds of training, or floating-point operations,
    as minigpt counts them. Without :N, it is as many as the preset's steps, or 60 seconds.

    Each run is one of train's, in checkpoints/NAME-VARIANT-sSEED. Ctrl-C saves; the same command
    goes on, and with more seeds or variants adds theirs.
    """
    from minigpt.commands.compare.run import Wanted, run_comparison

    n_seeds = _N_SEEDS if seeds is None else seeds
    if n_seeds < 1:
        raise ConfigError(f"--seeds must be at least 1: it is {n_seeds}.")
    flags: dict[str, Any] = {
        "preset": preset,
        "data": {"paths": data or None, "tokenizer": tokenizer},
        "training": {"seed": seed, "device": device, "dtype": dtype},
    }
    file = read_toml(Path(config)) if config else {}
    overrides = merge(file, _given(flags), *map(parse_assignment, set_ or []))
    wanted = Wanted(
        variants=variants or _VARIANTS,
        budget=budget or "steps",
        n_seeds=n_seeds,
        name=name,
        overrides=overrides,
    )
    run_comparison(wanted, x_axis=x or _X_AXES[0], out=Path(out) if out else None, is_json=json)


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings without those that were left out."""
    kept = {}
    for key, value in values.items():
        value = _given(value) if isinstance(value, dict) else value
        if value is not None and value != {}:
            kept[key] = value
    return kept
