"""Output of minigpt claims: tables, verdicts, JSON and pictures."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigpt import figures
from minigpt.commands import tables
from minigpt.files import make_folder, resource_errors, write_atomically
from minigpt.studies.claims.study import Finding, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANEL_INCHES = (5.0, 3.6)
_COLOURS = {"lstm": "#cb4b16", "lstm-attention": "#2aa198", "gpt": "#4c6bc6"}


def prepare_folder(folder: Path) -> None:
    """Create the folder for pictures, and check that they can be drawn.

    Raises: ConfigError if matplotlib is not installed.
    """
    with resource_errors(folder):
        make_folder(folder)
    figures.require_matplotlib(folder / "claims.svg", what="--out")


def record(finding: Finding) -> dict[str, Any]:
    """Return a finding for JSON: the fields of the verdict, and ``measured``."""
    return {
        **asdict(finding.verdict),
        "elapsed_s": finding.elapsed_s,
        "measured": [asdict(one) for one in finding.measured],
    }


def show_finding(finding: Finding, *, as_json: bool) -> None:
    """Write a finding to stdout: a table and the verdict, or a line of JSON."""
    if as_json:
        tables.write_json(record(finding))
        return
    sides = ["left"] + ["right"] * (len(finding.table[0]) - 1)
    tables.show(tables.aligned([[Text(cell) for cell in row] for row in finding.table], sides))
    verdict = finding.verdict
    tables.show([Text(f"{verdict.claim}: {verdict.outcome}", style="bold")])
    width = tables.line_width() or max(map(len, verdict.reasons), default=0) + 2
    lines = (wrap(f"- {reason}", width, subsequent_indent="  ") for reason in verdict.reasons)
    tables.show([*map(Text, chain.from_iterable(lines)), Text()])


def write_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Write all findings to claims.json, one per line, and the picture of the last one."""
    lines = "".join(json.dumps(record(finding)) + "\n" for finding in findings)
    write_atomically(folder / "claims.json", lines.encode())
    last = findings[-1]
    if last.panels:
        figures.write_figure(folder / f"{last.verdict.claim}.svg", lambda: _draw(last.panels))


def _draw(panels: Sequence[Panel]) -> "Figure":
    from matplotlib.figure import Figure

    width, height = _PANEL_INCHES
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        named = set()
        for arch, x, y in panel.lines:
            label = arch if arch not in named else None  # one legend entry for all seeds
            named.add(arch)
            axes.plot(x, y, "o-", color=_COLOURS[arch], label=label, markersize=4)
        if panel.guess is not None:
            axes.axhline(panel.guess, color="gray", linestyle=":")
        axes.set_xscale("log", base=2)
        ticks = panel.lines[0][1]
        axes.set_xticks(ticks, [str(x) for x in ticks])
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        if panel.guess is None:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 102)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure
