"""Compute the loss of a model over a text in one deterministic pass."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.device import autocast, to_device, widest_float
from minigpt.model.language_model import LanguageModel
from minigpt.text.batches import NO_TARGET

_TOKENS_AT_ONCE = 16_384
"""Maximum number of tokens per forward pass."""
_TOKENS_AT_ONCE_ON_CPU = 1024
"""The same on a CPU, where 4,096 took 1.07 times as long, and 16,384 a third longer than that."""
LOGITS_AT_ONCE = 2**27
"""Default maximum number of logits per forward pass: half a GiB in float32."""


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text."""

    nats: float
    """Sum of -ln p(token | previous tokens in its window)."""
    n_tokens: int
    """Number of tokens predicted."""
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


def windows_at_once(vocab_size: int, window_length: int, device_type: str) -> int:
    """Return the number of windows per forward pass that keeps its logits small."""
    most = _TOKENS_AT_ONCE_ON_CPU if device_type == "cpu" else _TOKENS_AT_ONCE
    n_tokens = min(most, LOGITS_AT_ONCE // vocab_size)
    return max(1, n_tokens // window_length)


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
    nats = torch.zeros((), dtype=widest_float(device), device=device)
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
