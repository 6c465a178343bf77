"""minigpt plot; the command's docstring is its --help."""

from pathlib import Path
from typing import Annotated

from minigpt.commands.options import Json, Option, XAxis, argument, command


@command
def plot(
    runs: Annotated[
        list[str] | None, argument("RUN", "Names of runs, or their folders [the newest run]")
    ] = None,
    *,
    x: Annotated[XAxis, Option("Unit of the x axis", "Output")] = "steps",
    out: Annotated[
        Path | None, Option("Write a picture, .svg or .png", "Output", shown="a chart as text")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plot the loss curves of runs.

    A line shows the loss of each batch, marks show the validation loss, both in nats/token, against
    steps, tokens or seconds of training. The first twentieth of a curve may be cut off at the top.
    A run that is still training is drawn up to its last logged step.

    --out needs matplotlib: pip install 'minigpt-attention[plot]'. --json prints all points, one
    line per run.
    """
    from minigpt import console
    from minigpt.commands import tables
    from minigpt.commands.plot import curves
    from minigpt.figures import require_matplotlib
    from minigpt.training.reports.curves import find_run, read_curves

    if out is not None:
        require_matplotlib(out, curves.PICTURES, what="--out")
        console.outlive_reader()
    folders = [find_run(run) for run in runs] if runs else [find_run(None)]
    found = [read_curves(folder) for folder in dict.fromkeys(folders)]
    if len({one.tokenizer for one in found}) > 1:
        console.note("the runs have different tokenizers: compare bits/byte, not nats/token.")
    if as_json:
        for one in found:
            tables.write_json(curves.record(one))
    if out is not None:
        curves.write_picture(out, curves.plotted_runs(found, x), x_unit=x)
        console.note(f"wrote {out}")
    elif not as_json:
        curves.show_chart(found, x)
