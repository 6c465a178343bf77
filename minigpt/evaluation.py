"""Loss of a model over a text: one deterministic pass."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError, DataError
from minigpt.model.device import autocast, to_device
from minigpt.model.language_model import LanguageModel
from minigpt.text.batches import NO_TARGET, validation_windows
from minigpt.text.shards import PreparedData, TokenSpan

_LONGEST_WINDOW = 1024  # by default: the full context of some models needs too much memory
_TOKENS_AT_ONCE = 16_384
LOGITS_AT_ONCE = 2**27
"""Most logits of one forward pass by default: half a GiB in float32."""


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text."""

    nats: float
    """Sum of -ln p(token | those before it in its window)."""
    n_tokens: int
    """Tokens predicted."""
    n_bytes: int
    """UTF-8 bytes of these tokens."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy, the training loss. NaN without tokens."""
        return self.nats / self.n_tokens if self.n_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Loss that can be compared between tokenizers; NaN if the tokens have no bytes."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy; inf if it is too large for a float."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def windows_at_once(vocab_size: int, window_length: int) -> int:
    """Return the batch size at which the logits of a forward pass stay small."""
    n_tokens = min(_TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocab_size)
    return max(1, n_tokens // window_length)


@dataclass(frozen=True, kw_only=True)
class Windows:
    """How a text is cut into windows."""

    context_length: int
    """Tokens per window."""
    stride: int
    """Tokens from the start of a window to that of the next."""
    batch_size: int
    """Windows per forward pass."""
    n_tokens: int
    """Maximum number of tokens to predict."""

    @classmethod
    def fitting(
        cls,
        model: ModelConfig,
        n_tokens: int,
        *,
        context_length: int | None = None,
        stride: int | None = None,
        batch_size: int | None = None,
        eval_tokens: int | None = None,
    ) -> Self:
        """Return windows for a model and a text of n_tokens, with defaults for what is None.

        Raises: ConfigError for a window longer than the context, or a stride longer than a window.
        """
        longest = context_length or min(model.context_length, _LONGEST_WINDOW)
        _require_at_most("context_length", longest, model.context_length)
        _require_at_most("stride", stride or 1, longest)
        length = min(longest, n_tokens - 1)  # a short text is one short window
        return cls(
            context_length=length,
            stride=min(stride or length, length),
            batch_size=batch_size or windows_at_once(model.vocab_size, length),
            n_tokens=min(eval_tokens or n_tokens, n_tokens - 1),
        )

    def batches(self, span: TokenSpan) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield one pass over a span in batches of inputs and targets, as for ``evaluate``."""
        return validation_windows(
            span, self.context_length, self.n_tokens, self.batch_size, stride=self.stride
        )


def _require_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise ConfigError(f"{name} must be between 1 and {most}: it is {value}.")


def span_to_evaluate(data: PreparedData, val_fraction: float | None) -> TokenSpan:
    """Return the tokens of a text, or of its last fraction as training splits it.

    Raises: DataError if it is too short to predict a token.
    """
    if val_fraction is not None:
        span = data.tokens.split(val_fraction)[1]
    else:
        # If several tokens separate documents, only the token after the last one is predicted.
        first = max(len(data.tokenizer.separator) - 1, 0)
        span = TokenSpan(data.tokens, first, len(data.tokens), "whole")
    if len(span) < 2:
        raise DataError(
            f"too little text: the first of its tokens ({len(span)} here) is not predicted. Give "
            "more text."
        )
    return span


def text_bytes(data: PreparedData, span: TokenSpan) -> int:
    """Return the number of bytes of a text, without its first token if that is not predicted.

    The byte lengths of its tokens may have another sum: some tokenizers add a space before a text,
    or normalize characters.
    """
    if data.tokenizer.separator:
        return data.manifest.n_bytes
    first = span.windows(np.zeros(1, np.int64), 1)[0, 0]
    return data.manifest.n_bytes - int(data.tokenizer.token_byte_lengths[first])


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_byte_lengths: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Sum the loss over batches of inputs (B, T) and targets (B, S).

    The targets are the tokens after the last S inputs. The model is in evaluation mode during the
    pass; its mode is restored afterwards. The RNG state does not change.
    """
    was_training = model.training
    device = model.embedding.weight.device
    model.eval()
    # Summed on the device, for a single synchronization; in float64 if supported, for long texts.
    sum_dtype = torch.float32 if device.type == "mps" else torch.float64
    nats = torch.zeros((), dtype=sum_dtype, device=device)
    n_tokens = n_bytes = 0
    for inputs, targets in batches:
        tokens, next_tokens = to_device((inputs, targets), device)
        with autocast(device, dtype):
            logits = model(tokens, logits_to_keep=targets.shape[1])
        nats += F.cross_entropy(
            logits.float().flatten(0, 1), next_tokens.flatten(), reduction="sum"
        )
        counted = targets[targets != NO_TARGET]
        n_tokens += counted.numel()
        n_bytes += int(token_byte_lengths[counted.numpy()].sum())
    model.train(was_training)
    return Evaluation(nats=nats.item(), n_tokens=n_tokens, n_bytes=n_bytes)
