"""Speed of generate and train while other processes are busy, compared with fixed spin times.

    python benchmarks/busy.py ../shared/data/tinyshakespeare.txt --busy 0 1 2

Complete commands alternate: by default, and with GOMP_SPINCOUNT, which disables
commands/openmp.py. Prints medians of tokens/s, and how many times as long a token takes as on
the idle machine.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

MINIGPT = [sys.executable, "-m", "minigpt"]
FIXED = ("10000", "100000")


def generate(folder: Path, threads: list[str], environment: dict[str, str], text: Path) -> float:
    """Return tokens/s of the shipped model, without a compiled graph."""
    words = ["generate", "--seed", "1", "--max-new-tokens", "250", "--no-compile", "Once upon a"]
    done = subprocess.run(
        [*MINIGPT, *words, *threads], cwd=folder, env=environment, capture_output=True, text=True
    )
    (rate,) = re.findall(r"([\d,.]+) tok/s", done.stderr)
    return float(rate.replace(",", ""))


def train(folder: Path, threads: list[str], environment: dict[str, str], text: Path) -> float:
    """Return tokens/s of the last steps of nano."""
    run = folder / "checkpoints" / "busy"
    shutil.rmtree(run, ignore_errors=True)
    words = ["train", str(text), "--max-steps", "60", "--name", run.name]
    subprocess.run(
        [*MINIGPT, *words, *threads], cwd=folder, env=environment, capture_output=True, check=True
    )
    rows = (run / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(row).get("tokens_per_s") for row in rows]
    return statistics.median([rate for rate in rates if rate][-4:])


COMMANDS = {"generate": generate, "train": train}


def main() -> None:
    """Measure the variants alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--commands", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    arguments = parser.parse_args()
    text = arguments.text.resolve()
    plain = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    variants: dict[str, tuple[dict[str, str], list[str]]] = {"default": (plain, [])}
    variants |= {f"GOMP_SPINCOUNT={n}": (plain | {"GOMP_SPINCOUNT": n}, []) for n in FIXED}
    variants["--threads 1"] = (plain, ["--threads", "1"])
    rates: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for command in arguments.commands:
            (folder / command).mkdir()
        for _ in range(arguments.rounds):
            for n_busy in arguments.busy:
                loop = [sys.executable, "-c", "while True: pass"]
                others = [subprocess.Popen(loop) for _ in range(n_busy)]
                try:
                    for variant, (environment, threads) in variants.items():
                        for command in arguments.commands:
                            rate = COMMANDS[command](folder / command, threads, environment, text)
                            rates[command, variant, n_busy].append(rate)
                finally:
                    for other in others:
                        other.kill()
                        other.wait()
    print(f"\n| | | {' | '.join(f'{n} busy' for n in arguments.busy)} |")
    print(f"| --- | --- | {' | '.join('---:' for _ in arguments.busy)} |")
    for command in arguments.commands:
        for variant in variants:
            medians = [statistics.median(rates[command, variant, n]) for n in arguments.busy]
            idle = statistics.median(rates[command, "default", arguments.busy[0]])
            cells = [f"{rate:,.0f} ({idle / rate:.1f} x)" for rate in medians]
            print(f"| {command} | {variant} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
