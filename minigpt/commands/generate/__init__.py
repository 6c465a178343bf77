"""minigpt generate; --help is the command's docstring and its text in help/texts.py."""

from typing import Annotated

from minigpt.commands.options import (
    Interventions,
    Json,
    ModelSource,
    Option,
    Prompt,
    PromptForm,
    command,
)
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.rings import find_ring, ring


@command
def generate(
    prompt: Prompt = None,
    *,
    form: PromptForm,
    source: ModelSource,
    sampling: SamplingConfig,
    interventions: Interventions,
    interactive: Annotated[bool, Option("Continue each typed line; Ctrl-D ends", "Output")] = False,
    as_json: Json = False,
    stream: Annotated[bool, Option("Print text as it is generated", "Output")] = True,
) -> None:
    r"""Continue a prompt with a trained model.

    Standard output receives the generated text and a line break, nothing else; a terminal shows the
    prompt before it. Speed and seed go to standard error.

    Generation ends at --max-new-tokens, a --stop string, the model's end-of-text token or a full
    context window; --json reports which (finish_reason). With --overflow slide, a full window keeps
    its first 4 tokens and its newest half, drops the rest, and generation continues.

    Sampling applies these in order: ignore-eos, repetition penalty, presence and frequency
    penalties, temperature, top-k, top-p, min-p. Logprobs are those of the model, before any
    of these.
    """
    if interactive and prompt == "-":
        raise ConfigError(
            "--interactive reads lines from standard input. Give the prompt as an argument."
        )
    if form.chat and prompt is None and not interactive:
        raise ConfigError("--chat answers a message. Give a PROMPT, or --interactive.")
    from minigpt.commands.loading import compiling, load_to_continue
    from minigpt.console import write_result
    from minigpt.generation.decoder import fresh_seed
    from minigpt.generation.loading import make_decoder, require_new_tokens
    from minigpt.generation.stream import stream_text

    require_new_tokens(sampling)
    is_plain = stream and not (as_json or interactive or sampling.logprobs)
    find = find_ring if is_plain and sampling.num_samples == 1 else ring
    samples = find("commands.generate.samples")
    n_rows = sampling.num_samples
    prompted = load_to_continue(source, prompt, form, sampling, interventions, n_rows=n_rows)
    if not as_json and (suggested := find_ring("commands.help.suggested")):
        suggested.note_suggested(prompted.folder, sampling)
    seed = fresh_seed() if sampling.seed is None else sampling.seed
    display = samples and samples.SampleDisplay(prompted, sampling, as_json=as_json, streams=stream)
    if interactive:
        is_first = prompt is not None
        converse = ring("commands.generate.interactive").converse
        converse(
            prompted, sampling, display, source, seed, has_prompt=is_first, special=form.special
        )
        return
    with compiling(prompted.model, source.compile, n_rows):
        decoder = make_decoder(prompted.model, prompted.prompt, sampling, compile=source.compile)
    if display:
        display.show_samples(decoder, seed)
        return
    ends = prompted.tokenizer.end_of_text_ids
    steps = decoder.generate(sampling, seed=seed, end_of_text=ends, forced=prompted.forced)
    for item in stream_text(steps, prompted.tokenizer, sampling.stop):
        write_result(item.text)
    write_result("\n")
