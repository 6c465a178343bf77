"""Training time to a validation loss on tiny Shakespeare, compared with nanoGPT.

    python benchmarks/training.py ../shared/data/tinyshakespeare.txt --seconds 15 25 --nanogpt
    python benchmarks/training.py ... --nanogpt-checkout DIR --plot docs/training.svg

For both, the validation text is the last 10% of the bytes, in one full pass, and losses are in
nats per byte, for any tokenizer. A BPE is trained on the first 90% only, and its training time
counts; otherwise only training steps are timed, without reading the text, evaluation or saving. The
schedule ends with the budget, so each number of --seconds is a separate run. --nanogpt first runs
nanoGPT's recipe with a stand-in of its shape in the same process; --nanogpt-checkout uses nanoGPT's
own model and optimizer.
"""

import argparse
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The same for all contenders; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import nanogpt
import numpy as np
import torch

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import DataConfig, RunConfig
from minigpt.model.cost import parameter_count
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.presets import PRESETS, preset
from minigpt.settings import build, merge, parse_assignment
from minigpt.text.batches import validation_windows
from minigpt.text.tokenizer import make_tokenizer
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.events import EvalEvent, StepEvent
from minigpt.training.trainer import Trainer

VAL_FRACTION = 0.1


@dataclass(frozen=True)
class Text:
    """The text as tokens of a tokenizer that was not trained on the validation text."""

    data: PreparedData
    val_fraction: float
    """Share of the tokens that encode the last VAL_FRACTION of the bytes."""
    tokenizer_s: float
    """Training time of the tokenizer in seconds."""


def tokenized(path: Path, spec: str) -> Text:
    """Tokenize the text."""
    text = path.read_bytes()
    n_train = int(len(text) * (1 - VAL_FRACTION))
    started = time.perf_counter()
    tokenizer = make_tokenizer(spec, [text[:n_train].decode()])
    tokenizer_s = time.perf_counter() - started
    data = prepare(DataConfig(paths=(str(path),)), tokenizer=tokenizer)
    tokens = np.empty(len(data.tokens), np.int64)
    data.tokens.read_into(tokens, 0)
    # A token that crosses the border belongs to the training text.
    border = int(np.searchsorted(np.cumsum(tokenizer.token_byte_lengths[tokens]), n_train)) + 1
    return Text(data, 1 - (border + 0.5) / len(tokens), tokenizer_s if spec != "bytes" else 0.0)


def measure(settings: dict[str, Any], text: Text) -> dict[str, Any]:
    """Train once and return the validation losses with their training times in seconds."""
    data = text.data
    own = {"vocab_size": data.tokenizer.vocab_size}
    settings = merge(settings, {"model": own, "data": {"val_fraction": text.val_fraction}})
    config = build(RunConfig, settings)
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    curve, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, RunFolder(Path(folder)), device=device, dtype=dtype)
        for event in trainer.run():
            if isinstance(event, EvalEvent):
                seconds, loss = (
                    event.elapsed_s + text.tokenizer_s,
                    event.bits_per_byte * math.log(2),
                )
                curve.append((round(seconds, 2), round(loss, 4)))
                print(f"  {seconds:7.1f} s  step {event.step:>5}  val {loss:.4f}")
            elif isinstance(event, StepEvent):
                speeds.append(event.tokens_per_s)
    return {
        "preset": config.preset,
        "parameters": parameter_count(config.model),
        "dtype": str(dtype),
        "tokenizer": data.tokenizer.name,
        "steps": trainer.step,
        "tokens_per_s": round(sorted(speeds)[len(speeds) // 2]),
        "context_length": config.model.context_length,
        "curve": curve,
    }


def measure_nanogpt(path: Path, checkout: Path | None, eval_every: int) -> dict[str, Any]:
    """Train nanoGPT's recipe on the same text as bytes."""
    train, val = tokenized(path, "bytes").data.tokens.split(VAL_FRACTION)
    tokens = train.windows(np.zeros(1, np.int64), len(train))[0]

    @torch.no_grad()
    def validate(loss_of: nanogpt.LossOf) -> float:
        total, n = 0.0, 0
        for inputs, targets in validation_windows(val, nanogpt.CONTEXT, len(val), batch_size=256):
            total += loss_of(inputs, targets).item() * targets.numel()
            n += targets.numel()
        return total / n

    return nanogpt.train(torch.from_numpy(tokens), validate, checkout, eval_every)


def seconds_to(target: float, run: dict[str, Any]) -> float | None:
    """Return the training seconds until the loss reaches the target, None if it never does."""
    return next((seconds for seconds, loss in run["curve"] if loss <= target), None)


def table(runs: list[dict[str, Any]], targets: list[float]) -> str:
    """Return the runs as Markdown."""
    heads = ["run", "tokenizer", "parameters", "tokens/s", "training s", "val nats/byte"]
    rows = [heads + [f"s to {target:g}" for target in targets], ["---"] * (6 + len(targets))]
    for run in runs:
        reached = [seconds_to(target, run) for target in targets]
        rows.append(
            [
                run["preset"],
                run["tokenizer"],
                f"{run['parameters'] / 1e6:.2f}M",
                f"{run['tokens_per_s']:,}",
                f"{run['curve'][-1][0]:.1f}",
                f"{run['curve'][-1][1]:.4f}",
                *("-" if seconds is None else f"{seconds:.1f}" for seconds in reached),
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Plot the validation losses over seconds of training (needs matplotlib).

    For a preset, each point is the end of a separate run; for nanoGPT, all points are of one run.
    """
    import matplotlib.pyplot as plt

    points: dict[str, list[tuple[float, float]]] = {}
    for run in runs:
        is_ours = run["preset"] in PRESETS
        points.setdefault(run["preset"], []).extend(run["curve"][-1:] if is_ours else run["curve"])
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, curve in points.items():
        seconds, losses = zip(*sorted(curve), strict=True)
        axes.plot(seconds, losses, marker="o", markersize=4, label=name)
    axes.set(xlabel="seconds of training", ylabel="validation loss, nats/byte")
    axes.set(xlim=(0, None), ylim=(None, 2.7))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path("../shared/data/tinyshakespeare.txt")
    parser.add_argument("data", nargs="?", type=Path, default=default)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--tokenizer", help="tokenizer [the preset's]")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--seconds", type=float, nargs="+", default=[25.0])
    parser.add_argument("--target", type=float, nargs="+", default=[1.88, 1.898])
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--nanogpt", action="store_true")
    parser.add_argument("--nanogpt-checkout", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    base = merge(preset(args.preset), {"data": {"paths": [str(args.data)]}, "preset": args.preset})
    base = merge(base, *map(parse_assignment, args.set))
    text = tokenized(args.data, args.tokenizer or base["data"]["tokenizer"])
    runs = []
    if args.nanogpt or args.nanogpt_checkout:  # first: a run of minigpt sets malloc's thresholds
        print("nanoGPT's CPU recipe")
        runs.append(measure_nanogpt(args.data, args.nanogpt_checkout, args.eval_every))
    for seconds in args.seconds:
        budget = {"max_steps": 0, "max_minutes": seconds / 60}
        training = {**budget, "seed": args.seed, "eval_every": args.eval_every, "save_every": 0}
        print(f"{args.preset}, {seconds:g} s of training")
        runs.append(measure(merge(base, {"training": training}), text))
    machine = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    print(f"\n{table(runs, args.target)}\n\n{json.dumps(machine)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
