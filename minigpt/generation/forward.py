"""A model with its KV cache: tokens in, logits of the next token out.

Shapes: B rows, T new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring

FAST = "generation.fast"
"""Module of the ring that decodes faster."""


class PlainForward:
    """Decodes with the model's own ``forward``, which every faster path must match."""

    is_compiled = False
    """Whether tokens are decoded through a compiled graph."""
    keeps_passes = False
    """Whether the tensors of a recorded pass stay valid until the cache is truncated."""

    def __init__(
        self, model: LanguageModel, *, capacity: int, recorder: Recorder | None = None
    ) -> None:
        """Args: capacity, the number of positions that the cache has room for."""
        self.model, self.recorder = model, recorder
        self.config, self.device = model.config, model.device
        self.cache = KVCache(
            model.config, capacity=capacity, device=model.device, dtype=model.dtype
        )

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        """Append tokens (B, T) to every row; return the logits (B, V), float32, after them.

        The next call may overwrite the logits.
        """
        logits = self.model(tokens, self.cache, self.recorder, logits_to_keep=1)
        return logits[:, -1].float()

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order; repeats are allowed."""
        self.cache.select(rows)


def make_forward(
    model: LanguageModel,
    *,
    capacity: int,
    n_rows: int = 1,
    recorder: Recorder | None = None,
    compile: bool | None = False,
) -> PlainForward:
    """Return the fastest forward pass for decoding: the fast ring's if it supports the model.

    Args: capacity, the number of positions that the cache has room for; n_rows, the largest number
        of rows; compile, as for ``fast.is_compiled``.
    Raises: ConfigError if compiling is requested but not possible.
    """
    fast = ring(FAST) if compile else find_ring(FAST)
    sizes = {"capacity": capacity, "n_rows": n_rows, "recorder": recorder}
    forward = fast.make_forward(model, **sizes, compile=compile) if fast else None
    return forward or PlainForward(model, capacity=capacity, recorder=recorder)
