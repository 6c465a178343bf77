"""Decoding throughput compared with transformers, llama.cpp, gpt-fast and others, in one run.

    python benchmarks/decoding.py
    python benchmarks/decoding.py --quick --prefill 32 128 512
    python benchmarks/decoding.py --shape mini --only minigpt "transformers fp32" --without trace
    python benchmarks/decoding.py --gpt-fast DIR --llama-cpp-python DIR/bin/python --static
    python benchmarks/decoding.py --quick --peers-python DIR/bin/python

All have the same random weights (gpt-fast: the same number), the same prompt of random ids, and
decode greedily; nothing is downloaded. minigpt runs the code of its commands. transformers runs its
generate and, because that has much Python overhead, a bare loop over its forward: ratios are
relative to the faster of the two.

Each contender is a separate process with its own peak memory and settings; llama.cpp may be
installed in another Python. All stay loaded, and in each round every contender decodes once, in
shuffled order, while the others sleep, so that other load on the machine affects all of them. A
ratio is the median over rounds of the ratio in the same round. Before the timing starts, each
decodes once, and minigpt's float32 tokens must equal those of transformers.

llama.cpp needs a Python with llama-cpp-python, gguf and safetensors (by default this one),
CTranslate2 and ONNX Runtime one with ctranslate2 or onnxruntime-genai, onnx-ir, torch and
transformers, and gpt-fast a checkout of its repository. --device cuda is untested.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from contender import Contender, Job, Turn
from decoding_report import MEMORY, Measured, bandwidth, bars, n_same, prefill_table, table
from machine import child_environment, machine_facts
from peers import peer_folder
from random_models import SHAPES, shape_of, weights_read, write_random

HERE = Path(__file__).parent
CONVERTED = ("CTranslate2", "ONNX")
"""Engines with their own model formats; ONNX is ONNX Runtime's generate()."""
GGUF_TYPES = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0"}


def quick_contenders(precisions: list[str]) -> list[Contender]:
    """Return the contenders that start without compiling: minigpt and its main peers."""
    found = [Contender("minigpt", precision) for precision in precisions]
    found += [Contender("transformers", p, "loop") for p in precisions if p != "int8"]
    engines = ("llama.cpp", *CONVERTED)
    return found + [Contender(engine, p) for engine in engines for p in precisions]


def contenders(precisions: list[str], batches: list[int], *, with_static: bool) -> list[Contender]:
    """Return all contenders, in the order of the table."""
    found = []
    for n_rows in batches:
        for precision in precisions:
            for is_compiled in (False, True):
                found.append(Contender("minigpt", precision, "", is_compiled, n_rows))
                if n_rows == 1:
                    found.append(Contender("minigpt", precision, "trace", is_compiled))
        for precision in precisions:
            if precision != "int8":
                found += [
                    Contender("transformers", precision, variant, n_rows=n_rows)
                    for variant in ("", "loop")
                ]
                if with_static and n_rows == 1:
                    found.append(Contender("transformers", precision, "static", is_compiled=True))
        if n_rows == 1:
            engines = ("llama.cpp", *CONVERTED)
            found += [Contender(engine, p) for engine in engines for p in precisions]
            fast = [precision for precision in precisions if precision != "int8"]
            found += [Contender("gpt-fast", precision, is_compiled=True) for precision in fast]
    return found


class Worker:
    """A contender's process."""

    def __init__(self, contender: Contender, job: Job, python: str) -> None:
        request = json.dumps({"contender": asdict(contender), "job": asdict(job)})
        self.process = subprocess.Popen(
            [python, str(HERE / "decoders.py"), request],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=child_environment(job.threads),
        )

    def turn(self, *, is_first: bool = False, n_prompt: int | None = None) -> Turn | str:
        """Decode once and return the timing, or the reason for a failure.

        The first turn starts without a request.

        Args: n_prompt, to time only the first token after a prompt of this length.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            if not is_first:
                print(n_prompt or "", file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return f"its process exited with code {self.process.wait()}"
        reply = json.loads(line)
        return str(reply["failed"]) if "failed" in reply else Turn(**reply)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


def measure(
    chosen: list[Contender], job: Job, rounds: int, pythons: dict[str, str], prefill: list[int]
) -> tuple[dict[Contender, Measured], dict[Contender, str], list[int]]:
    """Time the contenders in rounds.

    Args: pythons, of engines that may be installed in another Python; prefill, lengths of prompts
        after which to time the first token in each round.
    Returns: the measurements, the reasons for failures, and the float32 tokens.
    """
    prefills: dict[Contender, dict[int, list[float]]] = {}
    workers, failed, texts = {}, dict[Contender, str](), dict[Contender, list[int]]()
    turns: dict[Contender, list[Turn]] = {}
    with ExitStack() as stack:
        for contender in [MEMORY, *chosen]:
            note(f"starting {contender.name}")
            python = pythons.get(contender.engine, sys.executable)
            if contender.engine in CONVERTED and (error := convert(contender, job.folder, python)):
                failed[contender] = error
                continue
            worker = Worker(contender, job, python)
            stack.callback(worker.close)
            turn = worker.turn(is_first=True)
            if isinstance(turn, str):
                failed[contender] = turn
                worker.close()
                continue
            workers[contender], turns[contender] = worker, []
            texts[contender] = turn.tokens
        reference = check_tokens(texts)
        order = random.Random(0)
        for number in range(rounds):
            for contender in order.sample(list(workers), len(workers)):
                time.sleep(
                    0.1
                )  # threads of the previous contender spin for a moment before they sleep
                turn = workers[contender].turn()
                if isinstance(turn, str):
                    raise SystemExit(f"{contender.name}, after its warm-up: {turn}")
                turns[contender].append(turn)
                for n_prompt in prefill if contender != MEMORY else []:
                    turn = workers[contender].turn(n_prompt=n_prompt)
                    if isinstance(turn, Turn):
                        times = prefills.setdefault(contender, {})
                        times.setdefault(n_prompt, []).append(turn.first_s)
                rest_s = turns[contender][-1].rest_s
                note(f"round {number + 1} of {rounds}, {contender.name}: {rest_s:.3g} s")
    measured = {one: Measured(one, timed, prefills.get(one, {})) for one, timed in turns.items()}
    return measured, failed, reference


def check_tokens(texts: dict[Contender, list[int]]) -> list[int]:
    """Return the float32 tokens of transformers; SystemExit if minigpt's differ."""
    variants = (Contender("transformers", "fp32", variant) for variant in ("", "loop"))
    theirs = next((texts[variant] for variant in variants if variant in texts), None)
    for contender, tokens in texts.items():
        if theirs is None or contender.engine != "minigpt" or contender.precision != "fp32":
            continue
        if tokens != theirs:
            raise SystemExit(
                f"{contender.name} and transformers, both fp32, differ after "
                f"{n_same(tokens, theirs)} of {len(theirs)} tokens: one of them is wrong."
            )
    return theirs or texts.get(Contender("minigpt", "fp32"), [])


def note(words: str) -> None:
    """Print a line of progress."""
    print(f"  {words}", file=sys.stderr, flush=True)


def write_ggufs(folder: Path, precisions: list[str], python: str) -> None:
    """Write the folder's model as GGUF; if that fails, llama.cpp reports the missing file."""
    for precision in precisions:
        words = [str(folder), str(folder / f"{precision}.gguf"), GGUF_TYPES[precision]]
        done = subprocess.run(
            [python, str(HERE / "gguf_model.py"), *words], capture_output=True, text=True
        )
        if done.returncode:
            note(f"no {precision}.gguf: {done.stderr.strip().splitlines()[-1]}")


def convert(contender: Contender, folder: str, python: str) -> str:
    """Write the folder's model in a peer's format; return the error, or "" if there is none."""
    out = str(peer_folder(folder, contender))
    words = [contender.engine, folder, out, contender.precision]
    done = subprocess.run(
        [python, str(HERE / "peer_models.py"), *words], capture_output=True, text=True
    )
    if not done.returncode:
        return ""
    errors = [line for line in done.stderr.splitlines() if re.match(r"\w*Error: ", line)]
    return errors[0] if errors else "it could not be converted"


def report(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one shape and print the results."""
    longest = max([args.prompt, *args.prefill])
    config = shape_of(shape, longest + args.new)
    if args.quick:
        found = quick_contenders(args.precision)
    else:
        found = contenders(args.precision, args.batch, with_static=args.static)
    chosen = [one for one in found if is_chosen(one, args.only, args.without)]
    prompt = random.Random(0).choices(range(config.vocab_size), k=longest)
    pythons = {"llama.cpp": args.llama_cpp_python}
    pythons |= dict.fromkeys(CONVERTED, args.peers_python)
    with tempfile.TemporaryDirectory() as folder:
        write_random(Path(folder), config)
        if any(one.engine == "llama.cpp" for one in chosen):
            write_ggufs(Path(folder), args.precision, args.llama_cpp_python)
        job = Job(
            folder,
            prompt[: args.prompt],
            args.new,
            args.threads,
            args.device,
            args.gpt_fast,
            prompt,
        )
        results, failed, reference = measure(chosen, job, args.rounds, pythons, args.prefill)
    n_weights = weights_read(config)
    bytes_per_s = bandwidth(results)
    verdicts = {str(bar): bar.verdict(results) for bar in bars(shape, args.device)}
    print(f"\n## {shape}: {n_weights / 1e6:.1f}M weights read per step\n")
    print(table(results, n_weights, reference))
    if args.prefill:
        print(f"\nMilliseconds to the first token after a prompt:\n\n{prefill_table(results)}")
    print(f"\nReading memory: {(bytes_per_s or 0) / 1e9:.1f} GB/s.\n")
    for bar, verdict in verdicts.items():
        print(f"- {bar}: {verdict}")
    for contender, reason in failed.items():
        print(f"- not measured: {contender.name}: {reason}")
    return {
        "shape": shape,
        "weights_read": n_weights,
        "bytes_per_s": bytes_per_s,
        "contenders": [
            asdict(one.contender)
            | {"name": one.contender.name, "tokens_per_s": one.tokens_per_s}
            | {"step_ms": one.step_ms, "first_ms": one.first_ms, "peak_mb": one.peak_mb}
            | {"tokens_as_float32": n_same(one.turns[0].tokens, reference)}
            | {"rest_s": [turn.rest_s for turn in one.turns]}
            | {"first_s": [turn.first_s for turn in one.turns], "prefill_s": one.prefill_s}
            for one in results.values()
        ],
        "not_measured": {one.name: reason for one, reason in failed.items()},
        "bars": verdicts,
    }


def is_chosen(contender: Contender, only: list[str], without: list[str]) -> bool:
    """Return whether the name has all words of an entry of ``only``, and none of ``without``."""
    words = set(contender.name.split())
    is_included = not only or any(set(text.split()) <= words for text in only)
    return is_included and not words & set(without)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--prompt", type=int, default=32, help="prompt length, in tokens")
    parser.add_argument("--new", type=int, default=256, help="new tokens to decode")
    parser.add_argument("--precision", nargs="+", choices=GGUF_TYPES, default=list(GGUF_TYPES))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--static", action="store_true", help="also run transformers' compiled step"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="measure contenders whose names have these words"
    )
    parser.add_argument(
        "--without", nargs="+", default=[], help="leave out contenders with these words"
    )
    parser.add_argument(
        "--llama-cpp-python", default=sys.executable, help="Python with llama-cpp-python"
    )
    parser.add_argument(
        "--peers-python", default=sys.executable, help="Python with CTranslate2 or ONNX Runtime"
    )
    parser.add_argument("--gpt-fast", default="", help="path of a gpt-fast checkout")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="without compilation, batch size 1, 3 rounds of 64 tokens: about 3 minutes",
    )
    parser.add_argument(
        "--prefill", type=int, nargs="+", default=[], help="also time prompts of these lengths"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.new, args.batch = min(args.rounds, 3), min(args.new, 64), [1]
    return args


def main() -> None:
    args = parse_arguments()
    machine = machine_facts(args.device, ["torch", "transformers"]) | {"threads": args.threads}
    print(json.dumps(machine))
    runs = [report(shape, args) for shape in args.shape]
    if args.json:
        settings = {"prompt": args.prompt, "new": args.new, "rounds": args.rounds}
        result = {"machine": machine, "settings": settings, "runs": runs}
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
