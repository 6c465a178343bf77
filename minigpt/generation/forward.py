"""A model with its KV cache: tokens in, logits of the next one out.

Shapes: B rows (sequences of one length that share a prompt), T new tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Protocol, TypeGuard

import torch
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel


class Forward(Protocol):
    """What decoding asks of a model, however it is computed."""

    config: ModelConfig
    device: torch.device

    @property
    def cache(self) -> KVCache:
        """The keys and values of every position so far."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Take the next tokens (B, T) of every row; return the logits (B, V), float32, after them.

        The logits may be overwritten by the next call.
        """

    def repeat(self, n_rows: int) -> None:
        """Make of the one row n that are equal."""

    def keep(self, rows: Sequence[int]) -> None:
        """Let only these rows go on, in this order."""

    def truncate(self, length: int) -> None:
        """Forget, in every row, every position from ``length`` on."""


class EagerForward:
    """The model's forward itself, as every other way must compute it."""

    def __init__(
        self, model: LanguageModel, *, capacity: int, recorder: Recorder | None = None
    ) -> None:
        """Args: capacity, the positions that the cache has room for."""
        self.model, self.recorder = model, recorder
        self.config, self.device = model.config, model.device
        self.cache = KVCache(
            model.config, capacity=capacity, device=model.device, dtype=model.dtype
        )

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        logits = self.model(tokens, self.cache, self.recorder, logits_to_keep=1)
        return logits[:, -1].float()

    def repeat(self, n_rows: int) -> None:
        self.cache.select([0] * n_rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.select(rows)

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)


def has_compiled_step(model: LanguageModel) -> TypeGuard[GPT]:
    """Tell whether a model can decode through a compiled graph."""
    return type(model) is GPT and model.config.attention == "scaled_dot"


def make_forward(
    model: LanguageModel,
    *,
    capacity: int,
    n_rows: int = 1,
    recorder: Recorder | None = None,
    compiles: bool = False,
) -> Forward:
    """Return the fastest way that the model's hardware and dtype have.

    Args: capacity, the positions that the cache has room for; n_rows, the most rows that
        ``repeat`` will be asked for.
    Raises: ConfigError if it is to be compiled, and there is no graph for such a model.
    """
    if compiles:
        if not has_compiled_step(model):
            raise ConfigError(
                "the compiled graph is of a gpt with scaled_dot attention, and this model is of "
                f"arch {model.config.arch}, attention {model.config.attention}. Use --no-compile."
            )
        from minigpt.generation.fast.compiled import CompiledForward

        return CompiledForward(model, capacity=capacity, n_rows=n_rows, recorder=recorder)
    if type(model) is GPT and model.device.type == "cpu" and not model.training:
        from minigpt.generation.fast.fused import FusedForward

        return FusedForward(model, capacity=capacity, recorder=recorder)
    return EagerForward(model, capacity=capacity, recorder=recorder)
