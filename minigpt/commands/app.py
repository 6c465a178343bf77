"""How the command line is laid out: commands that are read when called, options in groups."""

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from minigpt.errors import ConfigError, nearest

COMMANDS = {
    "train": "Train a model from text",
    "generate": "Continue a prompt with a trained model",
    "attention-trace": "Show what each generated token attended to",
    "heads": "Show which known kind of head each head is",
    "evaluate": "Measure how well a model predicts a text",
    "plot": "Draw the loss curves of runs",
    "compare": "Compare kinds of attention, and life without it",
    "claims": "Measure what is claimed of attention",
    "prepare": "Turn text into tokens ahead of training",
    "checkpoints": "List, show, verify, prune and average checkpoints",
}
"""Each command and its line in ``minigpt --help``; its module is named as it is."""


class Commands(TyperGroup):
    """The program: reads a command's module when it is called, so that --help answers at once."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands in the order of --help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, ready to run.

        Raises: ConfigError if there is none of that name.
        """
        _require_known(cmd_name, COMMANDS)
        name = cmd_name.replace("-", "_")
        command = getattr(import_module(f"minigpt.commands.{name}"), name)
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        _add(app, cmd_name, command)
        return typer.main.get_command(app)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options and commands, without reading the commands' modules."""
        _write_groups(ctx, formatter, self.get_params(ctx))
        _write_commands(formatter, COMMANDS)


class Subcommands(TyperGroup):
    """A command that is several, laid out as the program is."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command of this one, ready to run.

        Raises: ConfigError if there is none of that name.
        """
        _require_known(cmd_name, self.commands)
        return self.commands[cmd_name]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write options and commands."""
        _write_groups(ctx, formatter, self.get_params(ctx))
        lines = {name: str(command.help) for name, command in self.commands.items()}
        _write_commands(formatter, {name: text.split("\n")[0] for name, text in lines.items()})


def group(name: str, commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    """Make a command of commands, each a function whose docstring is its help."""
    app = typer.Typer(
        name=name,
        cls=Subcommands,
        help=COMMANDS[name],
        callback=show_help,
        invoke_without_command=True,
        rich_markup_mode=None,
        add_completion=False,
    )
    for command_name, function in commands.items():
        _add(app, command_name, function)
    return app


def show_help(context: typer.Context) -> None:
    """Let a program that is called without any of its commands show which there are."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _add(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    app.command(name, cls=Command, help=_help(function))(function)


def _require_known(name: str, commands: Iterable[str]) -> None:
    if name not in commands:
        raise ConfigError(f"there is no command {name!r}. {nearest(name, commands)}")


def _write_commands(formatter: Any, lines: Mapping[str, str]) -> None:
    with formatter.section("Commands"):
        formatter.write_dl(list(lines.items()))


class Command(TyperCommand):
    """A command whose --help has its options under headings, in aligned columns."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each under its ``rich_help_panel``."""
        _write_groups(ctx, formatter, self.get_params(ctx))


def _write_groups(ctx: Any, formatter: Any, parameters: Iterable[Any]) -> None:
    groups: dict[str, list[tuple[str, str]]] = {}
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        panel = getattr(parameter, "rich_help_panel", None)  # click's own --help has none
        heading = "Arguments" if is_argument else panel or "General"
        _, text = parameter.get_help_record(ctx)
        groups.setdefault(heading, []).append((_left(parameter), text.rstrip(".")))
    width = max(len(left) for rows in groups.values() for left, _ in rows)
    for heading, rows in groups.items():
        with formatter.section(heading):
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


def _help(function: Any) -> str:
    """Return a command's docstring, its first line without the full stop that code has."""
    first, break_, rest = str(function.__doc__).partition("\n")
    return first.rstrip(".") + break_ + rest
