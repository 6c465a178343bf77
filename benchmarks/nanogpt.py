"""nanoGPT's CPU recipe, from a checkout or a stand-in of the same shape, timed like minigpt.

Its README has the recipe for a computer without a GPU: 4 layers, width 128, context 64, batch size
12, 2,000 steps of AdamW with a cosine schedule, dropout 0.
"""

import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.model.gpt import GPT

N_STEPS = 2000
CONTEXT, BATCH = 64, 12
_PEAK_LR, _LEAST_LR, _WARMUP = 1e-3, 1e-4, 100

LossOf = Callable[[Tensor, Tensor], Tensor]
"""Inputs and targets, each (B, T) -> mean loss."""


def real(
    checkout: Path, vocab_size: int, *, device: str = "cpu", **shape: int
) -> tuple[nn.Module, LossOf, Any]:
    """Return nanoGPT's model, loss and optimizer, from the model.py of a checkout."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks up its module there
    spec.loader.exec_module(module)
    options = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": CONTEXT} | shape
    model = module.GPT(module.GPTConfig(vocab_size=vocab_size, dropout=0.0, bias=False, **options))
    model.to(device)
    optimizer = model.configure_optimizers(0.1, _PEAK_LR, (0.9, 0.99), device)
    return model, lambda inputs, targets: model(inputs, targets)[1], optimizer


def recreated(
    vocab_size: int, *, device: str = "cpu", **shape: int
) -> tuple[nn.Module, LossOf, Any]:
    """Return a stand-in of the same shape, built from minigpt's gpt2 layout and torch's AdamW."""
    options = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": CONTEXT} | shape
    model = GPT(
        ModelConfig(
            vocab_size=vocab_size,
            family="gpt2",
            n_layer=options["n_layer"],
            n_head=options["n_head"],
            d_model=options["n_embd"],
            context_length=options["block_size"],
            tie_embeddings=True,
        )
    )
    model.init_weights()
    model.to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=_PEAK_LR, betas=(0.9, 0.99))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    return model, loss_of, optimizer


def train(
    tokens: Tensor, validate: Callable[[LossOf], float], checkout: Path | None, eval_every: int
) -> dict[str, Any]:
    """Train with the recipe; steps are timed, evaluation is not.

    Args: tokens, the training text's bytes; validate, returns the loss on the validation text;
        checkout, of nanoGPT, None for the stand-in.
    """
    ids = {byte: i for i, byte in enumerate(sorted(set(tokens.tolist())))}
    torch.manual_seed(1337)
    model, loss_of, optimizer = real(checkout, len(ids)) if checkout else recreated(len(ids))
    table = torch.zeros(257, dtype=torch.int64)
    for byte, i in ids.items():
        table[byte] = i
    train_ids = table[tokens]

    def loss_of_bytes(inputs: Tensor, targets: Tensor) -> Tensor:
        return loss_of(table[inputs], table[targets])

    curve, elapsed = [], 0.0
    for step in range(N_STEPS):
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = _lr(step)
        starts = torch.randint(len(train_ids) - CONTEXT, (BATCH,))
        windows = torch.stack([train_ids[i : i + CONTEXT + 1] for i in starts.tolist()])
        inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        loss_of(inputs, targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed += time.perf_counter() - started
        if (step + 1) % eval_every == 0 or step + 1 == N_STEPS:
            model.eval()
            curve.append((round(elapsed, 2), round(validate(loss_of_bytes), 4)))
            model.train()
            print(f"  {elapsed:7.1f} s  step {step + 1:>5}  val {curve[-1][1]:.4f}")
    return {
        "preset": "nanoGPT" if checkout else "nanoGPT's recipe",
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": "torch.float32",
        "tokenizer": "bytes",
        "steps": N_STEPS,
        "tokens_per_s": round(N_STEPS * BATCH * CONTEXT / elapsed),
        "context_length": CONTEXT,
        "curve": curve,
    }


def _lr(step: int) -> float:
    if step < _WARMUP:
        return _PEAK_LR * (step + 1) / (_WARMUP + 1)
    share = (step - _WARMUP) / (N_STEPS - _WARMUP)
    return _LEAST_LR + 0.5 * (1 + math.cos(math.pi * share)) * (_PEAK_LR - _LEAST_LR)
