"""The command line: one thin file a command; ``main`` maps errors to exit codes.

Nothing here imports torch before a command runs, so that --help answers at once.
"""

import os
import sys
import traceback

import typer

from minigpt.commands.attention_trace import attention_trace
from minigpt.commands.generate import generate
from minigpt.commands.train import train
from minigpt.errors import MinigptError
from minigpt.text.visible import printable

app = typer.Typer(
    help="Train a small GPT, sample from it, and see what each generated token attended to.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(short_help="Train a model from text")(train)
app.command(short_help="Continue a prompt with a trained model")(generate)
app.command(name="attention-trace", short_help="Show what each generated token attended to")(
    attention_trace
)


def main() -> None:
    """Run the command line and exit with DESIGN's codes: one line an error, on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no character that the encoding lacks may raise
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(standalone_mode=False)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        sys.exit(_report(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _report(error: Exception) -> int:
    """Print one line about an error and return its exit code."""
    if isinstance(error, BrokenPipeError):
        # The reader has gone, as with `| head`. What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if hasattr(error, "format_message"):  # click's usage errors
        message, code = error.format_message(), getattr(error, "exit_code", 2)
    elif isinstance(error, MinigptError):
        message, code = str(error), error.exit_code
    elif (
        isinstance(error, MemoryError)
        or "OutOfMemory" in type(error).__name__
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    ):
        message, code = "out of memory. Try a smaller model, --batch-size or --context-length.", 6
    else:
        message = f"{type(error).__name__}: {error}. This is a bug of minigpt; --debug shows more."
        code = 1
    if message:
        line = " ".join(printable(message).split())
        print(f"error: {line}", file=sys.stderr)  # noqa: T201
    return int(code)
