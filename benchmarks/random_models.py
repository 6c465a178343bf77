"""Hugging Face folders with random weights in known shapes, for the decoding benchmarks."""

from dataclasses import replace
from pathlib import Path

import torch

from minigpt.checkpoint.model_folder import write_model
from minigpt.config import ModelConfig
from minigpt.model.cost import parameter_count
from minigpt.model.gpt import GPT
from minigpt.presets import preset
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer, make_tokenizer

BYTES = make_tokenizer("bytes", [])
ENDLESS = BytesTokenizer("bytes", (2**30,))
"""A tokenizer whose end-of-text token is outside every vocabulary."""

SHAPES = {
    "gpt2": ModelConfig(
        vocab_size=50257,
        family="gpt2",
        n_layer=12,
        n_head=12,
        d_model=768,
        context_length=1024,
        tie_embeddings=True,
    ),
    "mini": ModelConfig(vocab_size=BYTES.vocab_size, **preset("mini")["model"]),
}


def shape_of(name: str, n_positions: int) -> ModelConfig:
    """Return a shape whose context length is at least this number of positions."""
    config = SHAPES[name]
    return replace(config, context_length=max(config.context_length, n_positions))


def write_random(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None = None) -> None:
    """Write a model with fixed random weights whose next token depends on every weight.

    With the usual initial weights, a block adds little to the residual stream, and greedy decoding
    repeats one token. Weights of blocks are twice as large here, so that the text varies.
    """
    model = GPT(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                gain = 2 if name.startswith("blocks") else 1
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(std=0.02, generator=generator)
            else:
                parameter.fill_(1)
    write_model(folder, model, tokenizer)


def weights_read(config: ModelConfig) -> int:
    """Return the number of weights that a decode step reads: all except embedding lookups."""
    lookups = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    if config.family == "gpt2":
        lookups += config.context_length * config.d_model
    return parameter_count(config) - lookups
