"""Named starting points for a run: shape, budget and settings that fit each other.

docs/training.md has the measurements. Every value can be changed by an option, a TOML file or
--set.
"""

from typing import Any

from minigpt.config import RunConfig
from minigpt.errors import require_choice
from minigpt.settings import build, merge

DEFAULT_PRESET = "nano"
PRESETS: dict[str, dict[str, Any]] = {
    # About 1M parameters: a minute on a laptop CPU. Wide and shallow: fewer, larger kernels.
    "nano": {
        "model": {
            "n_layer": 2,
            "n_head": 6,
            "n_kv_head": 2,
            "d_model": 192,
            "d_mlp": 384,
            "context_length": 256,
            "qk_norm": True,
        },
        "training": {
            "max_steps": 500,
            "batch_size": 4,
            "context_warmup_length": 64,
            "lr": 0.006,
            "embedding_lr": 0.02,
            "momentum": 0.9,
        },
        "data": {"tokenizer": "bpe"},
    },
    # About 10M parameters: for a GPU; slow on a CPU.
    "mini": {
        "model": {
            "n_layer": 6,
            "n_head": 6,
            "d_model": 384,
            "context_length": 256,
            "qk_norm": True,
        },
        "training": {
            "max_steps": 2000,
            "batch_size": 8,
            "context_warmup_length": 64,
            "lr": 0.003,
            "embedding_lr": 0.02,
            "momentum": 0.9,
        },
        "data": {"tokenizer": "bpe"},
    },
    # The shape of GPT-2 small, 124M parameters with its vocabulary. Its learning rates are not
    # measured: they extrapolate nano's and mini's, as one over the width.
    "small": {
        "model": {
            "n_layer": 12,
            "n_head": 12,
            "d_model": 768,
            "context_length": 1024,
            "qk_norm": True,
            "tie_embeddings": True,
        },
        "training": {
            "max_steps": 20_000,
            "batch_size": 128,
            "micro_batch_size": 16,
            "lr": 0.0015,
            "embedding_lr": 0.003,
            "eval_every": 500,
            "save_every": 1000,
            "eval_tokens": 1_048_576,
        },
        "data": {"tokenizer": "gpt2"},
    },
}


def preset(name: str) -> dict[str, Any]:
    """Return a preset's settings, nested as in RunConfig.

    Raises: ConfigError for an unknown name, with the nearest one.
    """
    require_choice("preset", name, PRESETS)
    return merge(PRESETS[name])


LARGE_TEXT = 2.0
"""Training tokens per parameter from which a text counts as large."""
SMALL_TEXT = 0.2
"""Training tokens per parameter below which a text counts as small."""
MOST_EPOCHS, LEAST_STEPS, LEAST_TOKENS = 10.0, 200, 4096


def for_text(n_train_tokens: int, n_parameters: int, step_tokens: int) -> dict[str, Any]:
    """Return the settings that depend on the size of the text: those against overfitting.

    They depend on the text and the model, never on the budget, so that a larger budget is the same
    run with a longer schedule; and the budget is limited where more epochs do not improve the
    model. docs/training.md has the measurements.

    Args: step_tokens, tokens per step.
    Returns: settings, nested as in RunConfig; ``training.max_epochs`` is an upper limit.
    """
    size = n_train_tokens / n_parameters
    training: dict[str, Any] = {"average": 0.98, "patience": 4.0}
    if size >= LARGE_TEXT:
        return {"training": training}
    training["dropout_start"] = 1.5
    if n_train_tokens >= LEAST_TOKENS:  # a few pages are only for trying things out
        training["max_epochs"] = max(MOST_EPOCHS, LEAST_STEPS * step_tokens / n_train_tokens)
    return {"model": {"dropout": 0.25 if size < SMALL_TEXT else 0.1}, "training": training}


def default_run() -> RunConfig:
    """Return the settings of a run of the default preset, whose vocabulary is not known yet."""
    return build(RunConfig, merge(preset(DEFAULT_PRESET), {"model": {"vocab_size": 257}}))
