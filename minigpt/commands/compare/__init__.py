"""minigpt compare; the command's docstring is its --help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from minigpt.commands.options import (
    Assignments,
    ConfigFile,
    Data,
    Fields,
    Json,
    Preset,
    XAxis,
    command,
)
from minigpt.config import RunConfig
from minigpt.fields import Checked, option
from minigpt.presets import default_run
from minigpt.settings import layered, read_config_file
from minigpt.studies import VARIANTS


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig(Checked):
    """Variants, seeds, budget and output of a comparison."""

    variants: str = option(
        "scaled_dot,additive,general,lstm",
        metavar="NAME,NAME",
        text=f"Variants: {', '.join(VARIANTS)}",
    )
    """Names of the variants, separated by commas."""
    budget: str = option("steps", metavar="NAME:N", shown="the preset's steps")
    """Budget of each run: steps, seconds or flops, as in seconds:60."""
    seeds: int = option(3, "[1, 1000]")
    """Number of runs per variant."""
    name: str | None = option(None, metavar="NAME", shown="from the text")
    """Prefix of the runs' names in checkpoints/."""
    x: XAxis = option("steps", group="Output")
    """Unit of the x axis."""
    out: Path | None = option(None, group="Output")
    """Draw the validation losses, .svg or .png."""


@command
def compare(
    data: Data = None,
    *,
    comparison: ComparisonConfig,
    preset: Preset = None,
    config: ConfigFile = None,
    set_: Assignments = None,
    settings: Annotated[
        dict[str, Any],
        Fields(
            RunConfig,
            only=(
                *("data.tokenizer", "data.format", "data.field", "data.encoding", "data.skip_bad"),
                *("data.val_fraction", "data.val_split", "data.val"),
                *("training.seed", "training.device", "training.dtype"),
            ),
            group="Run",
            defaults=default_run(),
        ),
    ],
    as_json: Json = False,
) -> None:
    """Compare attention scores and recurrent models.

    Trains each variant with each seed, on the same text in the same order, and prints a table
    sorted by validation loss. All have as many parameters as the preset, within 3%: the width of
    the MLP, or of the entire LSTM, is chosen to match. All other settings are the same.

    --budget is per run: optimizer steps, seconds of training, or floating-point operations as
    minigpt counts them. Without :N, it is the preset's steps (or those of the epoch limit for a
    small text, if fewer), or 60 seconds. Dropout and weight averaging are those that `train`
    chooses for a text of this size; no run stops early.

    Each run is a training run in checkpoints/NAME-VARIANT-sSEED. Ctrl-C saves a checkpoint; the
    same command resumes, and more seeds or variants add runs.

    --out needs matplotlib: pip install 'minigpt-attention[plot]'.
    """
    from minigpt.commands.compare.run import run_comparison

    overrides = layered(read_config_file(config), settings, data, preset, set_)
    run_comparison(comparison, overrides, is_json=as_json)
