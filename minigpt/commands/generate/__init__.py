"""minigpt generate; the docstring of the command is its --help."""

from typing import TYPE_CHECKING, Annotated

import typer

from minigpt.commands import options
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from minigpt.config import SamplingConfig


def generate(
    prompt: options.Prompt = None,
    model: options.Model = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    compile: options.Compile = None,
    threads: options.Threads = None,
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
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Go on from each line that is typed; Ctrl-D ends",
            rich_help_panel="Output",
        ),
    ] = False,
    logprobs: options.Logprobs = None,
    as_json: options.Json = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream/--no-stream",
            help="Print text as it is decoded, or at the end [stream]",
            show_default=False,
            rich_help_panel="Output",
        ),
    ] = True,
    debug: options.Debug = False,
) -> None:
    r"""Continue a prompt with a trained model.

    Standard output gets the generated text and a line break, nothing else: the prompt is no part
    of it, and only shown before it on a terminal. Speed and seed go to standard error.

    The text ends with --max-new-tokens, a --stop text, the end of the document as the model sees
    it, or a full context window; --json says which (finish_reason). With --overflow slide, a full
    window keeps its first 4 tokens and its newest half, forgets the rest, and goes on.

    The options of sampling apply in this order: ignore-eos, the repetition penalty (of the prompt
    and what was generated), the presence and frequency penalties (of what was generated),
    temperature, top-k, top-p, min-p. The logprobs are the model's own, before all of them.

    Several samples are decoded together; sample i is the one that --seed SEED+i gives alone.

    With --interactive, a text goes on from what was said and then typed: a line as it is, without
    its end; one that ends with \ and the next one, with the line break between; an empty one lets
    the model go on. Ctrl-C stops an answer.
    """
    sampling = options.sampling_config(locals())
    if interactive:
        _check_interactive(sampling, prompt)
    from minigpt.commands.generate.samples import SampleDisplay
    from minigpt.commands.loading import compiling, load
    from minigpt.generation.api import is_compiled, make_decoder
    from minigpt.generation.decoder import fresh_seed
    from minigpt.generation.stream import stream_samples

    ready = load(model, prompt, device, dtype, quantize=quantize, threads=threads)
    display = SampleDisplay(ready, sampling, as_json=as_json, streams=stream)
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    if interactive:
        from minigpt.commands.generate.interactive import converse

        converse(ready, sampling, display, seed=seed, compile=compile, begins=prompt is not None)
        return
    with compiling(is_compiled(ready.model, compile)):
        decoder = make_decoder(ready.model, ready.prompt, sampling, compile=compile)
    is_whole = display.show(
        stream_samples(decoder, ready.tokenizer, sampling, seed=seed),
        seed=seed,
        prompt=ready.text,
        n_prompt_tokens=len(ready.prompt),
        n_samples=sampling.num_samples,
    )
    if not is_whole:
        raise typer.Exit(130)


def _check_interactive(sampling: "SamplingConfig", prompt: str | None) -> None:
    if sampling.num_samples > 1:
        raise ConfigError("--interactive goes on from one answer. Leave --num-samples out.")
    if prompt == "-":
        raise ConfigError(
            "--interactive reads what is typed from standard input. Give the prompt as an argument."
        )
