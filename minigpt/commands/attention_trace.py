"""minigpt attention-trace."""

from typing import Annotated

import typer

from minigpt.commands import options


def attention_trace(
    prompt: options.Prompt = None,
    model: options.Model = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Layers to look at, as in 0,2,4-6", show_default="all"),
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="Heads to look at, layer.head, as in 4.2,5.*", show_default="all"),
    ] = None,
    sources: Annotated[
        int | None,
        typer.Option(
            help="Earlier tokens to show per token",
            show_default="as many as fit the line; 8 with --json",
            min=0,
        ),
    ] = None,
    reduce: Annotated[
        str, typer.Option(help="How heads become one row: mean, or max of each position")
    ] = "mean",
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.Seed = None,
    stop: options.Stop = None,
    num_samples: options.NumSamples = None,
    as_json: options.Json = False,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    debug: options.Debug = False,
) -> None:
    """Continue a prompt and show what each generated token attended to.

    A line per token, as it is generated: its probability; the share of attention that went to
    position 0, where heads put what they have no use for (the sink); the earlier tokens that got
    the most; and the rest. A row accounts for 100 %.

    The attention of a token is the row of the query that produced it, at the position before it,
    so a token is not among its own sources. Attention says where a head looked, not why the token
    came: weight is not influence.

    A token's spaces are shown as ␣, its line breaks as \\\\n, bytes that are no text as \\\\xe2.
    """
    sampling = options.sampling_config(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop,
        num_samples=num_samples,
    )
    from minigpt.errors import ConfigError, nearest

    if reduce not in ("mean", "max"):
        raise ConfigError(f"there is no --reduce {reduce!r}. {nearest(reduce, ('mean', 'max'))}")
    from minigpt.commands.loading import load
    from minigpt.console import make_console, spans_to_text, write_result
    from minigpt.generation.decoder import fresh_seed
    from minigpt.trace import terminal
    from minigpt.trace.file import to_json_line
    from minigpt.trace.selection import select_heads
    from minigpt.trace.tracer import TraceHeader, TraceStep, trace

    ready = load(model, prompt, device, dtype)
    config = ready.model.config
    selection = select_heads(config.n_layer, config.n_head, layers=layers, heads=heads)
    console = make_console(is_stderr=False)
    layout = terminal.TraceLayout(
        console.width,
        vocab_size=config.vocab_size,
        n_positions=min(config.context_length, len(ready.prompt) + sampling.max_new_tokens),
        n_sources=sources,
    )
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    for number in range(sampling.num_samples):
        events = trace(
            ready.model,
            ready.tokenizer,
            ready.prompt,
            sampling,
            selection=selection,
            reduce="mean" if reduce == "mean" else "max",
            n_sources=8 if as_json and sources is None else layout.n_sources,
            seed=first_seed + number,
            model_name=str(ready.folder),
        )
        pieces = []
        for event in events:
            if as_json:
                write_result(to_json_line(event) + "\n")
                continue
            if isinstance(event, TraceHeader):
                lines = [*terminal.header_lines(event, console.width), layout.heading()]
            elif isinstance(event, TraceStep):
                pieces.append(event.text)
                lines = layout.step(event)
            else:
                lines = terminal.footer_lines(event)
            for line in lines:
                console.print(spans_to_text(line))
        if not as_json:
            console.print(spans_to_text([("".join(pieces), "token")]))
        make_console(is_stderr=True).print(f"seed {first_seed + number}", style="dim")
