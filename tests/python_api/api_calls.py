"""A small model and options for calls from Python."""

from typing import Any

from small_models import small_model

from minigpt.text.tokenizer import BytesTokenizer

TINY: dict[str, Any] = {
    "tokenizer": "bytes",
    "max_steps": 4,
    "context_length": 64,
    "batch_size": 2,
    "n_layer": 2,
    "n_head": 2,
    "d_model": 16,
    "d_mlp": 16,
    "log_every": 1,
    "dtype": "float32",  # evaluate uses float32 on any CPU
}
MODEL = small_model("gpt2", vocab_size=257, context_length=64)
OPTIONS: dict[str, Any] = {"tokenizer": BytesTokenizer(), "max_new_tokens": 6}
