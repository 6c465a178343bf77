"""Pages of --help: options under headings, in aligned columns that fit the terminal."""

import shutil
from collections.abc import Iterable, Mapping
from typing import Any

_NARROWEST = 18  # columns of text


def fit(formatter: Any) -> None:
    """Let a page of --help fit a terminal of any width; click assumes 50 columns or more."""
    formatter.width = max(min(shutil.get_terminal_size().columns, 80), _NARROWEST)


def _stack(formatter: Any, rows: Iterable[tuple[str, str]]) -> None:
    """Write each text below its name, for a narrow terminal."""
    for name, text in rows:
        formatter.write(f"{name}\n")
        with formatter.indentation():
            formatter.write_text(text)


def write_options(ctx: Any, formatter: Any, parameters: Iterable[Any]) -> None:
    """Write arguments and options, each under its ``rich_help_panel``."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        if getattr(parameter, "hidden", False):
            continue
        is_argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None)  # click's own --help has none
        heading = "Arguments" if is_argument else panel or "General"
        _, text = parameter.get_help_record(ctx)
        groups.setdefault(heading, []).append((_left(parameter), text.rstrip(".")))
    width = max(len(left) for rows in groups.values() for left, _ in rows)
    is_narrow = formatter.width < width + _NARROWEST
    for heading, rows in groups.items():
        with formatter.section(heading):
            if is_narrow:
                _stack(formatter, rows)
                continue
            formatter.write_dl([(left.ljust(width), text) for left, text in rows], width)


def _left(parameter: Any) -> str:
    """Return a parameter as it is typed."""
    if parameter.param_type_name == "argument":
        return f"{parameter.metavar}..." if parameter.nargs != 1 else str(parameter.metavar)
    short = [name for name in parameter.opts if not name.startswith("--")]
    long = [name for name in parameter.opts if name.startswith("--")]
    names = ", ".join([*short, *long[:1]])  # the others are aliases
    if parameter.secondary_opts:
        return names.replace("--", "--[no-]")
    return names if parameter.is_flag else f"{names} {parameter.metavar}"


def write_commands(formatter: Any, lines: Mapping[str, str]) -> None:
    """Write commands and their lines."""
    with formatter.section("Commands"):
        if formatter.width < 2 * _NARROWEST:
            _stack(formatter, lines.items())
        else:
            formatter.write_dl(list(lines.items()))
