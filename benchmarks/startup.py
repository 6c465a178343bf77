"""Time from the start of a process to its first token, compared with import torch and loading.

    python benchmarks/startup.py
    python benchmarks/startup.py --shape gpt2 --compile --rounds 7
    python benchmarks/startup.py --model storyteller

--model compares an existing model with import torch only, and also shows the ratio of processor
time, which other load on the machine affects less.

Each command is a separate process, and they alternate; the time is from before its start to the
first byte on standard output. "import torch, load" reads the same model.safetensors with
safetensors' load_file, which memory-maps the file without reading weights. Every file has been read
once before, so it is in the page cache.
"""

import argparse
import json
import os
import random
import resource
import statistics
import string
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from decoding import note
from machine import child_environment, machine_facts
from random_models import BYTES, SHAPES, shape_of, write_random

IMPORT, LOAD, EAGER, COMPILED = (
    "import torch",
    "import torch, load",
    "minigpt generate",
    "minigpt generate --compile",
)
TRANSFORMERS = "transformers generate"
_LOAD = """
import sys, torch
from safetensors.torch import load_file
load_file(sys.argv[1] + "/model.safetensors")
print()
"""
_GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], local_files_only=True)
prompt = torch.tensor([list(sys.argv[2].encode())])
print(model.generate(prompt, do_sample=False, max_new_tokens=1)[0, -1])
"""


def commands(folder: str, prompt: str, *, with_compiled: bool) -> dict[str, list[str]]:
    """Return the arguments of Python for each command, by its name."""
    options = ["--model", folder, "--max-new-tokens", "1", "--dtype", "float32"]
    generate = ["-m", "minigpt", "generate", prompt, *options]
    found = {
        IMPORT: ["-c", "import torch; print()"],
        LOAD: ["-c", _LOAD, folder],
        EAGER: generate,
        TRANSFORMERS: ["-c", _GENERATE, folder, prompt],
    }
    return found | ({COMPILED: [*generate, "--compile"]} if with_compiled else {})


def seconds_to_first_byte(words: list[str], threads: int) -> float:
    """Start Python with these arguments and wait for its output.

    Raises: RuntimeError with the last line of standard error if it fails.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=child_environment(threads),
        )
        assert process.stdout is not None
        process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.communicate()
        if process.returncode:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines() or ["no reason"]
            raise RuntimeError(lines[-1])
    return seconds


def measure(found: dict[str, list[str]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Time each command in rounds, after a warm-up; report those that fail."""
    times: dict[str, list[float]] = {}
    for name, words in found.items():
        try:
            note(f"{name}, warm-up: {seconds_to_first_byte(words, threads):.2f} s")
            times[name] = []
        except RuntimeError as error:
            print(f"- not measured: {name}: {error}")
    for _ in range(rounds):
        for name, seconds in times.items():
            seconds.append(seconds_to_first_byte(found[name], threads))
    return times


def compare_with_import(model: str, rounds: int, threads: int) -> None:
    """Print the time to the first token of a model, relative to import torch."""
    words = ["-m", "minigpt", "generate", "--model", model, "--max-new-tokens", "1", "Once"]
    seconds_to_first_byte(words, threads)  # writes bytecode and fills the page cache
    pairs = []
    for _ in range(rounds):
        pair = []
        for command in (["-c", "import torch; print()"], words):
            before = _processor_seconds()
            pair.append((seconds_to_first_byte(command, threads), _processor_seconds() - before))
        pairs.append(pair)
    print(f"\n| | import torch | first token of {model} | ratio |\n| --- | ---: | ---: | ---: |")
    for i, name in enumerate(("s to the first byte", "s of processor time")):
        base, ours = ([pair[j][i] for pair in pairs] for j in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(base, ours, strict=True))
        medians = f"{statistics.median(base):.2f} | {statistics.median(ours):.2f}"
        print(f"| {name} | {medians} | {ratio:.2f} |")


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--model", help="a model to compare with import torch, instead of shapes")
    parser.add_argument("--prompt", type=int, default=32, help="prompt length, in bytes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--compile", action="store_true", help="also time the second start with --compile"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.model:
        return compare_with_import(args.model, args.rounds, args.threads)
    prompt = "".join(random.Random(0).choices(string.ascii_letters, k=args.prompt))
    runs = []
    for shape in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            write_random(Path(folder), shape_of(shape, args.prompt + 1), BYTES)
            found = commands(folder, prompt, with_compiled=args.compile)
            times = measure(found, args.rounds, args.threads)
        runs.append({"shape": shape, "seconds": times})
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        print(f"\n## {shape}\n\n| | s to the first byte | x {LOAD} |\n| --- | ---: | ---: |")
        for name, seconds in medians.items():
            pairs = zip(times[name], times[LOAD], strict=True)
            ratio = statistics.median(ours / base for ours, base in pairs)
            print(f"| {name} | {seconds:.2f} | {ratio:.2f} |", flush=True)
        if COMPILED in medians:
            print(f"\n--compile adds {medians[COMPILED] - medians[EAGER]:.2f} s")
    machine = machine_facts("cpu", ["torch", "transformers"]) | {"threads": args.threads}
    print(f"\n{json.dumps(machine)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")


if __name__ == "__main__":
    main()
