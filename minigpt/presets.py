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


def default_run() -> RunConfig:
    """Return the settings of a run of the default preset, whose vocabulary is not known yet."""
    return build(RunConfig, merge(preset(DEFAULT_PRESET), {"model": {"vocab_size": 257}}))
