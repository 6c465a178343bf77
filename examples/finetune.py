"""Fine-tune a model with your own training loop, in plain PyTorch.

    python examples/finetune.py book my-letters.txt letters

Reads the model of a run (or a Hugging Face folder), trains it on a text, and writes a model folder
that `minigpt generate --model letters` and `transformers` can load. `minigpt train --from book`
does the same with evaluation, checkpoints and exact resume.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import minigpt
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.resolve import resolve_model

N_STEPS = 50
BATCH_SIZE = 4


def main(source: str, text: str, target: str) -> None:
    """Fine-tune the model ``source`` on a text file and write it to the folder ``target``."""
    loaded = read_model(resolve_model(source), dtype=torch.float32)
    model, tokenizer = loaded.model.train(), loaded.tokenizer
    tokens = torch.tensor(tokenizer.encode(Path(text).read_text(encoding="utf-8")))
    length = min(model.config.context_length, 256, len(tokens) - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 / model.config.d_model)
    generator = torch.Generator().manual_seed(0)
    for step in range(N_STEPS):
        starts = torch.randint(len(tokens) - length, (BATCH_SIZE,), generator=generator)
        windows = torch.stack([tokens[start : start + length + 1] for start in starts])
        logits = model(windows[:, :-1])  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1:3}  loss {loss.item():.4f} nats/token")
    write_model(Path(target), model.eval(), tokenizer)
    for item in minigpt.generate(target, max_new_tokens=40, temperature=0.7, seed=1):
        print(item.text, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
