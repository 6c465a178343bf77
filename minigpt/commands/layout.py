"""Layout of the command line: commands imported when they are called, options under headings."""

import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from minigpt.errors import ConfigError, cut, did_you_mean, require_choice
from minigpt.rings import has_ring, ring

COMMANDS = {
    "train": "Train a model from text",
    "generate": "Continue a prompt with a trained model",
    "attention-trace": "Show what each generated token attended to",
    "heads": "Show the role of each attention head",
    "evaluate": "Measure how well a model predicts a text",
    "plot": "Plot the loss curves of runs",
    "compare": "Compare attention scores and recurrent models",
    "claims": "Measure common claims about attention",
    "prepare": "Tokenize text before training",
    "checkpoints": "List, show, verify, prune, average and convert checkpoints",
}
"""Each command and its line in ``minigpt --help``; its module has its name."""


_HELP = "help"
_NARROWEST = 18  # columns of text


class Subcommands(TyperGroup):
    """A command made of several, laid out like the program."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page for the width of the terminal."""
        _fit(formatter)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; ``help COMMAND`` is ``COMMAND --help``.

        Raises: ConfigError for an unknown option before the command.
        """
        options = [name for p in self.get_params(ctx) for name in p.opts]
        if args and args[0][0:1] == "-" and args[0].partition("=")[0] not in (*options, "--"):
            near = did_you_mean(args[0], [name for name in options if name[:2] == "--"])
            raise ConfigError(
                f"unknown option {cut(args[0])}. {near or f'See {ctx.command_path} --help.'}"
            )
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

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options and the commands."""
        _write_groups(ctx, formatter, self.get_params(ctx))
        with formatter.section("Commands"):
            if formatter.width < 2 * _NARROWEST:
                _stack(formatter, self.lines(ctx).items())
            else:
                formatter.write_dl(list(self.lines(ctx).items()))


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


class Command(TyperCommand):
    """A command whose --help lists its options under headings, in aligned columns."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the page for the width of the terminal."""
        _fit(formatter)
        super().format_help(ctx, formatter)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises: ConfigError for an unknown option, and for one that lacks its value and is followed
            by another option, which would be taken as the value.
        """
        options = {name: p for p in self.get_params(ctx) for name in (*p.opts, *p.secondary_opts)}
        words = iter(args)
        for word in words:
            if word == "--":
                self._require_texts(ctx, list(words), options)
                break
            name, equals, _ = word.partition("=")
            option = options.get(name)
            if option is None and word.startswith("-") and word != "-":
                raise ConfigError(f"unknown option {word!r}. {self._advice(ctx, word)}")
            n_values = 0 if option is None or equals or _is_flag(option) else option.nargs
            for value in itertools.islice(words, n_values):
                if value in options or re.match(r"--[a-z]", value):
                    also = f", or write {word}={value}" if n_values == 1 else ""
                    raise ConfigError(
                        f"{word} needs a value, and {value!r} is an option. Give a value{also}."
                    )
        return list(super().parse_args(ctx, args))

    def _require_texts(self, ctx: Any, after: list[str], options: Mapping[str, Any]) -> None:
        """Raise ConfigError for an option behind the first text after ``--``."""
        rest, moved, late = iter(after[1:]), [], ""
        texts = after[:1]
        for word in rest:
            option = options.get(word.partition("=")[0])
            if option is None:
                texts.append(word)
                continue
            late = late or word
            n_values = 0 if "=" in word or _is_flag(option) else option.nargs
            moved += [word, *itertools.islice(rest, n_values)]
        if late:
            call = shlex.join([*moved, "--", *texts])
            raise ConfigError(
                f"{late} is behind --, where all is text. Put options before it: "
                f"{ctx.command_path} {call}"
            )

    def _advice(self, ctx: Any, word: str) -> str:
        """Return the remedy for a word that begins with a dash and is no option."""
        parameters = self.get_params(ctx)
        has_argument = any(p.param_type_name == "argument" for p in parameters)
        if has_argument and (" " in word or not word.lstrip("-")[:1].isalpha()):
            call = f"{ctx.command_path} -- {shlex.quote(word)}"
            return f"Put -- before a text that begins with a dash, after all options: {call}"
        is_negated = word.startswith("--no-")
        listed = [p.secondary_opts if is_negated else p.opts for p in parameters]
        name = word.partition("=")[0]
        for parameter in parameters:  # `train --model M`, whose option for a MODEL is --from
            if name.lstrip("-").upper() == parameter.metavar:
                if parameter.param_type_name != "argument":
                    return f"Did you mean {parameter.opts[0]} {parameter.metavar}?"
                return f"Give it without a name: {ctx.command_path} {parameter.metavar}"
        longs = [[n for n in names if n.startswith("--")][:1] for names in listed]  # no aliases
        near = did_you_mean(name, itertools.chain(*longs))
        return near or f"See {ctx.command_path} --help."

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, each under its ``rich_help_panel``."""
        _write_groups(ctx, formatter, self.get_params(ctx))


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


def _fit(formatter: Any) -> None:
    """Let a page of --help fit a terminal of any width; click assumes 50 columns or more."""
    formatter.width = max(min(shutil.get_terminal_size().columns, 80), _NARROWEST)


def _stack(formatter: Any, rows: Iterable[tuple[str, str]]) -> None:
    """Write each text below its name, for a narrow terminal."""
    for name, text in rows:
        formatter.write(f"{name}\n")
        with formatter.indentation():
            formatter.write_text(text)


def _write_groups(ctx: Any, formatter: Any, parameters: Iterable[Any]) -> None:
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


def _is_flag(parameter: Any) -> bool:
    return bool(getattr(parameter, "is_flag", False))


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
