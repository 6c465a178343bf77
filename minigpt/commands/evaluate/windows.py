"""The text to evaluate, cut into windows."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError, DataError
from minigpt.evaluation import windows_at_once
from minigpt.text.batches import validation_windows
from minigpt.text.tokens import PreparedData, TokenSpan

_LONGEST_WINDOW = 1024  # by default: the full context of some models needs too much memory


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
        device_type: str,
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
            batch_size=batch_size or windows_at_once(model.vocab_size, length, device_type),
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
