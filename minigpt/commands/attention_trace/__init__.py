"""minigpt attention-trace; the docstring of the command is its --help."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.commands import options
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.commands.attention_trace.output import Targets
    from minigpt.commands.loading import Ready
    from minigpt.config import SamplingConfig
    from minigpt.tracing.events import TraceEvent
    from minigpt.tracing.tracer import TraceConfig

_GROUP = "Attention"
_FILES = "Files"
_MEASURES = ("weight", "norm", "both")
_REDUCTIONS = ("mean", "max", "rollout")
_KNOCKOUTS = ("key", "value")
_VIEWS = ("lines", "text", "matrix", "heads")
_PICTURES = ("matrix", "strip")
_FILE_SOURCES = 8


def _file(flag: str, text: str) -> object:
    return options.option(flag, text, group=_FILES, metavar="FILE", parse=Path)


def attention_trace(
    prompt: options.Prompt = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    compile: options.Compile = None,
    threads: options.Threads = None,
    layers: Annotated[
        str | None,
        options.option(
            "--layers",
            "Layers to look at, as in 0,2,4-6",
            group=_GROUP,
            metavar="LIST",
            default="all",
        ),
    ] = None,
    heads: Annotated[
        str | None,
        options.option(
            "--heads",
            "Heads, layer.head, as in 4.2,5.*",
            group=_GROUP,
            metavar="LIST",
            default="all",
        ),
    ] = None,
    measure: Annotated[
        str | None,
        options.choice("--measure", _MEASURES, group=_GROUP, default=_MEASURES[0]),
    ] = None,
    reduce: Annotated[
        str | None,
        options.choice("--reduce", _REDUCTIONS, group=_GROUP, default=_REDUCTIONS[0]),
    ] = None,
    sources: Annotated[
        int | None,
        options.number(
            "--sources",
            int,
            "Earlier tokens to show",
            group=_GROUP,
            default=f"what fits; files {_FILE_SOURCES}",
        ),
    ] = None,
    sink: Annotated[
        str | None,
        options.option(
            "--sink",
            "The position that counts as the sink, or auto",
            group=_GROUP,
            metavar="N",
            default=0,
        ),
    ] = None,
    roles: Annotated[
        bool,
        typer.Option("--roles", help="Find the heads' roles first", rich_help_panel=_GROUP),
    ] = False,
    verify: Annotated[
        int | None,
        options.number(
            "--verify",
            int,
            "Knock out the N strongest sources of each token, and as many others",
            group=_GROUP,
            default=0,
        ),
    ] = None,
    knockout: Annotated[
        str | None,
        options.choice("--knockout", _KNOCKOUTS, group=_GROUP, default=_KNOCKOUTS[0]),
    ] = None,
    view: Annotated[
        str | None, options.choice("--view", _VIEWS, group="Output", default=_VIEWS[0])
    ] = None,
    position: Annotated[
        int | None,
        options.number(
            "--position",
            int,
            "The generated token that a text or strip is shaded by",
            group="Output",
            default="the last",
        ),
    ] = None,
    as_json: options.Json = False,
    out: Annotated[Path | None, _file("--out", "Write the trace, JSON lines")] = None,
    dense: Annotated[
        Path | None, _file("--dense", "Write every row of every head, safetensors")
    ] = None,
    html: Annotated[Path | None, _file("--html", "Write a page to explore it in a browser")] = None,
    svg: Annotated[Path | None, _file("--svg", "Draw it for a paper")] = None,
    png: Annotated[Path | None, _file("--png", "The same")] = None,
    picture: Annotated[
        str | None, options.choice("--picture", _PICTURES, group=_FILES, default=_PICTURES[0])
    ] = None,
    replay: Annotated[
        Path | None, _file("--replay", "Show what --out has written, without a model")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--diff",
            help="Compare two files of --out, of the same tokens",
            metavar="FILE FILE",
            show_default=False,
            rich_help_panel=_FILES,
        ),
    ] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = None,
    frequency_penalty: options.FrequencyPenalty = None,
    ignore_eos: options.IgnoreEos = False,
    stop: options.Stop = None,
    overflow: options.Overflow = None,
    num_samples: options.NumSamples = None,
    seed: options.Seed = None,
    debug: options.Debug = False,
) -> None:
    r"""Continue a prompt and show what each generated token attended to.

    A line per token, as it is generated: its probability; the share of attention that went to
    position 0, where heads put what they have no use for (the sink); the earlier tokens that got
    the most; and the rest. A row accounts for 100 %. It is the mean over the --heads of the
    --layers; --reduce max takes of each position the largest, which does not sum to 100 %, and
    rollout follows the mean down through the layers, over at most 1024 positions.

    --measure norm weighs a source by the length of what the heads added on its account.

    The attention of a token is the row of the query that produced it, at the position before it,
    so a token is not among its own sources. Attention says where a head looked, not why the token
    came: weight is not influence. --verify checks what was: it hides a source's key from that one
    query in all layers, so that the other weights grow to sum to 1 again, or with --knockout value
    makes its value 0 and leaves the weights; and does the same to a position near it.

    A token's spaces are shown as ␣, its line breaks as \n, bytes that are no text as \xe2.
    """
    from minigpt.commands.attention_trace.output import Targets

    sampling = options.sampling_config(locals())
    targets = Targets(
        view=view or _VIEWS[0],
        as_json=as_json,
        position=position,
        out=out,
        html=html,
        svg=svg,
        png=png,
        dense=dense,
        picture=picture or _PICTURES[0],
    )
    if diff is not None or replay is not None:
        if prompt is not None or model is not None or dense is not None:
            raise ConfigError(
                "--replay and --diff read files of --out: there is no model, and no prompt to go "
                "on from. Leave out PROMPT, --model and --dense."
            )
        if diff is not None:
            from minigpt.commands.attention_trace.diff import show_diff

            show_diff(*diff, as_json=as_json)
        elif replay is not None:
            _replay(replay, targets, n_sources=sources)
        return
    for flag, number in (("--sources", sources), ("--verify", verify)):
        if number is not None and number < 0:
            raise ConfigError(f"{flag} must be at least 0: it is {number}.")
    from minigpt.commands.loading import load
    from minigpt.tracing.api import MEASURES
    from minigpt.tracing.tracer import TraceConfig

    targets.check(sampling.num_samples)
    config = TraceConfig(
        layers=layers,
        heads=heads,
        measures=MEASURES[measure or _MEASURES[0]],
        reduce=reduce or _REDUCTIONS[0],  # type: ignore[arg-type]
        n_sources=_FILE_SOURCES if sources is None else sources,
        sink=_sink(sink),
        has_heads=targets.has_heads,
        n_verified=verify or 0,
        knockout=knockout or _KNOCKOUTS[0],  # type: ignore[arg-type]
        has_roles=roles,
    )
    ready = load(model, prompt, device, dtype, quantize=quantize, threads=threads)
    if not _trace(ready, sampling, config, targets, n_sources=sources, compile=compile):
        raise typer.Exit(130)


def _sink(text: str | None) -> int | None:
    if text == "auto":
        return None
    try:
        return int(text or 0)
    except ValueError:
        raise ConfigError(f"--sink takes a position or auto: it is {text!r}.") from None


def _trace(
    ready: "Ready",
    sampling: "SamplingConfig",
    config: "TraceConfig",
    targets: "Targets",
    *,
    n_sources: int | None,
    compile: bool | None,
) -> bool:
    """Trace each sample in turn; tell whether all came to their end."""
    from contextlib import nullcontext
    from dataclasses import replace

    from minigpt.checkpoint.weights import weights_sha256
    from minigpt.commands.attention_trace.output import Shower
    from minigpt.console import make_console
    from minigpt.generation.api import is_compiled
    from minigpt.generation.decoder import fresh_seed
    from minigpt.tracing.analysis.dense import DenseWriter
    from minigpt.tracing.lines import TraceLayout
    from minigpt.tracing.tracer import trace

    shape = ready.model.config
    layout = TraceLayout(
        make_console(is_stderr=False).width,
        vocab_size=shape.vocab_size,
        n_positions=min(shape.context_length, len(ready.prompt) + sampling.max_new_tokens),
        n_sources=n_sources,
        measures=config.measures,
    )
    if n_sources is None:
        config = replace(config, n_sources=max(config.n_sources, layout.n_sources))
    digest = weights_sha256(ready.folder) if targets.out is not None else None
    compiles = is_compiled(ready.model, compile)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    with Shower(targets, layout) as shower:
        for seed in range(first_seed, first_seed + sampling.num_samples):
            rows = None
            if targets.dense is not None:
                rows = DenseWriter(
                    targets.dense, n_layer=shape.n_attention_layer, n_head=shape.n_head
                )
            with rows or nullcontext():
                events = trace(
                    ready.model,
                    ready.tokenizer,
                    ready.prompt,
                    sampling,
                    config,
                    seed=seed,
                    model_name=str(ready.folder),
                    model_sha256=digest,
                    compiles=compiles,
                    dense=rows,
                )
                is_whole = shower.show(_after_compiling(events, compiles))
                if rows is not None:
                    rows.close({"model": str(ready.folder)[-1000:], "seed": str(seed)})
            make_console(is_stderr=True).print(f"seed {seed}", style="dim")
            if not is_whole:
                return False
    return True


def _replay(path: Path, targets: "Targets", *, n_sources: int | None) -> None:
    from minigpt.commands.attention_trace.output import Shower
    from minigpt.console import make_console
    from minigpt.tracing.analysis.reader import read_traces
    from minigpt.tracing.lines import TraceLayout

    traces = read_traces(path)
    targets.check(len(traces))
    if targets.out is not None:
        raise ConfigError("--out and --replay name the same thing. Copy the file.")
    for trace in traces:
        layout = TraceLayout(
            make_console(is_stderr=False).width,
            vocab_size=1 + max(token.id for token in trace.tokens),
            n_positions=len(trace.tokens),
            n_sources=n_sources,
            measures=trace.header.measures,
        )
        with Shower(targets, layout) as shower:
            shower.show([trace.header, *trace.steps, trace.footer])


def _after_compiling(events: "Iterator[TraceEvent]", compiles: bool) -> "Iterator[TraceEvent]":
    from minigpt.commands.loading import compiling

    with compiling(compiles):
        header = next(events)
    yield header
    yield from events
