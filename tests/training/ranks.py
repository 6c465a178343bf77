"""Runs of several ranks on one CPU, each rank forked from a process that has imported torch.

Usage: python ranks.py PREPARED FOLDER < runs.json, which executes the described runs in order.
Each rank writes its results to FOLDER/RUN-RANK.json.
"""

import json
import math
import os
import socket
import sys
import traceback
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # imported once here, not by the first optimizer step of every fork
import torch.distributed.fsdp
import torch.distributed.tensor
from small_runs import config_of, trainer_of

from minigpt import evaluation
from minigpt.text.shard_files import open_prepared
from minigpt.text.tokens import PreparedData
from minigpt.training import run as run_module
from minigpt.training import trainer as trainer_module
from minigpt.training.distributed import join
from minigpt.training.events import EvalEvent, SaveEvent, StepEvent
from minigpt.training.skipping import SkipEvent


def live(run: dict[str, Any], rank: int, data: PreparedData, folder: Path) -> dict[str, Any]:
    """Run one rank; return its losses and other results."""
    evaluation._TOKENS_AT_ONCE_ON_CPU = 32  # small batches, so that ranks have windows to share
    # Muon in bfloat16 would amplify rounding differences of sums in another order.
    run_module.has_fast_bfloat16 = lambda device: False
    if "clock" in run:
        looks = count()
        tick_s = run["clock"][rank]
        trainer_module.time.perf_counter = lambda: tick_s * next(looks)
    world = join()
    config = config_of(run["layout"], dropout=run.get("dropout", 0.0), **run["training"])
    path = folder / run["folder"]
    trainer = trainer_of(config, data, path, resume=run.get("resume", False), world=world)
    steps, skips, evaluations, saves, masks = [], [], [], [], []
    trainer.model.dropout.register_forward_hook(
        lambda module, inputs, output: (
            masks.append("".join(map(str, (output == 0).flatten().int().tolist())))
            if module.training
            else None
        )
    )
    if run.get("nan_at", [None])[0] == rank:
        loss_of = trainer._loss_of
        nan_steps = run["nan_at"][1:]
        trainer._loss_of = lambda *batch, **options: (
            loss_of(*batch, **options) * (math.nan if trainer.step + 1 in nan_steps else 1)
        )
    for event in trainer.run():
        match event:
            case SkipEvent():
                skips.append([event.step, event.n_skipped])
            case StepEvent():
                steps.append([event.step, event.train_loss, event.grad_norm, event.lr])
                if run.get("stop") == [rank, event.step]:
                    trainer.request_stop()
            case EvalEvent():
                evaluations.append([event.step, event.val_loss, event.bits_per_byte])
            case SaveEvent():
                saves.append(event.step)
    world.close()
    return {
        "steps": steps,
        "skips": skips,
        "evaluations": evaluations,
        "saves": saves,
        "masks": masks,
        "was_stopped": trainer.was_stopped,
        "moved_from": trainer.moved_from,
        "elapsed_s": trainer.elapsed_s,
        "n_held": sum(
            getattr(tensor, "_local_tensor", tensor).numel()
            for optimizer in trainer.optimizers
            for state in optimizer.state.values()
            for tensor in state.values()
        ),
    }


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def fork(run: dict[str, Any], rank: int, port: int, data: PreparedData, folder: Path) -> int:
    """Start one rank; return its process id."""
    if child := os.fork():
        return child
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["n_ranks"], "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(n) for key, n in places.items()}
    try:
        torch.set_num_threads(1)
        seen = live(run, rank, data, folder)
        (folder / f"{run['name']}-{rank}.json").write_text(json.dumps(seen))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    data, folder = open_prepared(Path(sys.argv[1])), Path(sys.argv[2])
    for run in json.load(sys.stdin):
        port = free_port()
        children = [fork(run, rank, port, data, folder) for rank in range(run["n_ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            sys.exit(f"the run {run['name']} ended with {codes}")


if __name__ == "__main__":
    main()
