"""minigpt attention-trace; the command's docstring is its --help."""

from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.commands.options import (
    Fields,
    Interventions,
    ModelSource,
    Option,
    Prompt,
    PromptForm,
    command,
)
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.rings import find_ring, ring
from minigpt.tracing.config import SAMPLING, config_class

if TYPE_CHECKING:
    from minigpt.commands.attention_trace.targets import Targets
    from minigpt.commands.loading import Ready
    from minigpt.tracing.analysis_config import AnalysisConfig as TraceConfig
    from minigpt.tracing.events import TraceEvent
else:
    TraceConfig = config_class()
    if _targets := find_ring("commands.attention_trace.targets"):
        Targets = _targets.Targets
    else:
        only_lines = {"are_lines": True, "has_heads": False, "as_json": False}
        Targets = make_dataclass("Targets", (), namespace=only_lines)

_FILES = "Files"
_RECORDED = "commands.attention_trace.recorded"


@command
def attention_trace(
    prompt: Prompt = None,
    *,
    form: PromptForm,
    source: ModelSource,
    config: TraceConfig,
    interventions: Interventions,
    targets: Targets,
    replay: Annotated[
        Path | None, Option("Show a file that --out wrote, without a model", _FILES)
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--diff",
            help="Compare two files that --out wrote for the same tokens",
            metavar="FILE FILE",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    sampling: Annotated[
        SamplingConfig,
        Fields(without=("logprobs",), unlisted=("overflow",), defaults=SAMPLING),
    ],
) -> None:
    r"""Continue a prompt and show what each generated token attended to.

    One line per generated token: its probability, the attention on position 0 (the sink, which
    heads use when nothing else matches), the earlier tokens with the most attention, and the rest.
    A row sums to 100 %. It is the mean over --heads and --layers; --reduce max takes the maximum
    at each position, which does not sum to 100 %, and rollout multiplies the mean attention of the
    layers, over at most 1024 positions.

    --measure norm weighs a source by the norm of what the heads added from it. logit, gradient and
    integrated explain the logit of the token, in logits with a sign: what the heads brought to it
    directly from each position, gradient x input, and integrated gradients.

    The attention of a token is the row of the query that produced it, at the position before it,
    so a token is not among its own sources. Attention weight is not influence: it shows where a
    head looked, not why the token was generated. --n-verified measures influence: it hides the key
    of a source from that query in all layers, so that the other weights are renormalized, or with
    --knockout value zeroes its value and keeps the weights; and does the same at a nearby position
    as a control.

    --prompt-rows shows the tokens of the prompt too, from the second one on, with the probability
    of the token that follows, and --max-new-tokens 0 shows nothing else. The text of --force comes
    first, as if it had been sampled, and counts toward --max-new-tokens. The probabilities of
    --candidates are the model's own, before any sampling option.

    --ablate sets the output of heads, before W_O, to 0 or with --ablate-mean to their mean over the
    prompt; --patch replaces it, at --patch-position, by what it is in a run on the prompt of
    --patch-from, which has as many tokens. --diff compares two such traces.

    With --chat, the prompt is a message of the user, through the model's chat template, whose
    special tokens are sources like all others.

    In a token, ␣ is a space, \n a line break, and \xe2 a byte that is not valid text. Of the tokens
    that share a character, the first shows it, as 日, and the others continue it, as ⋯日; --json
    has the bytes of each.
    """
    if diff is not None:
        ring(_RECORDED).show_diff(*diff, as_json=targets.as_json)
        return
    if replay is not None:
        ring(_RECORDED).replay(replay, targets, config)
        return
    if form.chat and prompt is None:
        raise ConfigError("--chat answers a message. Give a PROMPT.")
    from minigpt.commands.attention_trace.output import TraceOutput
    from minigpt.commands.loading import load_to_continue
    from minigpt.console import note
    from minigpt.generation.decoder import fresh_seed
    from minigpt.tracing.tracer import trace

    if not targets.are_lines:
        ring("commands.attention_trace.files").check_files(targets, sampling.num_samples, config)
    ready = load_to_continue(source, prompt, form, sampling, interventions)
    output = TraceOutput(model=ready.folder)
    if described := find_ring("commands.attention_trace.described"):
        output, config = described.output_for(ready, sampling, config, targets)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    is_whole = True
    with output:
        for seed in range(first_seed, first_seed + sampling.num_samples):
            events = trace(
                ready.model,
                ready.tokenizer,
                ready.prompt,
                sampling,
                config,
                seed=seed,
                model_name=str(ready.folder),
                compiles=source.compile,
                forced=ready.forced,
                intervention=ready.intervention,
                special=form.special,
                dense=output.dense,
            )
            if seed == first_seed:
                events = _after_compiling(events, ready, source.compile)
            is_whole = output.show(events)
            note(f"seed {seed}")
            if not is_whole:
                break
    if not is_whole:
        raise typer.Exit(130)


def _after_compiling(
    events: "Iterator[TraceEvent]", ready: "Ready", compile: bool | None
) -> "Iterator[TraceEvent]":
    from minigpt.commands.loading import compiling

    with compiling(ready.model, compile):
        header = next(events)
    yield header
    yield from events
