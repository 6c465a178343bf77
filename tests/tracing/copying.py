"""A small model trained on repeated random sequences."""

import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.config import ModelConfig, TrainingConfig
from minigpt.model.gpt import GPT
from minigpt.training.optim import make_optimizers

VOCAB, CONTEXT = 40, 24
PREVIOUS, INDUCTION = 1, 2
"""Layers of the previous-token head and the induction head; each layer has one head."""


def doubled(n_rows: int, n_repeated: int, generator: torch.Generator) -> Tensor:
    once = torch.rand(n_rows, VOCAB, generator=generator).argsort(dim=1)[:, :n_repeated]
    return torch.cat((once, once), dim=1)


def copying_model(*, seed: int = 0, n_steps: int = 200) -> GPT:
    """Train a model of three one-head layers, with torch's default initialization."""
    torch.manual_seed(seed)
    shape = {"vocab_size": VOCAB, "context_length": CONTEXT, "n_layer": 3, "n_head": 1}
    model = GPT(ModelConfig(**shape, d_model=48, rope_theta=30.0))
    training = TrainingConfig(max_steps=n_steps, lr=0.01, embedding_lr=0.01, weight_decay=0.0)
    optimizers = make_optimizers(model, training, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    for step in range(n_steps):
        n_repeated = int(torch.randint(8, CONTEXT // 2 + 1, (1,), generator=generator))
        tokens = doubled(24, n_repeated, generator)
        logits = model(tokens, logits_to_keep=n_repeated)[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), tokens[:, n_repeated + 1 :].flatten()).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * min(1.0, (n_steps - step) / (0.3 * n_steps))
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()
