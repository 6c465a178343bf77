"""The command line: one thin module per command; ``main`` maps errors to exit codes.

Nothing here imports torch before a command runs, so that --help is fast.
"""

import platform
import signal
import sys
import warnings
from contextlib import nullcontext
from typing import Annotated, Any, NoReturn

import typer

from minigpt.commands.registry import Commands, show_help
from minigpt.errors import ConfigError, MinigptError, MinigptWarning, ResourceError
from minigpt.rings import find_ring
from minigpt.text.escape import printable

_HALF = 1000  # characters kept at each end of an overlong message

_pages = find_ring("commands.help.pages")
app = typer.Typer(
    cls=_pages.Program if _pages else Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from importlib.metadata import version

    from minigpt import __version__

    number = __version__.replace("0+source", "of the source tree")  # run through cli.py
    python = platform.python_version()
    typer.echo(f"minigpt {number} (torch {version('torch')}, Python {python})")
    raise typer.Exit


@app.callback(invoke_without_command=True)
def minigpt(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Train a small GPT, sample from it, and see what each generated token attended to."""
    show_help(context)


def main() -> NoReturn:
    """Run the command line and exit with its code; an error is one line on stderr."""
    warnings.filterwarnings("default", category=MinigptWarning)
    failures = find_ring("commands.help.failures")
    with failures.handling_failures() if failures else nullcontext():
        status = _run(failures)
    sys.exit(status if isinstance(status, int) else 0)


def _run(failures: Any) -> Any:
    """Run the command line and return its exit code."""
    try:
        if failures:
            failures.check_folder()
        status = app(prog_name="minigpt", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as error:
        # typer exits with 1 if the reader of a pipe is gone, as with `| head`: not a failure.
        return 0 if isinstance(error.__context__, BrokenPipeError) else error.code
    except BrokenPipeError:
        return 0
    except BaseException as error:
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exception(error)
        message, status = _describe(error)
        if len(message) > 2 * _HALF:  # a name in a file can be megabytes long
            message = f"{message[:_HALF]} ... {message[-_HALF:]}"
        line = " ".join(printable(message).split())
        line = line if status == 128 + signal.SIGINT else f"error: {line}"
        print(*failures.wrapped(line) if failures else [line], sep="\n", file=sys.stderr)  # noqa: T201
    return status


def _describe(error: BaseException) -> tuple[str, int]:
    """Return an error's message (what, the value, the remedy) and its exit code."""
    cause: BaseException | None = error
    while cause is not None:  # a library may wrap the KeyboardInterrupt of Ctrl-C
        if isinstance(cause, KeyboardInterrupt | typer.Abort):
            return "interrupted", 128 + signal.SIGINT
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, MinigptError):
        return str(error), error.exit_code
    if failures := find_ring("commands.help.failures"):
        known: tuple[str, int] | None = failures.describe(error)
        if known:
            return known
    if hasattr(error, "format_message"):  # a usage error of typer or click
        return str(error.format_message()), ConfigError.exit_code
    if isinstance(error, OSError):
        return f"{error}. Check the disk and the permissions.", ResourceError.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"this installation lacks {error.name}. Install all of minigpt to use it.", 2
    return f"{type(error).__name__}: {error}. This is a bug in minigpt; --debug shows more.", 1
