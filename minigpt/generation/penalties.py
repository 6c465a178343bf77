"""Penalties on the logits (B, V) of tokens (B, N) that a text already contains."""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.config import SamplingConfig


class Penalties:
    """Applies a sampler's penalties, and stores all tokens of each row, also beyond the window."""

    def __init__(
        self, config: SamplingConfig, prompt: Sequence[int], n_rows: int, device: torch.device | str
    ) -> None:
        """Args: prompt, token ids that every row starts with."""
        self._config, self._n_prompt = config, len(prompt)
        tokens = torch.tensor([list(prompt)] * n_rows, dtype=torch.int64, device=device)
        self._tokens = tokens  # (B, N)

    def add(self, tokens: Tensor) -> None:
        """Add the next token of each row (B,)."""
        self._tokens = torch.cat((self._tokens, tokens[:, None]), dim=1)

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        self._tokens = self._tokens[rows]

    def penalized(self, logits: Tensor) -> Tensor:
        """Apply all penalties to logits (B, V)."""
        config, output = self._config, self._tokens[:, self._n_prompt :]
        logits = penalize_repetition(logits, self._tokens, config.repetition_penalty)
        logits = penalize_presence(logits, output, config.presence_penalty)
        return penalize_frequency(logits, output, config.frequency_penalty)


def penalize_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Divide positive logits (B, V) of the tokens (B, N) by the penalty, multiply negative ones.

    Repeated tokens count once.

    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    if penalty == 1:
        return logits
    chosen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def penalize_presence(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Subtract the penalty from the logits (B, V) of the tokens (B, N); repeats count once.

    Source: OpenAI, API guide, "Frequency and presence penalties".
    """
    if penalty == 0:
        return logits
    return logits.scatter(1, tokens, logits.gather(1, tokens) - penalty)


def penalize_frequency(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Subtract the penalty from the logits (B, V) of the tokens (B, N) for each occurrence.

    Source: OpenAI, API guide, "Frequency and presence penalties".
    """
    if penalty == 0:
        return logits
    return logits.scatter_add(1, tokens, logits.new_full(tokens.shape, -penalty))
