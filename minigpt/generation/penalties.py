"""Penalties for tokens that a text has already, on logits (B, V) and tokens (B, N)."""

import torch
from torch import Tensor

from minigpt.config import SamplingConfig


def penalize(logits: Tensor, tokens: Tensor, n_prompt: int, config: SamplingConfig) -> Tensor:
    """Apply all penalties. Args: tokens, those of the prompt (n_prompt) first."""
    logits = penalize_repetition(logits, tokens, config.repetition_penalty)
    logits = penalize_presence(logits, tokens[:, n_prompt:], config.presence_penalty)
    return penalize_frequency(logits, tokens[:, n_prompt:], config.frequency_penalty)


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
