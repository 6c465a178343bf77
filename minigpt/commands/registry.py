"""The commands of the program, each imported only when it is called."""

from collections.abc import Callable
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
"""Each command and its line in ``minigpt --help``; its module has the same name."""


class Commands(TyperGroup):
    """Top-level command group that imports a command's module only when it is called."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; Ctrl-C becomes Abort, because typer would exit without a message."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise typer.Abort from error

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the commands of this installation, in the order of --help."""
        return [name for name in COMMANDS if has_ring(_module(name))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command, ready to run.

        Raises: ConfigError if it does not exist, or belongs to a ring that was deleted.
        """
        require_choice("command", cmd_name, [*COMMANDS, "help"])
        module = ring(_module(cmd_name))
        command = getattr(module, module.__name__.rpartition(".")[2])
        if isinstance(command, typer.Typer):
            return typer.main.get_command(command)
        app = typer.Typer(rich_markup_mode=None, add_completion=False)
        add(app, cmd_name, command)
        return typer.main.get_command(app)


def show_help(context: typer.Context) -> None:
    """Show the help of a program that is called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


def _module(command: str) -> str:
    return f"commands.{command.replace('-', '_')}"


def add(app: typer.Typer, name: str, function: Callable[..., None]) -> None:
    """Add a function to a program as a command; its docstring is the help."""
    # A docstring's first line ends with a full stop; a line of --help does not.
    first, break_, rest = str(function.__doc__).partition("\n")
    pages = find_ring("commands.help.pages")
    cls = pages.Command if pages else TyperCommand
    app.command(name, cls=cls, help=first.rstrip(".") + break_ + rest)(function)
