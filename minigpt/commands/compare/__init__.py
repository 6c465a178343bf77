"""minigpt compare; the command's docstring is its --help."""

from pathlib import Path
from typing import Annotated, Any

from minigpt.commands.options import (
    Assignments,
    ConfigFile,
    Data,
    Fields,
    Json,
    Option,
    Preset,
    XAxis,
    command,
    layered,
)
from minigpt.config import ARCHS, ATTENTIONS, RunConfig
from minigpt.presets import default_run


@command
def compare(
    data: Data = None,
    *,
    variants: Annotated[
        str,
        Option(
            f"Variants: {', '.join(ATTENTIONS)}, {', '.join(list(ARCHS)[1:])}",
            "Comparison",
            metavar="NAME,NAME",
        ),
    ] = "scaled_dot,additive,general,lstm",
    budget: Annotated[
        str,
        Option(
            "Budget of each run: steps, seconds or flops, as in seconds:60",
            "Comparison",
            metavar="NAME:N",
            shown="the preset's steps",
        ),
    ] = "steps",
    seeds: Annotated[
        int, Option("Number of runs per variant", "Comparison", bounds="[1, inf)")
    ] = 3,
    name: Annotated[
        str | None,
        Option(
            "Prefix of the runs' names in checkpoints/",
            "Comparison",
            metavar="NAME",
            shown="from the text",
        ),
    ] = None,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    settings: Annotated[
        dict[str, Any],
        Fields(
            RunConfig,
            only=("data.tokenizer", "training.seed", "training.device", "training.dtype"),
            group="Run",
            defaults=default_run(),
        ),
    ],
    x: Annotated[XAxis, Option("Unit of the x axis", "Output")] = "steps",
    out: Annotated[
        Path | None, Option("Draw the validation losses, .svg or .png", "Output")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare attention scores and recurrent models.

    Trains each variant with each seed, on the same text in the same order, and prints a table
    sorted by validation loss. All have as many parameters as the preset, within 3 %: the width of
    the MLP, or of a whole LSTM, is chosen to match. All other settings are the same.

    --budget is per run: optimizer steps, seconds of training, or floating-point operations as
    minigpt counts them. Without :N, it is the steps of the preset, or 60 seconds.

    Each run is a training run in checkpoints/NAME-VARIANT-sSEED. Ctrl-C saves; the same command
    resumes, and with more seeds or variants adds their runs.
    """
    from minigpt.commands.compare.run import Wanted, run_comparison

    overrides = layered(config, settings, data, preset, set_)
    wanted = Wanted(variants=variants, budget=budget, n_seeds=seeds, name=name, overrides=overrides)
    run_comparison(wanted, x_axis=x, out=out, is_json=as_json)
