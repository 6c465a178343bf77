"""Logits -> token.

The order in which the options apply, each skipped at its neutral value:
repetition penalty, temperature, top-k, top-p, min-p, then the draw.

Shapes: V vocabulary.
"""

import torch
from torch import Tensor

from minigpt.config import SamplingConfig


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were already there less likely.

    Positive logits are divided by the penalty, negative ones multiplied.

    Args: logits (V,); seen, ids (N,), repeats allowed.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    chosen = logits[seen]
    return logits.index_copy(0, seen, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest logits (V,), and those equal to the lowest of them; the rest is -inf."""
    if k >= logits.numel():
        return logits
    threshold = logits.topk(k).values[-1]
    return logits.masked_fill(logits < threshold, -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens (V,) whose probabilities sum to at least p; the rest is -inf.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1.
    """
    ordered, order = logits.sort(descending=True, stable=True)
    probability = ordered.softmax(dim=0)
    # A token is left out when those before it already reach p; the first never is.
    is_left_out = probability.cumsum(dim=0) - probability >= p
    is_left_out[0] = False
    return logits.index_fill(0, order[is_left_out], -torch.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens (V,) at least p times as probable as the best; the rest is -inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    probability = logits.softmax(dim=0)
    return logits.masked_fill(probability < p * probability.max(), -torch.inf)


class Sampler:
    """Draws tokens by a SamplingConfig, with its own generator: no global state is touched."""

    def __init__(self, config: SamplingConfig, *, seed: int, device: torch.device) -> None:
        self.config = config
        self.generator = torch.Generator(device).manual_seed(seed)

    def distribution(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Return the logits (V,) that the draw is made from; temperature must be above 0."""
        config = self.config
        if config.repetition_penalty != 1:
            logits = penalize_repetition(logits, seen, config.repetition_penalty)
        # A tiny temperature would overflow before the softmax could subtract the largest logit, and
        # one below float32's range would be 0 there, and 0 / 0 no number.
        temperature = max(config.temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.max()) / temperature
        if config.top_k:
            logits = keep_top_k(logits, config.top_k)
        if config.top_p < 1:
            logits = keep_top_p(logits, config.top_p)
        if config.min_p:
            logits = keep_min_p(logits, config.min_p)
        return logits

    def draw(self, logits: Tensor, seen: Tensor) -> Tensor:
        """Draw one token id, as a 0-dim tensor on the device.

        Args: logits (V,), float32; seen, ids (N,) of the context so far.
        """
        if self.config.temperature == 0:
            if self.config.repetition_penalty != 1:
                logits = penalize_repetition(logits, seen, self.config.repetition_penalty)
            return logits.argmax()
        probability = self.distribution(logits, seen).softmax(dim=0)
        # argmax p / Exp(1) is a draw from p, without multinomial's synchronisation with the host.
        noise = torch.empty_like(probability).exponential_(generator=self.generator)
        return (probability / noise).argmax()
