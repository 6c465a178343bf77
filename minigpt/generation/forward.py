"""A model with its KV cache: tokens in, logits of the next token out.

Shapes: B rows (sequences of one length that share a prompt), T new tokens, V vocabulary.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.errors import ConfigError, MinigptWarning, ResourceError
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.rings import has_ring, ring

FAST = "generation.fast"
"""Ring of the fast ways to decode."""


class PlainForward:
    """Decoding by the model's own ``forward``, which every faster path must equal."""

    is_compiled = False
    """Whether tokens are decoded through a compiled graph."""

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
    compiles: bool | None = False,
) -> PlainForward:
    """Return the fastest way to decode with a model: the fast ring where it supports the model.

    Args: capacity, the number of positions that the cache has room for; n_rows, the largest number
        of rows; compiles, as for ``is_compiled``.
    Raises: ConfigError if compiling is asked for and not possible.
    """
    if compiles and not ring(FAST).supports(model, compiles=True):
        raise ConfigError(
            "--compile needs a GPT with scaled_dot attention and full context on cpu or cuda: this "
            f"model is a {type(model).__name__} with {model.config.attention} on "
            f"{model.device.type}. Use --no-compile."
        )
    sizes = {"capacity": capacity, "n_rows": n_rows, "recorder": recorder}
    if is_compiled(model, compiles, n_rows):
        try:
            forward: PlainForward = ring(FAST).make_forward(model, **sizes, compiles=True)
        except (ConfigError, ResourceError) as error:
            if compiles:
                raise
            note = f"decoding without a compiled graph: {error}"
            warnings.warn(note, MinigptWarning, stacklevel=2)
        else:
            return forward
    if has_ring(FAST) and ring(FAST).supports(model):
        forward = ring(FAST).make_forward(model, **sizes)
        return forward
    return PlainForward(model, capacity=capacity, recorder=recorder)


def is_compiled(model: LanguageModel, compiles: bool | None, n_rows: int = 1) -> bool:
    """Return whether to decode through a compiled graph.

    Args: compiles, whether it is asked for; None for the default of the fast ring. If that fails,
        decoding continues without it, with a warning.
    """
    if compiles is not None:
        return compiles
    return has_ring(FAST) and bool(ring(FAST).compiles_by_default(model, n_rows))
