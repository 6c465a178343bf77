"""Loss of the final model on small texts, compared with the best step and with smaller budgets.

    python benchmarks/small_texts.py ../shared/data/fairytales.txt --kilobytes 20 60 200 \
        --steps 300 600 6000
    python benchmarks/small_texts.py ... --seconds 30 60 600 --cpu-time

With --cpu-time, the seconds are CPU time, so that other load on the machine does not shrink a
budget. On an idle machine with one thread, they equal wall-clock time. --tokenizers compares
vocabularies.

Each text is the beginning of a file (.txt, or .jsonl.xz with a field "text"), each row a run of
minigpt train with that budget and all defaults. `left` is the validation loss of the model that the
run leaves, in nats per byte; `any step` the lowest loss of the weights of every n-th step, on the
same windows; `worse` is left minus any step (goal: at most 0.005), and `budget +` left minus the
lowest left of the smaller budgets (goal: at most 0).
"""

import argparse
import json
import lzma
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# The same for all contenders; read when torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.commands.train.job import settings_of, with_vocabulary
from minigpt.evaluation import evaluate
from minigpt.text.batches import validation_windows
from minigpt.text.tokens import prepare
from minigpt.training.events import EvalEvent, StepEvent
from minigpt.training.overfitting import EarlyStopEvent, with_text_settings
from minigpt.training.trainer import Trainer

NUMBERS = ["budget", "steps", "epochs", "dropout", "left", "any step", "worse", "budget +"]
HEAD = ["text", "tokenizer", *NUMBERS]
SIDES = ["---"] * 2 + ["---:"] * len(NUMBERS)


def beginning(path: Path, n_bytes: int) -> bytes:
    """Return the first bytes of a corpus, without an incomplete character at the end."""
    if path.suffix != ".xz":
        with path.open("rb") as file:
            text = file.read(n_bytes)
    else:
        text = b""
        with lzma.open(path, "rt", encoding="utf-8") as lines:
            while len(text) < n_bytes:
                text += json.loads(next(lines))["text"].encode() + b"\n\n"
    return text[:n_bytes].decode(errors="ignore").encode()


def measure(path: Path, tokenizer: str, budget: dict[str, Any], every: int) -> dict[str, Any]:
    """Train once with the defaults of minigpt train, and return the results."""
    data_settings = {"paths": [str(path)], "tokenizer": tokenizer}
    overrides = {"data": data_settings, "training": budget | {"log_every": every}}
    settings = settings_of(overrides)
    data = prepare(with_vocabulary(settings, 1).data)
    config = with_vocabulary(settings, data.tokenizer.vocab_size)
    config = with_text_settings(config, overrides, data)
    any_step, evaluation, eval_s, stopped = math.inf, None, 0.0, ""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        cpu = torch.device("cpu")
        trainer = Trainer(config, data, run, device=cpu, dtype=torch.float32)
        for event in trainer.run():
            if isinstance(event, StepEvent):
                any_step = min(any_step, trainer.checkpoints.validation().nats_per_token)
            elif isinstance(event, EvalEvent):
                evaluation, eval_s = event, eval_s + event.eval_s
            elif isinstance(event, EarlyStopEvent):
                stopped = ", stopped early"
        best = run.best()
        assert best is not None
        assert evaluation is not None
        windows = validation_windows(
            trainer.val_tokens,
            config.sequence_length,
            trainer.config.training.eval_tokens or len(trainer.val_tokens),
            batch_size=16,
        )
        model = read_model(best.folder, dtype=torch.float32).model
        left = evaluate(model, windows, data.tokenizer.token_byte_lengths)
    per_byte = left.n_tokens / left.n_bytes
    return {
        "tokenizer": data.tokenizer.name,
        "steps": f"{trainer.step}{stopped}",
        "epochs": trainer.epochs(trainer.step),
        "dropout": config.model.dropout,
        "left": left.nats_per_token * per_byte,
        "any_step": any_step * per_byte,
        "what": f"step {best.step}{', averaged' if best.facts.get('is_averaged') else ''}",
        "eval_share": eval_s / (eval_s + trainer.elapsed_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--kilobytes", type=int, nargs="+", default=[20, 60, 200, 1000, 3000])
    parser.add_argument("--steps", type=int, nargs="+", default=[])
    parser.add_argument("--seconds", type=float, nargs="+", default=[])
    parser.add_argument("--tokenizers", nargs="+", default=["bpe"])
    parser.add_argument("--every", type=int, default=10, help="steps between measured ones")
    parser.add_argument("--cpu-time", action="store_true", help="budgets in seconds of CPU time")
    args = parser.parse_args()
    if args.cpu_time:
        time.perf_counter = time.process_time
    budgets: list[dict[str, Any]] = [
        {"max_steps": n} for n in args.steps or ([] if args.seconds else [300])
    ]
    budgets += [{"max_minutes": seconds / 60} for seconds in args.seconds]
    clock = "CPU time" if args.cpu_time else "wall-clock time"
    print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads, seconds of {clock}\n")
    print(f"| {' | '.join([*HEAD, 'model left', 'evaluation'])} |")
    print(f"| {' | '.join([*SIDES, '---', '---:'])} |")
    for kilobytes in args.kilobytes:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{args.data.name.split('.')[0]}-{kilobytes}.txt"
            path.write_bytes(beginning(args.data, 1000 * kilobytes))
            for tokenizer in args.tokenizers:
                print_rows(path, tokenizer, budgets, args.every)


def print_rows(path: Path, tokenizer: str, budgets: list[dict[str, Any]], every: int) -> None:
    """Print a row for each budget."""
    smallest = math.inf
    for budget in budgets:
        run = measure(path, tokenizer, budget, every)
        seconds = budget.get("max_minutes", 0) * 60
        row = [
            f"{path.stem} KB",
            run["tokenizer"],
            f"{seconds:g} s" if seconds else f"{budget['max_steps']} steps",
            run["steps"],
            f"{run['epochs']:.1f}",
            f"{run['dropout']:g}",
            f"{run['left']:.4f}",
            f"{run['any_step']:.4f}",
            f"{run['left'] - run['any_step']:+.4f}",
            "" if smallest == math.inf else f"{run['left'] - smallest:+.4f}",
            run["what"],
            f"{run['eval_share']:.0%}",
        ]
        smallest = min(smallest, run["left"])
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
