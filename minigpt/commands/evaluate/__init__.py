"""minigpt evaluate; the docstring of the command is its --help."""

from typing import Annotated

import typer

from minigpt.commands import options
from minigpt.config import DTYPES


def evaluate(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DATA",
            help="Files, folders, globs, - for standard input, or shakespeare [the "
            "English prose in Python]",
            show_default=False,
        ),
    ] = None,
    more_data: Annotated[
        list[str] | None,
        options.option("--data", "The same as DATA; repeat for more", group="Text", metavar="PATH"),
    ] = None,
    val_fraction: Annotated[
        float | None,
        options.number(
            "--val-fraction", float, "Only the last share of the text", group="Text", default="all"
        ),
    ] = None,
    eval_tokens: Annotated[
        int | None,
        options.number(
            "--eval-tokens", int, "At most N tokens, evenly spread", group="Text", default="all"
        ),
    ] = None,
    context_length: Annotated[
        int | None,
        options.number(
            "--context-length",
            int,
            "Tokens in a window",
            group="Windows",
            default="the model's, at most 1024",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        options.number(
            "--stride", int, "Tokens from window to window", group="Windows", default="no overlap"
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        options.number(
            "--batch-size", int, "Windows at once", group="Windows", default="by their size"
        ),
    ] = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: Annotated[
        str | None, options.choice("--dtype", DTYPES, group="Model", default="auto")
    ] = None,
    quantize: options.Quantize = None,
    threads: options.Threads = None,
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    """Measure how well a model predicts a text.

    Every token but the first is predicted once, from those before it in its window. With --stride
    N, windows overlap and only the last N tokens of each count, so that all have much before them:
    slower, and nearer to the truth. Documents follow each other, parted by what ends a text.

    Bits/byte counts the bytes of the text, and so compares models of different tokenizers.

    A run's own validation loss is that of its text with --val-fraction 0.1, and with --eval-tokens
    and --context-length where the run's config.toml has other ones than hold here.
    """
    from minigpt.commands import output
    from minigpt.commands.evaluate.measuring import Wanted, lines, measure, record
    from minigpt.commands.loading import use_threads

    use_threads(threads)
    measurement = measure(
        Wanted(
            model=model,
            paths=[*(data or ()), *(more_data or ())],
            val_fraction=val_fraction,
            eval_tokens=eval_tokens,
            context_length=context_length,
            stride=stride,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            quantize=quantize,
        )
    )
    if as_json:
        output.write_json(record(measurement))
    else:
        output.show(lines(measurement))
