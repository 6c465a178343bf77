"""Seconds of training to a validation loss on tinyshakespeare, as bytes.

    python benchmarks/training.py ../shared/data/tinyshakespeare.txt --seconds 25
    python benchmarks/training.py ../shared/data/tinyshakespeare.txt --seconds 25 --nanogpt

The validation text is the last 10 %, in one full pass. Only training steps are timed: not reading
the text, not evaluation, not saving. ``--nanogpt`` runs nanoGPT's published CPU recipe in the same
process afterwards, in its shape (4 layers, 128 wide, context 64, batch 12, 2,000 steps of AdamW,
dropout 0), built of our gpt2 layout: a stand-in for it, not the thing itself.
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

# As the command line sets it, and before torch starts OpenMP.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import RunConfig
from minigpt.model.cost import parameter_count
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.presets import preset
from minigpt.settings import build, merge
from minigpt.text.shards import prepare
from minigpt.training.trainer import EvalEvent, StepEvent, Trainer

NANOGPT = {
    "preset": "nanogpt",
    "model": {
        "family": "gpt2",
        "n_layer": 4,
        "n_head": 4,
        "d_model": 128,
        "context_length": 64,
        "tie_embeddings": True,
    },
    "training": {
        "optimizer": "adamw",
        "batch_size": 12,
        "max_steps": 2000,
        "lr": 1e-3,
        "embedding_lr": 1e-3,
        "weight_decay": 0.1,
        "beta2": 0.99,
        "schedule": "cosine",
        "warmup_fraction": 0.05,
        "final_lr_fraction": 0.1,
        "eval_every": 250,
    },
}


def measure(settings: dict[str, Any], target: float) -> dict[str, Any]:
    """Train once and return the validation losses by seconds of training."""
    data = prepare(build(RunConfig, merge(settings, {"model": {"vocab_size": 257}})).data)
    settings = merge(settings, {"model": {"vocab_size": data.tokenizer.vocab_size}})
    config = build(RunConfig, settings)
    device = resolve_device(config.training.device)
    dtype = resolve_dtype(config.training.dtype, device)
    curve, speeds = [], []
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, data, RunFolder(Path(folder)), device=device, dtype=dtype)
        for event in trainer.run():
            if isinstance(event, EvalEvent):
                curve.append((round(event.elapsed_s, 2), round(event.val_loss, 4)))
                print(f"  {event.elapsed_s:7.1f} s  step {event.step:>5}  val {event.val_loss:.4f}")
            elif isinstance(event, StepEvent):
                speeds.append(event.tokens_per_s)
    reached = [seconds for seconds, loss in curve if loss < target]
    return {
        "preset": config.preset,
        "parameters": parameter_count(config.model),
        "dtype": str(dtype),
        "steps": trainer.step,
        "tokens_per_s": round(sorted(speeds)[len(speeds) // 2]),
        "val_loss": curve[-1][1],
        "training_s": curve[-1][0],
        "target": target,
        "seconds_to_target": reached[0] if reached else None,
        "curve": curve,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="?", default="../shared/data/tinyshakespeare.txt")
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--seconds", type=float, nargs="+", default=[25.0])
    parser.add_argument("--target", type=float, default=1.88)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--nanogpt", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    common = {"data": {"paths": [args.data], "tokenizer": "bytes"}}
    results = []
    for seconds in args.seconds:
        budget = {"max_steps": 0, "max_minutes": seconds / 60}
        training = {**budget, "seed": args.seed, "eval_every": args.eval_every, "save_every": 0}
        settings = merge(preset(args.preset), common, {"training": training})
        print(f"{args.preset}, {seconds:g} s of training")
        results.append(measure(settings, args.target))
    if args.nanogpt:
        print("nanoGPT's CPU recipe in its shape")
        results.append(
            measure(merge(NANOGPT, common, {"training": {"save_every": 0}}), args.target)
        )
    print("\n| run | parameters | tokens/s | training s | val nats/byte | s to target |")
    print("| --- | --- | --- | --- | --- | --- |")
    for r in results:
        reached = "-" if r["seconds_to_target"] is None else f"{r['seconds_to_target']:.1f}"
        print(
            f"| {r['preset']} | {r['parameters'] / 1e6:.2f}M | {r['tokens_per_s']:,} | "
            f"{r['training_s']:.1f} | {r['val_loss']:.4f} | {reached} |"
        )
    machine = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    print(json.dumps(machine))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
