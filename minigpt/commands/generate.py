"""minigpt generate."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from minigpt.commands import options


def generate(
    prompt: options.Prompt = None,
    model: options.Model = None,
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
    stream: Annotated[bool, typer.Option(help="Print text as it is decoded")] = True,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    debug: options.Debug = False,
) -> None:
    """Continue a prompt with a trained model.

    The text goes to standard output as it is decoded; speed and seed go to standard error.
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
    import time

    from minigpt.commands.loading import load
    from minigpt.console import make_console, write_result
    from minigpt.generation.decoder import Decoder, fresh_seed
    from minigpt.generation.stream import stream_text

    console = make_console(is_stderr=True)
    ready = load(model, prompt, device, dtype)
    first_seed = fresh_seed() if sampling.seed is None else sampling.seed
    decoder = Decoder(ready.model, ready.prompt)
    for number in range(sampling.num_samples):
        if number and not as_json:
            write_result("\n" + "-" * 20 + "\n")
        if prompt and prompt != "-" and not as_json:
            write_result(prompt)
        sample_seed = first_seed + number
        started = time.perf_counter()
        pieces = []
        n_tokens, finish = 0, None
        steps = decoder.generate(
            sampling, seed=sample_seed, end_of_text=ready.tokenizer.end_of_text
        )
        for item in stream_text(steps, ready.tokenizer, sampling.stop):
            n_tokens, finish = n_tokens + 1, item.step.finish
            pieces.append(item.text)
            if stream and not as_json:
                write_result(item.text)
        seconds = time.perf_counter() - started
        text = "".join(pieces)
        if as_json:
            result = {
                "text": text,
                "prompt": ready.tokenizer.decode(ready.prompt),
                "finish": finish,
                "n_prompt_tokens": len(ready.prompt),
                "n_tokens": n_tokens,
                "seed": sample_seed,
                "tokens_per_s": round(n_tokens / seconds, 1),
                "model": str(ready.folder),
                "sampling": asdict(sampling),
            }
            write_result(json.dumps(result) + "\n")
        else:
            write_result(("" if stream else text) + "\n")
        note = {"context": "; the context window is full"}.get(finish or "", "")
        console.print(
            f"{n_tokens} tokens, {n_tokens / seconds:.4g} tokens/s, seed {sample_seed}{note}",
            style="dim",
        )
