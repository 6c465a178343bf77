"""minigpt attention-trace; --help is the command's docstring and its text in help/texts.py."""

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
    from minigpt.tracing.analysis_config import AnalysisConfig as TraceConfig
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
    A row sums to 100%. It is the mean over --heads and --layers; --reduce max takes the maximum
    at each position, which does not sum to 100%, and rollout multiplies the mean attention of the
    layers, over at most 1024 positions.
    """
    if diff is not None:
        ring(_RECORDED).show_diff(*diff, as_json=targets.as_json)
        return
    if replay is not None:
        ring(_RECORDED).replay(replay, targets, config)
        return
    if form.chat and prompt is None:
        raise ConfigError("--chat answers a message. Give a PROMPT.")
    from minigpt.checkpoint.resolve import shown_name
    from minigpt.commands.attention_trace.output import TraceOutput
    from minigpt.commands.loading import load_to_continue
    from minigpt.console import note
    from minigpt.generation.decoder import fresh_seed
    from minigpt.tracing.tracer import trace

    if not targets.are_lines:
        ring("commands.attention_trace.files").check_files(targets, sampling.num_samples, config)
    prompted = load_to_continue(source, prompt, form, sampling, interventions)
    if not targets.as_json and (suggested := find_ring("commands.help.suggested")):
        suggested.note_suggested(prompted.folder, sampling)
    output = TraceOutput(model=prompted.folder)
    if described := find_ring("commands.attention_trace.described"):
        output, config = described.output_for(prompted, sampling, config, targets)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    is_complete = True
    with output:
        for seed in range(first_seed, first_seed + sampling.num_samples):
            events = trace(
                prompted.model,
                prompted.tokenizer,
                prompted.prompt,
                sampling,
                config,
                seed=seed,
                model_name=shown_name(prompted.folder),
                compile=source.compile,
                forced=prompted.forced,
                intervention=prompted.intervention,
                special=form.special,
                dense=output.dense,
            )
            if seed == first_seed and (shown := find_ring("commands.display.compiling")):
                events = shown.showing_start(events, prompted.model, source.compile)
            is_complete = output.show(events)
            note(f"seed {seed}")
            if not is_complete:
                break
    if not is_complete:
        raise typer.Exit(130)
