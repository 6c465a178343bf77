"""Pages of --help: options under headings, in aligned columns that fit the terminal.

Its command classes also check the words of a call before typer parses them.
"""

import shutil
from collections.abc import Iterable
from typing import Any

from typer.core import TyperCommand, TyperGroup

from minigpt.commands.help import usage
from minigpt.commands.help.texts import TEXTS
from minigpt.commands.registry import COMMANDS, Commands
from minigpt.errors import ConfigError, require_choice

_NARROWEST = 18  # columns of text
_HYPHEN = "\N{NON-BREAKING HYPHEN}"  # keeps names such as --max-new-tokens on one line


class _Page:
    """A command whose --help is laid out here."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page for a terminal of any width; click assumes at least 50 columns."""
        formatter.width = max(min(shutil.get_terminal_size().columns, 80), _NARROWEST)
        write_text = formatter.write_text
        formatter.write_text = lambda text: write_text(text.replace("-", _HYPHEN))
        super().format_help(ctx, formatter)  # type: ignore[misc]
        formatter.buffer[:] = [text.replace(_HYPHEN, "-") for text in formatter.buffer]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_options(ctx, formatter, ctx.command.get_params(ctx))


class Command(_Page, TyperCommand):
    """A command."""

    def __init__(self, name: str | None, **options: Any) -> None:
        super().__init__(name, **options)
        self.help = f"{self.help}\n{TEXTS.get(name or '', '')}"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check the words with ``usage.check_words``, and parse them."""
        usage.check_words(ctx, args)
        return list(super().parse_args(ctx, args))

    def invoke(self, ctx: Any) -> Any:
        """Run the command; the message of a ConfigError names options as they are typed."""
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            error.args = (usage.with_options(str(error), ctx),)
            raise


class Group(_Page, TyperGroup):
    """A group of commands, laid out like the program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Check and parse the arguments; ``help COMMAND`` is ``COMMAND --help``."""
        usage.check_group(ctx, args)
        while args[:1] == ["help"]:  # also for help help
            args = [*args[1:], "--help"]
        return list(super().parse_args(ctx, args))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options and commands."""
        super().format_options(ctx, formatter)
        rows = list(self.lines(ctx).items())
        with formatter.section("Commands"):
            if formatter.width < 2 * _NARROWEST:
                _stack(formatter, rows)
            else:
                formatter.write_dl(rows)

    def lines(self, ctx: Any) -> dict[str, str]:
        """Return the names of its commands, and the line of each in --help."""
        return {name: str(c.help).partition("\n")[0] for name, c in self.commands.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return one of its commands, ready to run."""
        require_choice("command", cmd_name, [*self.commands, "help"])
        return self.commands[cmd_name]


class Program(Commands, Group):
    """The program, whose page imports no command."""

    def lines(self, ctx: Any) -> dict[str, str]:
        """Return the commands of this installation, and the line of each in --help."""
        return {name: COMMANDS[name] for name in self.list_commands(ctx)}


def _stack(formatter: Any, rows: Iterable[tuple[str, str]]) -> None:
    """Write each text below its name, for a narrow terminal."""
    for name, text in rows:
        formatter.write(f"{name}\n")
        with formatter.indentation():
            formatter.write_text(text)


def _write_options(ctx: Any, formatter: Any, parameters: Iterable[Any]) -> None:
    """Write arguments and options, each under its ``rich_help_panel``."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        if getattr(parameter, "hidden", False):
            continue
        is_argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None)  # click's own --help has none
        heading = "Arguments" if is_argument else panel or "General"
        _, text = parameter.get_help_record(ctx)
        text = text.rstrip(".").replace("-", _HYPHEN)
        groups.setdefault(heading, []).append((_left(parameter), text))
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
