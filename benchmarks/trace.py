"""Cost of tracing: decoding with an attention trace, relative to decoding without.

    python benchmarks/trace.py
    python benchmarks/trace.py --shape mini --compile --only "lines" "lines, --measure logit"
    python benchmarks/trace.py --memory
    python benchmarks/trace.py --transformers

A model with random weights continues one prompt in several variants in one process. The variants
alternate, one complete text each, in shuffled order, so that other load affects all of them; not
token by token, because a trace shows several tokens at a time. The text of the trace goes to a
file, as with `minigpt attention-trace > file`. A ratio is the median over the rounds; the one in
brackets is that of the sums. The prompt and the first token are not counted.

--memory decodes a thousand tokens in a separate process per variant, and prints the difference of
its peak resident memory from that without a trace. --transformers does both for transformers with
output_attentions, for comparison.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The same for all contenders; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import torch
from machine import child_environment, machine_facts
from random_models import BYTES, ENDLESS, SHAPES, shape_of, write_random
from rich.console import Console

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.loading import load
from minigpt.generation.stream import stream_text
from minigpt.model.gpt import GPT
from minigpt.styles import THEME, print_lines
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.file import to_json_line
from minigpt.tracing.findings import TraceStep
from minigpt.tracing.lines import make_layout
from minigpt.tracing.tracer import trace

OFF = "off"
WAYS: dict[str, AnalysisConfig] = {
    "lines": AnalysisConfig(),
    "lines, --measure both": AnalysisConfig(measure="both"),
    "--out, every head": AnalysisConfig(has_heads=True),
    "lines, --n-verified 3": AnalysisConfig(n_verified=3),
    "lines, --n-verified all": AnalysisConfig(n_verified="all"),
    "lines, --measure logit": AnalysisConfig(measure="logit"),
}
SLOW_WAYS: dict[str, AnalysisConfig] = {
    "lines, --measure gradient": AnalysisConfig(measure="gradient"),
    "lines, --measure integrated": AnalysisConfig(measure="integrated"),
}
"""Variants that run their own forward passes over all previous tokens."""
WIDTH = 140
TRANSFORMERS = ("transformers", "transformers, output_attentions")


def decoding(
    model: GPT, prompt: list[int], n_new: int, way: str, folder: Path, *, compiles: bool
) -> Iterator[None]:
    """Decode one token per turn, with the output of a variant."""
    sampling = SamplingConfig(temperature=0, max_new_tokens=n_new, ignore_eos=True)
    config = (WAYS | SLOW_WAYS).get(way, AnalysisConfig())
    if way == OFF:
        decoder = Decoder(model, prompt, max_new_tokens=n_new, compile=compiles)
        for _ in stream_text(decoder.generate(sampling, seed=0), BYTES):
            yield
        return
    events = trace(
        model,
        ENDLESS,
        prompt,
        sampling,
        config,
        seed=0,
        compile=compiles,
    )
    layout = make_layout(
        WIDTH,
        vocab_size=model.config.vocab_size,
        n_positions=len(prompt) + n_new,
        measures=config.measures,
    )
    with (folder / f"{way}.txt").open("w") as file:
        console = Console(file=file, theme=THEME, width=WIDTH, highlight=False, soft_wrap=True)
        for event in events:
            if way.startswith("--out"):
                file.write(to_json_line(event) + "\n")
            elif isinstance(event, TraceStep):
                print_lines(console, layout.step(event))
            if isinstance(event, TraceStep):
                yield


def transformers_decoding(
    folder: Path, prompt: list[int], n_new: int, *, attentions: bool
) -> Iterator[None]:
    """Decode with transformers, one token per turn, with or without attention maps."""
    from transformers import AutoModelForCausalLM, DynamicCache

    kernel = "eager" if attentions else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel).eval()
    cache = DynamicCache(config=model.config)
    tokens = torch.tensor([prompt])
    kept = []
    for _ in range(n_new):
        with torch.inference_mode():
            out = model(tokens, past_key_values=cache, output_attentions=attentions)
        kept.append(out.attentions)  # as generate does if attentions are requested
        tokens = out.logits[:, -1:].argmax(dim=-1)
        yield


def timed(starts: dict[str, Callable[[], Iterator[None]]], n_rounds: int) -> dict[str, list[float]]:
    """Return the seconds per token of each variant in each round; the variants alternate."""
    seconds: dict[str, list[float]] = {way: [] for way in starts}
    for number in range(n_rounds + 1):
        for way in random.sample(list(starts), len(starts)):
            tokens = starts[way]()
            next(tokens)
            started = time.perf_counter()
            n_tokens = sum(1 for _ in tokens)
            if number:  # the first round warms up
                seconds[way].append((time.perf_counter() - started) / n_tokens)
    return seconds


def table(seconds: dict[str, list[float]], bases: dict[str, str]) -> list[dict[str, Any]]:
    """Print a table of the variants; return its rows."""
    rows = []
    print("| trace | ms/token | relative |\n| --- | --- | --- |")
    for way, times in seconds.items():
        base = seconds[bases[way]]
        ratio = sum(times) / sum(base)
        median = statistics.median(a / b for a, b in zip(times, base, strict=True))
        step_ms = 1000 * statistics.median(times)
        rows.append({"way": way, "step_ms": step_ms, "ratio": ratio, "median_ratio": median})
        shown = "1" if way == bases[way] else f"**{median:.3f}** ({ratio:.3f})"
        print(f"| {way} | {step_ms:.2f} | {shown} |")
    return rows


def peak_memory(arguments: argparse.Namespace, way: str) -> float:
    """Return the peak memory of a process that decodes with a variant, in MiB."""
    words = [sys.executable, __file__, "--shape", arguments.shape, "--one", way]
    words += ["--threads", str(arguments.threads), "--n-new", str(arguments.n_new)]
    run = subprocess.run(
        words, capture_output=True, text=True, check=True, env=child_environment(arguments.threads)
    )
    return float(run.stdout.splitlines()[-1])


def measure_memory(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Print the additional memory of each variant."""
    rows = []
    groups = [(OFF, *WAYS)] + ([TRANSFORMERS] if arguments.transformers else [])
    print(f"\n| trace of {arguments.n_new} tokens | peak MiB | difference |")
    print("| --- | --- | --- |")
    for names in groups:
        base = 0.0
        for way in names:
            peak = peak_memory(arguments, way)
            base = base or peak
            rows.append({"way": way, "peak_mib": peak, "extra_mib": peak - base})
            print(f"| {way} | {peak:.0f} | {peak - base:.1f} |", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--n-prompt", type=int, default=24)
    parser.add_argument(
        "--n-new", type=int, default=None, help="new tokens [128; 1000 with --memory]"
    )
    parser.add_argument("--rounds", type=int, default=5, help="texts of each variant")
    parser.add_argument("--only", nargs="+", metavar="TRACE", help="time only these, and off")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--gradients", action="store_true", help="time the gradient measures too")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.n_new = arguments.n_new or (1000 if arguments.memory else 128)
    torch.set_num_threads(arguments.threads)
    facts = machine_facts("cpu", ["torch", "transformers"]) | {"threads": arguments.threads}
    if arguments.memory:
        result = measure_memory(arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            result = run_in(Path(folder), arguments)
    if arguments.one is None:
        print(f"\n{json.dumps(facts)}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": facts, "rows": result}, indent=2))


def run_in(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all variants in one process; with --one, decode one and print its peak memory."""
    n_new = arguments.n_new
    prompt = [random.Random(0).randrange(32, 127) for _ in range(arguments.n_prompt)]
    write_random(folder, shape_of(arguments.shape, arguments.n_prompt + n_new))
    options = {"dtype": arguments.dtype, "compile": arguments.compile}
    model = load(folder, device="cpu", for_decoding=True, **options).model

    def ours(way: str) -> Callable[[], Iterator[None]]:
        return lambda: decoding(model, prompt, n_new, way, folder, compiles=arguments.compile)

    def theirs(way: str) -> Callable[[], Iterator[None]]:
        attentions = way != TRANSFORMERS[0]
        return lambda: transformers_decoding(folder, prompt, n_new, attentions=attentions)

    starts = {way: ours(way) for way in (OFF, *WAYS, *SLOW_WAYS)}
    starts |= {way: theirs(way) for way in TRANSFORMERS}
    if arguments.one is not None:
        for _ in starts[arguments.one]():
            pass
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return []
    names = [OFF, *WAYS, *(SLOW_WAYS if arguments.gradients else ())]
    names += TRANSFORMERS if arguments.transformers else ()
    if arguments.only:
        names = [way for way in names if way in (OFF, *arguments.only)]
    bases = {way: TRANSFORMERS[0] if way in TRANSFORMERS else OFF for way in names}
    return table(timed({way: starts[way] for way in names}, arguments.rounds), bases)


if __name__ == "__main__":
    main()
