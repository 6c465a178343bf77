"""minigpt plot; the docstring of the command is its --help."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt.commands import options

_X_AXES = ("steps", "tokens", "seconds")


def plot(
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Names of runs, or their folders [the newest run]",
            show_default=False,
        ),
    ] = None,
    x: Annotated[
        str | None, options.choice("--x", _X_AXES, group="Output", default="steps")
    ] = None,
    out: Annotated[
        str | None,
        options.option(
            "--out",
            "Write a picture, .svg or .png",
            group="Output",
            metavar="FILE",
            default="a chart of text",
        ),
    ] = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Draw the loss curves of runs.

    A line for the loss of each batch, marks for the loss over the validation text, both in
    nats/token, against steps, tokens or seconds of training. The first twentieth of a curve may
    leave the chart at its top. A run that is being trained is drawn as far as it is.

    --out needs matplotlib (the extra plot). --json prints every point, a line for each run.
    """
    from minigpt.commands import output
    from minigpt.commands.plot.curves import curves_to_draw, record, show_chart
    from minigpt.commands.plot.picture import require_matplotlib, write_picture
    from minigpt.training.reports.curves import find_run, read_curves

    axis = x or _X_AXES[0]
    if out is not None:
        require_matplotlib(Path(out))
    folders = [find_run(run) for run in runs] if runs else [find_run(None)]
    found = [read_curves(folder) for folder in dict.fromkeys(folders)]
    if len({one.tokenizer for one in found}) > 1:
        output.note("the runs have different tokenizers: bits/byte compare, nats/token do not.")
    if as_json:
        for one in found:
            output.write_json(record(one))
    if out is not None:
        write_picture(Path(out), curves_to_draw(found, axis), x_unit=axis)
        output.note(f"wrote {out}")
    elif not as_json:
        show_chart(found, axis)
