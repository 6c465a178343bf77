"""Run the checks and measurements of docs/gpu.md on a GPU, in under 8 minutes.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --gpt-fast DIR --nanogpt-checkout DIR --out gpu-results
    python benchmarks/gpu.py --device cpu --quick        # rehearse every part without a GPU

The parts run in the order below, correctness before speed. Each writes OUT/PART.json as soon as it
ends, and the command stops at the first part that fails (except with --keep-going). At the end,
also after Ctrl-C, one Markdown table shows all results. No part starts after --minutes: the
remaining ones are "not run", and a part that still runs a minute later is "not finished". The exit
code is 1 if a part failed.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_checks as checks
import gpu_timings as timings
import torch
from gpu_setup import Facts, OutOfTimeError, Setup, SkippedError, described, free

from minigpt.errors import MinigptError
from minigpt.model.device import resolve_device

PARTS: dict[str, Callable[[Setup], Facts]] = {
    "machine": timings.machine,
    "parity": checks.parity,
    "resume": checks.resume,
    "dropout": checks.dropout,
    "waiting": checks.waiting,
    "memory_limit": checks.memory_limit,
    "ranks": checks.ranks,
    "shards": checks.shards,
    "warm_up": checks.warm_up,
    "small": timings.small,
    "nanogpts": timings.nanogpts,
    "decoding": timings.decoding,
    "mini": timings.mini,
}


GRACE_MINUTES = 1
"""Time after --minutes until a part that is still running is stopped."""


def run_part(name: str, setup: Setup) -> Facts:
    """Run a part and return its result: facts, and the status ok, FAILED, skipped or not run."""
    started = time.monotonic()
    print(f"{name} ...", file=sys.stderr, flush=True)
    if setup.is_late:
        return {"part": name, "status": "not run: out of time", "facts": {}, "seconds": 0.0}
    setup.facts.clear()
    setup.faults.clear()
    torch.set_float32_matmul_precision("highest")  # an earlier part may have used TF32
    try:
        setup.facts.update(PARTS[name](setup))
        status = f"FAILED: {'; '.join(setup.faults)}" if setup.faults else "ok"
    except SkippedError as reason:
        status = f"skipped: {reason}"
    except (Exception, SystemExit) as error:
        status = f"FAILED: {'; '.join([described(error), *setup.faults])}"
        if setup.is_over:
            status = "not finished: out of time"
    free(setup)
    seconds = round(time.monotonic() - started, 1)
    print(f"{name}: {status}, {seconds} s", file=sys.stderr, flush=True)
    return {"part": name, "status": status, "facts": dict(setup.facts), "seconds": seconds}


def table(results: list[Facts]) -> str:
    """Return all results as one Markdown table."""
    rows = [("part", "what", "result"), ("---", "---", "---")]
    for result in results:
        rows.append((result["part"], f"{result['seconds']} s", result["status"]))
        rows += [(result["part"], what, str(value)) for what, value in result["facts"].items()]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in the body if it still runs after this time."""

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def parse_arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="rehearse with tiny sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=7.0, help="start no part after this time")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at a failure")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    data = Path(__file__).parents[2] / "shared/data/tinyshakespeare.txt"
    parser.add_argument("--data", type=Path, default=data, help="tinyshakespeare.txt")
    parser.add_argument("--nanogpt-checkout", type=Path)
    parser.add_argument("--gpt-fast", default="", help="path of a gpt-fast checkout")
    parser.add_argument("--without-transformers", action="store_true")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    args = parse_arguments(words)
    try:
        device = resolve_device(args.device)
    except MinigptError as error:
        print(f"{error} Use --device cpu --quick to rehearse every part.", file=sys.stderr)
        return error.exit_code
    started, results, is_interrupted = time.monotonic(), [], False
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="minigpt-gpu-") as temporary:
        folder, data = Path(temporary), args.data.resolve()
        has_tinyshakespeare = data.exists()
        if args.quick or not has_tinyshakespeare:
            data = folder / "text.txt"
            data.write_text("To be, or not to be, that is the question.\n" * 200)
        setup = Setup(
            device=device,
            is_quick=args.quick,
            folder=folder,
            data=data,
            has_tinyshakespeare=has_tinyshakespeare,
            nanogpt_checkout=args.nanogpt_checkout,
            gpt_fast=args.gpt_fast,
            with_transformers=not args.without_transformers,
            deadline=started + 60 * args.minutes,
            end=started + 60 * (args.minutes + GRACE_MINUTES),
        )
        try:
            for name in args.parts:
                with time_limit(setup.end - time.monotonic()):
                    results.append(run_part(name, setup))
                text = json.dumps(results[-1], indent=2, default=str) + "\n"
                (args.out / f"{name}.json").write_text(text)
                if results[-1]["status"].startswith("FAILED") and not args.keep_going:
                    break
        except (KeyboardInterrupt, OutOfTimeError) as error:
            is_interrupted = isinstance(error, KeyboardInterrupt)
    print(table(results))
    is_failed = any(result["status"].startswith("FAILED") for result in results)
    return 130 if is_interrupted else int(is_failed)


if __name__ == "__main__":
    sys.exit(main())
