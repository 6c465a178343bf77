"""Two traces of the same tokens, as lines or as JSON."""

import json
from pathlib import Path

from minigpt.console import make_console, print_lines, write_result
from minigpt.errors import DataError
from minigpt.text.escape import visible
from minigpt.tracing.analysis.diff import StepDiff, diff_traces
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.events import Token, Trace
from minigpt.tracing.spans import Line, bar, fit, fit_start, heat, percent, wrapped
from minigpt.tracing.words import measured

_TOKEN_WIDTH = 9
_LABEL_WIDTH = 9
_PLACE_WIDTH = 14  # a position and its token


def show_diff(first: Path, second: Path, *, as_json: bool) -> None:
    """Print what differs, a line a token, and the means.

    Raises: DataError for files that are no traces, or not of the same tokens.
    """
    one, other = (_only(path) for path in (first, second))
    diffs = list(diff_traces(one, other))
    if as_json:
        for diff in diffs:
            write_result(json.dumps(_facts(diff)) + "\n")
        return
    console = make_console(is_stderr=False)
    lines = _heading(one, other, console.width)
    for index, diff in enumerate(diffs):
        lines.append(_line(index, diff))
    lines += [[], *wrapped(_summary(diffs), console.width)]
    print_lines(console, lines)


def _only(path: Path) -> Trace:
    traces = read_traces(path)
    if len(traces) > 1:
        raise DataError(
            f"{str(path)!r} holds {len(traces)} traces, and one is compared with one. Trace "
            "without --num-samples."
        )
    return traces[0]


def _heading(one: Trace, other: Trace, width: int) -> list[Line]:
    lines: list[Line] = []
    for label, trace in (("first", one), ("second", other)):
        name = f"{trace.header.model}: {measured(trace.header)}"
        lines.append(
            [(label.ljust(_LABEL_WIDTH), "dim"), (fit_start(name, width - _LABEL_WIDTH), "plain")]
        )
    places = f"{'first at most':<{_PLACE_WIDTH}}  second at most"
    head = f"step {'token':<{_TOKEN_WIDTH}} elsewhere   bits   ln p  {places}"
    return [*lines, [], [(head, "dim")]]


def _line(index: int, diff: StepDiff) -> Line:
    is_same = diff.first_token == diff.second_token
    second = "the same" if is_same else _place(diff.second_token).rstrip()
    return [
        (f"{index + 1:>4} ", "dim"),
        (fit(visible(diff.token.data), _TOKEN_WIDTH), "token"),
        (f"  {percent(diff.moved)} {bar(diff.moved)} ", heat(diff.moved)),
        (f"{diff.divergence:>6.3f} {diff.change:>+6.2f}", "plain"),
        (f"  {_place(diff.first_token)}  {second}", "dim" if is_same else "plain"),
    ]


def _place(token: Token) -> str:
    text = fit(visible(token.data), _TOKEN_WIDTH)
    return f"{token.position:>{_PLACE_WIDTH - _TOKEN_WIDTH - 1}} {text}"


def _summary(diffs: list[StepDiff]) -> str:
    if not diffs:
        return "No token was generated."
    n = len(diffs)
    n_moved = sum(diff.first_token != diff.second_token for diff in diffs)
    return (
        f"{n} tokens: {percent(sum(d.moved for d in diffs) / n).strip()} of the attention lies "
        f"elsewhere, {sum(d.divergence for d in diffs) / n:.3f} bits apart (Jensen-Shannon), and "
        f"{n_moved} looked at another token most."
    )


def _facts(diff: StepDiff) -> dict[str, object]:
    return {
        "position": diff.token.position,
        "token": diff.token.id,
        "moved": round(diff.moved, 6),
        "divergence_bits": round(diff.divergence, 6),
        "log_probability_change": round(diff.change, 6),
        "first_position": diff.first_token.position,
        "second_position": diff.second_token.position,
    }
