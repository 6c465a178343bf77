"""minigpt evaluate; the command's docstring is its --help."""

from dataclasses import dataclass, replace
from math import isfinite
from typing import Annotated, Literal

from minigpt.commands.options import CORPORA, Fields, Json, ModelSource, argument, command
from minigpt.fields import Checked, option
from minigpt.run_config import Dtype


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Checked):
    """The text to evaluate on, and how to split it into windows."""

    data: tuple[str, ...] = option((), group="Text", metavar="PATH")
    """Another DATA; repeat for several."""
    val_fraction: float | None = option(None, "(0, 1)", group="Text", shown="all")
    """Fraction of the text to evaluate on: the part that training on it would validate on."""
    eval_tokens: int | None = option(None, "[1, inf)", group="Text", shown="all")
    """Maximum number of tokens to predict, in evenly spaced windows, at least one."""
    format: Literal["text", "jsonl", "json", "csv", "parquet"] | None = option(
        None, group="Text", shown="by suffix or content"
    )
    """Format of all files."""
    field: str | None = option(None, group="Text", metavar="NAME", shown="text")
    """Field or column with the text of each row."""
    encoding: str | None = option(None, group="Text", metavar="NAME", shown="utf-8")
    """Character encoding of the files, as named in Python."""
    skip_bad: bool = option(False, group="Text")
    """Skip and count rows that have no text, are malformed or cannot be decoded."""
    special: bool = option(False, group="Text")
    """Parse special tokens in the text, such as <|endoftext|>."""
    skip_unencodable: bool = option(False, group="Text")
    """Skip and count characters that are not in the vocabulary."""
    chat: bool = option(False, group="Text")
    """Read rows as conversations: messages, prompt and completion, or instruction and output."""
    loss_on: Literal["completion", "all"] | None = option(
        None, group="Text", shown="completion with --chat"
    )
    """Tokens of conversations to evaluate on. completion: the assistant's."""
    chat_template: str | None = option(None, group="Text", metavar="FILE", shown="the model's")
    """Chat template: a Jinja file, or the name of one of several in the model folder."""
    context_length: int | None = option(
        None, "[1, inf)", group="Windows", shown="the model's, at most 1024"
    )
    """Tokens per window."""
    stride: int | None = option(None, "[1, inf)", group="Windows", shown="no overlap")
    """Tokens between the starts of consecutive windows."""
    batch_size: int | None = option(None, "[1, inf)", group="Windows", shown="by their size")
    """Windows per forward pass."""
    dtype: Dtype = option("auto", group="Model", shown="auto, float32 on a CPU")
    """Compute dtype, by autocast."""


@command
def evaluate(
    data: Annotated[
        list[str] | None,
        argument("DATA", f"Files, folders, globs, -, or {CORPORA} [the run's validation text]"),
    ] = None,
    *,
    source: Annotated[ModelSource, Fields(without=("compile", "dtype"))],
    config: EvaluationConfig,
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts a text.

    Each token is predicted once, from the tokens before it in its window. With --stride N, windows
    overlap and only the last N tokens of each count, so that every token has a long context:
    slower, but more accurate.

    A separator comes before each document, including the first: the end-of-text token, then what
    the tokenizer puts before a prompt, such as <s>. So the first token of a text is predicted too,
    and so are the separators of later documents. Only if the vocabulary has no separator, and in a
    part of a text (--val-fraction), the first token is not predicted.

    Bits/byte counts the bytes of the text, so it can be compared between tokenizers.

    Without DATA, the text is the run's own validation text, which reproduces its validation loss;
    also give the eval_tokens and context_length of its config.toml if they differ from the defaults
    here, and --dtype bfloat16 if the run used it. As in `generate`, a CPU computes in float32 by
    default: the loss is then the same on every CPU.
    """
    from minigpt.commands import tables
    from minigpt.commands.evaluate.measuring import lines, measure

    result = measure(replace(config, data=(*(data or ()), *config.data)), source)
    if as_json:
        finite = {k: v for k, v in result.items() if not isinstance(v, float) or isfinite(v)}
        tables.write_json(dict.fromkeys(result) | finite)  # NaN and inf become null
    else:
        tables.show(lines(result))
