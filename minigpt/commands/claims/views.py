"""What minigpt claims shows and writes: a table, a verdict, JSON and pictures of each claim."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from minigpt import figures
from minigpt.commands import output
from minigpt.files import write_atomically
from minigpt.format import with_unit
from minigpt.studies.claims.explainable import Explanation
from minigpt.studies.claims.long_range import Curve
from minigpt.studies.claims.parallel import Timing
from minigpt.studies.claims.study import Finding
from minigpt.studies.claims.tasks import TASKS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIX = ".svg"
_INCHES = (5.0, 3.6)
_COLOURS = {"lstm": "#cb4b16", "lstm-attention": "#2aa198", "gpt": "#4c6bc6"}


def prepare_folder(folder: Path) -> Path:
    """Make the folder for pictures, and see to it that they can be drawn.

    Raises: ConfigError if matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures.require_matplotlib(folder / f"claims{_SUFFIX}", (_SUFFIX, ".png"), what="--out")
    return folder


def record(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON has it: the verdict's fields, and ``measured``."""
    return {
        **asdict(finding.verdict),
        "elapsed_s": finding.elapsed_s,
        "measured": [asdict(one) for one in finding.measured],
    }


def show_finding(finding: Finding, *, as_json: bool) -> None:
    """Write a finding to stdout: a table and a verdict, or an object in a line."""
    if as_json:
        output.write_json(record(finding))
        return
    verdict = finding.verdict
    output.show(_table(finding.measured))
    output.show([Text(f"{verdict.claim}: {verdict.outcome}", style="bold")])
    output.show(Text(f"- {reason}") for reason in verdict.reasons)
    output.show([Text()])


def write_findings(folder: Path, findings: Sequence[Finding]) -> None:
    """Write claims.json, an object a line, and the picture of each claim that has one."""
    lines = "".join(json.dumps(record(finding)) + "\n" for finding in findings)
    write_atomically(folder / "claims.json", lines.encode())
    figure = _picture(findings[-1].measured)
    if figure is not None:
        figures.write_figure(folder / f"{findings[-1].verdict.claim}{_SUFFIX}", figure)


def _table(measured: Sequence[Curve | Explanation | Timing]) -> Iterator[Text]:
    curves = [one for one in measured if isinstance(one, Curve)]
    explanations = [one for one in measured if isinstance(one, Explanation)]
    timings = [one for one in measured if isinstance(one, Timing)]
    rows = [*_curve_rows(curves), *_explanation_rows(explanations), *_timing_rows(timings)]
    sides = ["left"] + ["right"] * (len(rows[0]) - 1)
    return output.aligned([[Text(cell) for cell in row] for row in rows], sides)


def _curve_rows(curves: Sequence[Curve]) -> Iterator[list[str]]:
    for name in dict.fromkeys(curve.task for curve in curves):
        found = [curve for curve in curves if curve.task == name]
        yield [f"{name}: % right", "seed", "parameters", *map(str, found[0].distances)]
        for one in found:
            shares = [_percent(share) for share in one.accuracy]
            yield [one.arch, str(one.seed), str(one.n_parameters), *shares]
        for guess, share in (
            ("guess", TASKS[name].chance),
            ("informed guess", TASKS[name].informed_chance),
        ):
            yield [guess, "", "", *[_percent(share)] * len(found[0].distances)]


def _explanation_rows(explanations: Sequence[Explanation]) -> Iterator[list[str]]:
    if explanations:
        yield [
            "recall",
            "seed",
            "% right",
            "mean of heads at source",
            "best head",
            "ln p without source",
            "without control",
            "without most attended",
        ]
    for one in explanations:
        yield [
            one.arch,
            str(one.seed),
            _percent(one.accuracy),
            _percent(one.mean_share),
            f"{_percent(one.best_head_share)} ({one.best_layer}.{one.best_head})",
            f"{one.source_change:+.2f}",
            f"{one.control_change:+.2f}",
            f"{one.most_attended_change:+.2f}",
        ]


def _timing_rows(timings: Sequence[Timing]) -> Iterator[list[str]]:
    if timings:
        yield ["training", "parameters", "length", "batch", "ms/step", "tokens/s"]
    for one in timings:
        speed = with_unit(one.tokens_per_s, "")
        yield [
            f"{one.arch} on {one.device}",
            str(one.n_parameters),
            str(one.length),
            str(one.batch_size),
            f"{one.step_ms:.3g}",
            speed.strip(),
        ]


def _percent(share: float) -> str:
    return f"{100 * share:.0f}"


def _picture(measured: Sequence[Curve | Explanation | Timing]) -> "Figure | None":
    curves = [one for one in measured if isinstance(one, Curve)]
    timings = [one for one in measured if isinstance(one, Timing)]
    panels: dict[str, list[tuple[str, Sequence[float], Sequence[float]]]] = {}
    for curve in curves:
        line = curve.arch, curve.distances, [100 * share for share in curve.accuracy]
        panels.setdefault(curve.task, []).append(line)
    for key in dict.fromkeys((timing.device, timing.arch) for timing in timings):
        found = [timing for timing in timings if (timing.device, timing.arch) == key]
        lengths, speeds = [t.length for t in found], [t.tokens_per_s for t in found]
        panels.setdefault(key[0], []).append((key[1], lengths, speeds))
    if not panels:
        return None
    words = ("distance of the source", "% right") if curves else ("tokens", "trained tokens/s")
    return _draw(panels, words, is_log=not curves)


def _draw(
    panels: dict[str, list[tuple[str, Sequence[float], Sequence[float]]]],
    words: tuple[str, str],
    *,
    is_log: bool,
) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_INCHES[0] * len(panels), _INCHES[1]), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        named = set()
        for arch, x, y in lines:
            label = arch if arch not in named else None  # one name for all seeds
            named.add(arch)
            axes.plot(x, y, "o-", color=_COLOURS[arch], label=label, markersize=4)
        if title in TASKS:
            axes.axhline(100 * TASKS[title].informed_chance, color="gray", linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lines[0][1], [str(x) for x in lines[0][1]])
        axes.set(title=title, xlabel=words[0], ylabel=words[1])
        if is_log:
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 102)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return figure
