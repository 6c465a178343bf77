"""minigpt generate; the docstring of the command is its --help."""

from typing import Annotated

import typer

from minigpt.commands.options import Json, ModelSource, Option, Prompt, command
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.rings import ring


@command
def generate(
    prompt: Prompt = None,
    *,
    source: ModelSource,
    sampling: SamplingConfig,
    interactive: Annotated[bool, Option("Continue each typed line; Ctrl-D ends", "Output")] = False,
    as_json: Json = False,
    stream: Annotated[bool, Option("Print text as it is generated", "Output")] = True,
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
    if interactive:
        _check_interactive(sampling, prompt)
    from minigpt.commands.generate.samples import SampleDisplay
    from minigpt.commands.loading import compiling, load
    from minigpt.generation.api import is_compiled, make_decoder
    from minigpt.generation.decoder import fresh_seed
    from minigpt.generation.stream import stream_samples

    ready = load(source, prompt)
    display = SampleDisplay(ready, sampling, as_json=as_json, streams=stream)
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    if interactive:
        ring("commands.generate.interactive").converse(
            ready,
            sampling,
            display,
            seed=seed,
            compile=source.compile,
            begins=prompt is not None,
        )
        return
    with compiling(is_compiled(ready.model, source.compile)):
        decoder = make_decoder(ready.model, ready.prompt, sampling, compile=source.compile)
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
