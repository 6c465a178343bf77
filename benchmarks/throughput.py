"""Training throughput at nanoGPT's own shapes: minigpt's gpt2 layout compared with nanoGPT.

    python benchmarks/throughput.py --nanogpt-checkout DIR
    python benchmarks/throughput.py --nanogpt-checkout DIR --device cuda --dtype bfloat16 --compile

Both run full optimizer steps (forward, backward, clipping, AdamW) on random tokens, and alternate,
so that other load affects both. minigpt also runs without its kernels, with the model's modules and
torch's attention. Each is a process of its own, because minigpt sets malloc's thresholds when it
trains. The results are medians of all steps but the first of each turn.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import nanogpt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig, TrainingConfig
from minigpt.model.device import autocast, keep_freed_memory, resolve_device, resolve_dtype
from minigpt.model.gpt import GPT
from minigpt.training.fused import FusedLoss
from minigpt.training.kernels import use_kernels
from minigpt.training.optim import make_optimizers

VOCABULARY = 65
SHAPES = {
    # From its README for a CPU, and from config/train_shakespeare_char.py for a GPU.
    "cpu": {"n_layer": 4, "n_head": 4, "width": 128, "context": 64, "batch": 12},
    "gpu": {"n_layer": 6, "n_head": 6, "width": 384, "context": 256, "batch": 64},
}
Step = Callable[[Tensor, Tensor], None]


def ours(
    shape: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    with_kernels: bool = True,
) -> Step:
    """Return a training step of minigpt's gpt2 layout with AdamW, as in the trainer.

    Args: with_kernels, whether to use ``training.kernels`` and ``training.fused``, as the trainer
        does.
    """
    config = ModelConfig(
        vocab_size=VOCABULARY,
        family="gpt2",
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        d_model=shape["width"],
        context_length=shape["context"],
        activation="gelu",
        tie_embeddings=True,
    )
    model = GPT(config)
    model.init_weights()
    model.to(device)
    if with_kernels:
        use_kernels(model, device, dtype)
    if device.type == "cpu":
        keep_freed_memory()
    training = TrainingConfig(
        max_steps=1, optimizer="adamw", lr=1e-3, embedding_lr=1e-3, weight_decay=0.1
    )
    forward = torch.compile(model) if compiled else model
    optimizers = make_optimizers(model, training, torch.float32)
    if with_kernels and not compiled and device.type == "cpu":
        return _step(model, FusedLoss(model, dtype, model), optimizers)

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(device, dtype):
            logits = forward(inputs)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return _step(model, loss_of, optimizers)


def theirs(
    shape: dict[str, int],
    device: torch.device,
    dtype: torch.dtype,
    compiled: bool,
    checkout: Path | None,
) -> Step:
    """Return a training step of nanoGPT's model with its optimizer, as in its train.py.

    Args: checkout, of nanoGPT; None for a stand-in of the same shape.
    """
    options: dict[str, Any] = {
        "device": device.type,
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_embd": shape["width"],
        "block_size": shape["context"],
    }
    if checkout:
        model, plain_loss, optimizer = nanogpt.real(checkout, VOCABULARY, **options)
    else:
        model, plain_loss, optimizer = nanogpt.recreated(VOCABULARY, **options)
    compiled_loss = torch.compile(plain_loss) if compiled else plain_loss

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(device, dtype):
            return compiled_loss(inputs, targets)

    return _step(model, loss_of, [optimizer])


def _step(
    model: nn.Module,
    loss_of: nanogpt.LossOf,
    optimizers: list[torch.optim.Optimizer],
) -> Step:
    def step(inputs: Tensor, targets: Tensor) -> None:
        loss_of(inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def seconds_of(step: Step, inputs: Tensor, targets: Tensor) -> float:
    """Time one step, including synchronization with the device."""
    started = time.perf_counter()
    step(inputs, targets)
    if inputs.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def serve(turns: Connection, name: str, args: argparse.Namespace) -> None:
    """Take as many steps as each message requests, and answer with their times in seconds."""
    shape, device = SHAPES[args.shape], resolve_device(args.device)
    options = (shape, device, resolve_dtype(args.dtype, device), args.compile)
    if name == "nanoGPT":
        step = theirs(*options, args.nanogpt_checkout)
    else:
        step = ours(*options, with_kernels=name == "minigpt")
    size = 2, args.batch or shape["batch"], shape["context"]
    while n_steps := turns.recv():
        batches = [torch.randint(VOCABULARY, size, device=device) for _ in range(n_steps)]
        turns.send([seconds_of(step, inputs, targets) for inputs, targets in batches])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nanogpt-checkout", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="cpu")
    parser.add_argument("--batch", type=int, help="sequences [the shape's]")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=6, help="steps per turn [6]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    turns, times = {}, {}
    for name in ("minigpt", "without its kernels", "nanoGPT"):
        turns[name], end = context.Pipe()
        context.Process(target=serve, args=(end, name, args), daemon=True).start()
        times[name] = []
    for turn in range(args.turns + 1):  # the first one warms up
        for name, connection in turns.items():
            connection.send(args.steps)
            seconds = connection.recv()
            times[name] += seconds[1:] if turn else []
    for connection in turns.values():
        connection.send(0)  # ends the process
    ms = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    shape = SHAPES[args.shape] | ({"batch": args.batch} if args.batch else {})
    n_tokens = shape["batch"] * shape["context"]
    print("| | ms/step | tokens/s |\n| --- | --- | --- |")
    for name, value in ms.items():
        print(f"| {name} | {value:.1f} | {1e3 * n_tokens / value:,.0f} |")
    ratio = ms["nanoGPT"] / ms["minigpt"]
    device = resolve_device(args.device)
    facts = {"shape": shape, "dtype": str(resolve_dtype(args.dtype, device)), "device": str(device)}
    print(f"\nratio {ratio:.2f}\n{json.dumps(facts | {'threads': torch.get_num_threads()})}")


if __name__ == "__main__":
    main()
