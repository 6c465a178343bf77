"""Layout of the command line: commands imported when they are called, options under headings."""

from collections.abc import Callable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from minigpt.errors import require_choice
from minigpt.rings import find_ring, has_ring, ring

COMMANDS = {
    "train": "Train a model from text",
    "generate": "Continue a prompt with a trained model",
    "attention-trace": "Show what each generated token attended to",
    "heads": "Show the role of each attention head",
    "measures": "Compare measures of attention with exact effects",
    "evaluate": "Measure how well a model predicts a text",
    "plot": "Plot the loss curves of runs",
    "compare": "Compare attention scores and recurrent models",
    "claims": "Measure common claims about attention",
    "prepare": "Tokenize text before training",
    "checkpoints": "List, show, verify, prune, average and convert checkpoints",
}
"""Each command and its line in ``minigpt --help``; its module has its name."""
_HELP = "help"
_PAGES, _USAGE = "commands.help_pages", "commands.usage"


class _Page:
    """A command whose --help is laid out by the ring of help pages, or by typer without it."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page for the width of the terminal."""
        if pages := find_ring(_PAGES):
            pages.fit(formatter)
        super().format_help(ctx, formatter)  # type: ignore[misc]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options and, in a group, commands."""
        pages = find_ring(_PAGES)
        if pages is None:
            super().format_options(ctx, formatter)  # type: ignore[misc]
            return
        pages.write_options(ctx, formatter, ctx.command.get_params(ctx))
        if isinstance(self, Subcommands):
            pages.write_commands(formatter, self.lines(ctx))


class Command(_Page, TyperCommand):
    """A command, whose words are checked before typer parses them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises: ConfigError for an unknown option, or one that lacks its value.
        """
        if usage := find_ring(_USAGE):
            usage.check_words(ctx, args)
        return list(super().parse_args(ctx, args))


class Subcommands(_Page, TyperGroup):
    """A command made of several, laid out like the program."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; ``help COMMAND`` is ``COMMAND --help``.

        Raises: ConfigError for an unknown option before the command.
        """
        if usage := find_ring(_USAGE):
            usage.check_group(ctx, args)
        asked = [*args[1:], "--help"] if args[:1] == [_HELP] else args
        return list(super().parse_args(ctx, asked))

    def lines(self, ctx: Any) -> dict[str, str]:
        """Return the names of its commands, and the line of each in --help."""
        return {name: str(c.help).partition("\n")[0] for name, c in self.commands.items()}

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return one of its commands, ready to run.

        Raises: ConfigError if it does not exist.
        """
        require_choice("command", cmd_name, [*self.commands, _HELP])
        return self.commands[cmd_name]


class Commands(Subcommands):
    """The program, which imports a command's module only when it is called."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C becomes Abort, because typer would exit without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Abort from error

    def lines(self, ctx: Any) -> dict[str, str]:
        """Return the commands of this installation, and the line of each in --help."""
        return {name: line for name, line in COMMANDS.items() if has_ring(_module(name))}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands of this installation, in the order of --help."""
        return list(self.lines(ctx))

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, ready to run.

        Raises: ConfigError if it does not exist, or belongs to a ring that was deleted.
        """
        require_choice("command", cmd_name, [*COMMANDS, _HELP])
        module = ring(_module(cmd_name))
        command = getattr(module, module.__name__.rpartition(".")[2])
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        _add(app, cmd_name, command)
        return typer.main.get_command(app)


def group(name: str, commands: Mapping[str, Callable[..., None]]) -> typer.Typer:
    """Make a command of several, each a function whose docstring is its help."""
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
    """Show the help of a program that is called without one of its commands."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _module(command: str) -> str:
    return f"commands.{command.replace('-', '_')}"


def _add(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    # A docstring's first line ends with a full stop, a line of --help does not.
    first, break_, rest = str(function.__doc__).partition("\n")
    app.command(name, cls=Command, help=first.rstrip(".") + break_ + rest)(function)
