"""How well a model predicts a text: one deterministic pass, with no random number drawn."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.device import autocast
from minigpt.model.language_model import LanguageModel

LONGEST_WINDOW = 1024
"""The most tokens in a window, unless asked for: the context of some models fits no machine."""
_TOKENS_AT_ONCE = 16_384
LOGITS_AT_ONCE = 2**27
"""The most logits of one forward pass, where we choose its size: half a GiB in float32."""


@dataclass(frozen=True)
class Evaluation:
    """The loss over a text."""

    nats: float
    """Sum of -ln p(token | those before it in its window)."""
    n_tokens: int
    """Tokens predicted."""
    n_bytes: int
    """UTF-8 bytes that these tokens stand for."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy, the loss that training lowers."""
        return self.nats / self.n_tokens

    @property
    def bits_per_byte(self) -> float:
        """Loss that can be compared between tokenizers; nan if the tokens stand for no byte."""
        return self.nats / math.log(2) / self.n_bytes if self.n_bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean cross-entropy: the equally likely tokens it is unsure between."""
        try:
            return math.exp(self.nats_per_token)
        except OverflowError:
            return math.inf


def windows_at_once(vocab_size: int, window_length: int) -> int:
    """Return how many windows one forward pass takes, so that their logits fit any machine."""
    n_tokens = min(_TOKENS_AT_ONCE, LOGITS_AT_ONCE // vocab_size)
    return max(1, n_tokens // window_length)


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    token_byte_lengths: np.ndarray,
    *,
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Sum the loss over batches of inputs (B, T) and targets (B, S), as the model stands.

    The targets are what follows the last S inputs. Dropout is off during the pass and as it was
    after it.
    """
    was_training = model.training
    device = model.embedding.weight.device
    model.eval()
    # Summed on the device in float64: one synchronisation, and no rounding with the text's length.
    nats = torch.zeros((), dtype=torch.float64 if device.type != "mps" else torch.float32)
    nats = nats.to(device)
    n_tokens = n_bytes = 0
    for inputs, targets in batches:
        with autocast(device, dtype):
            logits = model(inputs.to(device), logits_to_keep=targets.shape[1])
        loss = F.cross_entropy(
            logits.float().flatten(0, 1), targets.to(device).flatten(), reduction="sum"
        )
        nats += loss
        n_tokens += targets.numel()
        n_bytes += int(token_byte_lengths[targets.numpy()].sum())
    model.train(was_training)
    return Evaluation(nats=nats.item(), n_tokens=n_tokens, n_bytes=n_bytes)
