"""The command line: one thin module per command; ``main`` maps errors to exit codes.

Nothing here imports torch before a command runs, so that --help answers at once.
"""

import os
import platform
import signal
import sys
from types import FrameType
from typing import Annotated, NoReturn

import typer

from minigpt.commands.failures import describe
from minigpt.commands.layout import Commands, show_help
from minigpt.commands.openmp import set_spin_count
from minigpt.text.escape import printable

app = typer.Typer(
    cls=Commands,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(is_wanted: bool) -> None:
    if not is_wanted:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version("minigpt")
    except PackageNotFoundError:  # run by cli.py from the source tree
        number = "of the source tree"
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
    _open_streams()
    signal.signal(signal.SIGTERM, _terminate)
    set_spin_count(sys.argv[1:])
    try:
        status = app(prog_name="minigpt", standalone_mode=False)
        sys.stdout.flush()
    except SystemExit as error:
        # typer exits with 1 if the reader of a pipe is gone, as in `| head`: not a failure.
        status = 0 if isinstance(error.__context__, BrokenPipeError) else error.code
    except BrokenPipeError:
        status = 0
    except (KeyboardInterrupt, typer.Abort):
        status = 128 + signal.SIGINT
    except BaseException as error:
        status = _report(error)
    finally:
        _close_streams()
    sys.exit(status if isinstance(status, int) else 0)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    """Exit by an exception, so that unfinished work is cleaned up."""
    sys.exit(128 + number)


def _report(error: BaseException) -> int:
    """Print one line about an error and return its exit code."""
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exception(error)
    message, code = describe(error)
    line = " ".join(printable(message).split())
    print(f"error: {line}", file=sys.stderr)  # noqa: T201
    return code


def _open_streams() -> None:
    """Make sure that stdin, stdout and stderr exist, and that no character makes them fail."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller, as with >&-
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _close_streams() -> None:
    """Silence streams that can no longer be written, so that Python's last flush does not fail."""
    for stream in (sys.stdout, sys.stderr, sys.__stdout__):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            from minigpt.console import silence

            silence(stream)
