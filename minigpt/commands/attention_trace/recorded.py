"""minigpt attention-trace --replay and --diff: traces that --out wrote."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np

from minigpt.commands.attention_trace.files import FileOutput, check_files
from minigpt.commands.attention_trace.targets import Targets
from minigpt.console import make_console, write_result
from minigpt.errors import DataError
from minigpt.format import count
from minigpt.rings import ring
from minigpt.styles import print_lines
from minigpt.tracing.analysis.dense import with_rows_of
from minigpt.tracing.analysis.diff import StepDiff, diff_traces
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.config import DIGITS, N_SOURCES
from minigpt.tracing.events import Source
from minigpt.tracing.findings import Trace, TraceStep
from minigpt.tracing.lines import make_layout
from minigpt.tracing.spans import Line, bar, encodable, fit, heat, percent
from minigpt.tracing.summary import measured
from minigpt.tracing.wrapping import fit_start, one_line_label, wrapped

_TOKEN_WIDTH = 9
_MOST_ON_PAGE = 4_000_000
"""Maximum number of head weights in an HTML page, where they take about 10 MB."""


def replay(path: Path, targets: Targets, config: AnalysisConfig) -> None:
    """Show the traces of a file as when they were generated, or with rows of other heads.

    Raises: DataError for a file that is not a trace, or rows of another trace; ConfigError for
        heads that the model does not have.
    """
    traces = read_traces(path)
    n_sources = config.n_sources
    # A replay that draws files shows lines only if an option for them is given.
    shows_lines = targets.view is not None or n_sources is not None or targets.as_json
    is_quiet = bool(targets.drawings) and not shows_lines
    check_files(targets, len(traces), replayed=path)
    if targets.dense is not None:
        header, n_kept = traces[0].header, N_SOURCES
        if targets.html is not None:  # full rows of heads, if they fit
            n_rows = max(1, len(traces[0].steps)) * header.n_layer * header.n_head
            n_kept = max(N_SOURCES, min(len(traces[0].tokens), _MOST_ON_PAGE // n_rows))
        traces = [with_rows_of(traces[0], targets.dense, config, n_kept=n_kept)]
    for trace in traces:
        if targets.position is not None:  # before a line is shown
            ring("tracing.views").ViewOptions(position=targets.position).step(trace)
        console = make_console(is_stderr=False)
        layout = make_layout(
            console.width,
            encoding=console.encoding,
            vocab_size=1 + max(token.id for token in trace.tokens),
            n_positions=len(trace.tokens),
            n_sources=n_sources,
            measures=trace.header.measures,
        )
        steps = [_with_sources(trace, step, n_sources or 0) for step in trace.steps]
        with FileOutput(replace(targets, dense=None), layout, is_quiet=is_quiet) as output:
            output.show(iter([trace.header, *steps, trace.footer]))


def _with_sources(trace: Trace, step: TraceStep, n_sources: int) -> TraceStep:
    """Return a step with at least this number of sources, if its rows have as many positions."""
    rows = []
    for row in step.rows:
        n_missing = n_sources - len(row.sources)
        if n_missing > 0:
            listed = {trace.header.sink, *(source.token.position for source in row.sources)}
            order = np.argsort(-np.abs(row.weights_S), kind="stable").tolist()
            more = [position for position in order if position not in listed][:n_missing]
            added = (Source(trace.tokens[p], float(row.weights_S[p])) for p in more)
            row = replace(row, sources=(*row.sources, *added))
        rows.append(row)
    return replace(step, rows=tuple(rows))


def show_diff(first: Path, second: Path, *, as_json: bool) -> None:
    """Print the differences of two traces at each token, and the means.

    Raises: DataError for files that are not traces, or have different tokens.
    """
    one, other = _read(first), _read(second)
    diffs = list(diff_traces(one, other))
    if as_json:
        for diff in diffs:
            write_result(json.dumps(_record(diff)) + "\n")
        return
    console = make_console(is_stderr=False)
    lines: list[Line] = []
    for label, trace in (("first    ", one), ("second   ", other)):
        header = trace.header
        compared = measured(header, header.measures[:1])
        name = f"{one_line_label(header.model)}: {compared}"
        if header.intervention is not None:
            name += f"; {one_line_label(str(header.intervention))}"
        lines.append([(label, "dim"), (fit_start(name, console.width - len(label)), "plain")])
    source = "top of first".ljust(5 + _TOKEN_WIDTH)
    is_weight = {one.header.measures[0], other.header.measures[0]} == {"weight"}
    differ = "moved" if is_weight else "differ"  # only attention weights move
    names = [encodable(name, console.encoding) for name in one.joined.names]
    title = f"step {'token':<{_TOKEN_WIDTH}} {differ:<11} bits   ln p  {source}  top of second"
    lines += [[], [(title, "dim")]]
    lines += [_line(number, diff, names) for number, diff in enumerate(diffs, start=1)]
    print_lines(console, [*lines, [], *wrapped(_summary(diffs, is_weight), console.width)])


def _read(path: Path) -> Trace:
    traces = read_traces(path)
    if len(traces) > 1:
        raise DataError(
            f"{str(path)!r} has {len(traces)} traces, but only files of one trace can be compared. "
            "Trace without --num-samples."
        )
    return traces[0]


def _line(number: int, diff: StepDiff, names: Sequence[str]) -> Line:
    def named(position: int) -> str:
        return fit(names[position], _TOKEN_WIDTH)

    first, second = (
        f"{token.position:>4} {named(token.position)}"
        for token in (diff.first_token, diff.second_token)
    )
    is_same = diff.first_token == diff.second_token
    second = "same" if is_same else second.rstrip()
    return [
        (f"{number:>4} ", "dim"),
        (named(diff.token.position), "token"),
        (f"  {percent(diff.moved)} {bar(diff.moved)} ", heat(diff.moved)),
        (f"{diff.divergence:>6.3f} {diff.change:>+6.2f}", "plain"),
        (f"  {first}  {second}", "dim" if is_same else "plain"),
    ]


def _summary(diffs: list[StepDiff], is_weight: bool) -> str:
    if not diffs:
        return "No token was generated."
    moved = percent(fmean(diff.moved for diff in diffs)).strip()
    divergence = fmean(diff.divergence for diff in diffs)
    n_changed = sum(diff.first_token != diff.second_token for diff in diffs)
    differ = f"{moved} of the attention moved" if is_weight else f"the rows differ by {moved}"
    return (
        f"{count(len(diffs), 'token')}: on average, {differ} and the "
        f"Jensen-Shannon divergence is {divergence:.3f} bits; {n_changed} changed their "
        "strongest source."
    )


def _record(diff: StepDiff) -> dict[str, object]:
    return {
        "position": diff.token.position,
        "token": diff.token.id,
        "moved": round(diff.moved, DIGITS),
        "divergence_bits": round(diff.divergence, DIGITS),
        "log_probability_change": round(diff.change, DIGITS),
        "first_position": diff.first_token.position,
        "second_position": diff.second_token.position,
    }
