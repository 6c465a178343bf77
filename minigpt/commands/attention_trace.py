"""minigpt attention-trace; the docstring of the command is its --help."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.commands import options
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.tracing.events import TraceEvent
    from minigpt.tracing.terminal import TraceLayout

_GROUP = "Attention"
_REDUCTIONS = ("mean", "max")
_JSON_SOURCES = 8


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
            default=f"what fits; JSON {_JSON_SOURCES}",
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
    as_json: options.Json = False,
    debug: options.Debug = False,
) -> None:
    r"""Continue a prompt and show what each generated token attended to.

    A line per token, as it is generated: its probability; the share of attention that went to
    position 0, where heads put what they have no use for (the sink); the earlier tokens that got
    the most; and the rest. A row accounts for 100 %. It is the mean over the --heads of the
    --layers, or of each position the largest (--reduce max, which does not sum to 100 %).

    The attention of a token is the row of the query that produced it, at the position before it,
    so a token is not among its own sources. Attention says where a head looked, not why the token
    came: weight is not influence.

    A token's spaces are shown as ␣, its line breaks as \n, bytes that are no text as \xe2.
    """
    sampling = options.sampling_config(locals())
    if sources is not None and sources < 0:
        raise ConfigError(f"--sources must be at least 0: it is {sources}.")
    if sampling.overflow != "stop":
        raise ConfigError(
            "--overflow slide would encode again what was traced. Trace at most a context window, "
            "or generate without a trace."
        )
    from minigpt.commands.loading import load
    from minigpt.console import make_console
    from minigpt.generation.api import is_compiled
    from minigpt.generation.decoder import fresh_seed
    from minigpt.tracing.terminal import TraceLayout
    from minigpt.tracing.tracer import TraceConfig, trace

    ready = load(model, prompt, device, dtype, quantize=quantize, threads=threads)
    config = ready.model.config
    layout = TraceLayout(
        make_console(is_stderr=False).width,
        vocab_size=config.vocab_size,
        n_positions=min(config.context_length, len(ready.prompt) + sampling.max_new_tokens),
        n_sources=sources,
    )
    compiles = is_compiled(ready.model, compile)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    for seed in range(first_seed, first_seed + sampling.num_samples):
        events = trace(
            ready.model,
            ready.tokenizer,
            ready.prompt,
            sampling,
            TraceConfig(
                layers=layers,
                heads=heads,
                reduce="max" if reduce == "max" else "mean",
                n_sources=_JSON_SOURCES if as_json and sources is None else layout.n_sources,
            ),
            seed=seed,
            model_name=str(ready.folder),
            compiles=compiles,
        )
        shown = _after_compiling(events, compiles)
        is_whole = _show(shown, _show_json if as_json else _Lines(layout))
        make_console(is_stderr=True).print(f"seed {seed}", style="dim")
        if not is_whole:
            raise typer.Exit(130)


def _after_compiling(events: "Iterator[TraceEvent]", compiles: bool) -> "Iterator[TraceEvent]":
    from minigpt.commands.loading import compiling

    with compiling(compiles):
        header = next(events)
    yield header
    yield from events


def _show(events: "Iterable[TraceEvent]", show: "Callable[[TraceEvent], None]") -> bool:
    """Show a trace to its end, or to a footer when Ctrl-C ends it; tell whether it was whole."""
    from minigpt.tracing.events import TraceFooter, TraceStep

    started, n_tokens = time.perf_counter(), 0
    try:
        for event in events:
            show(event)
            n_tokens += isinstance(event, TraceStep)
    except KeyboardInterrupt:
        seconds = time.perf_counter() - started
        show(TraceFooter(n_tokens, finish=None, seconds=seconds, worst_row_sum_error=None))
        return False
    return True


def _show_json(event: "TraceEvent") -> None:
    from minigpt.console import write_result
    from minigpt.tracing.file import to_json_line

    write_result(to_json_line(event) + "\n")


class _Lines:
    """Shows events as lines, and below the footer the text that came of them."""

    def __init__(self, layout: "TraceLayout") -> None:
        from minigpt.console import make_console

        self.layout = layout
        self.console = make_console(is_stderr=False)
        self.pieces: list[str] = []

    def __call__(self, event: "TraceEvent") -> None:
        from minigpt.console import spans_to_text
        from minigpt.tracing import terminal
        from minigpt.tracing.events import TraceHeader, TraceStep

        if isinstance(event, TraceHeader):
            lines = [*terminal.header_lines(event, self.console.width), self.layout.heading()]
        elif isinstance(event, TraceStep):
            self.pieces.append(event.text)
            lines = self.layout.step(event)
        else:
            lines = [*terminal.footer_lines(event), [], [("".join(self.pieces), "token")]]
        for line in lines:
            self.console.print(spans_to_text(line))
