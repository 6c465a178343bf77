"""Logits -> token.

The options apply in this order, each skipped at its neutral value:

1. ignore_eos removes the tokens that end a text;
2. repetition_penalty, on tokens of the prompt and the output, as in transformers and vLLM;
3. presence_penalty and frequency_penalty, on tokens of the output, as in OpenAI's API and vLLM;
4. temperature; 0 picks the most probable token and skips the rest;
5. top_k;
6. top_p, on the probabilities after top_k;
7. min_p, relative to the most probable token;
8. sampling, by one uniform random number from the row's own generator.

From 4 on the order is that of transformers. logprobs are those of the unmodified logits.

Shapes: B rows, V vocabulary, K candidates, N tokens.
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.model.device import widest_float
from minigpt.rings import ring

_FIRST_CANDIDATES = 64
_N_UNIFORMS = 64  # random numbers drawn together
_TINY_TEMPERATURE = 1e-6


class Sampler:
    """Samples a token for each row.

    Each row has its own generator: there is no global state, and no row depends on another.
    """

    def __init__(
        self,
        config: SamplingConfig,
        *,
        seeds: Sequence[int],
        device: torch.device | str,
        prompt: Sequence[int] = (),
        end_of_text: Collection[int] = (),
    ) -> None:
        """Args: seeds, one for each row; prompt, token ids that every row starts with."""
        self.config, self._device = config, device
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._uniforms = torch.empty(0)  # (N, B, 1), not used yet
        never = sorted(end_of_text) if config.ignore_eos else []
        self._never = torch.tensor(never, dtype=torch.int64, device=device)
        self._penalties: Any = None
        if config.repetition_penalty != 1 or config.presence_penalty or config.frequency_penalty:
            penalties = ring("generation.penalties").Penalties
            self._penalties = penalties(config, prompt, len(seeds), device)
        self._cumulative = torch.empty(0, dtype=widest_float(device), device=device)

    @torch.inference_mode()
    def draw(self, logits: Tensor, forced: int | None = None) -> Tensor:
        """Sample the next token of each row, without synchronizing with the device.

        Args: logits (B, V), float32, which are not modified; forced, the token to return instead of
            the sampled one; the RNG advances as if it had been sampled.
        Returns: token ids (B,), int64, on the device.
        """
        if self.config.temperature == 0:
            tokens = self._penalized(logits).argmax(dim=-1)
        else:
            probability, ids = self.candidates(logits)
            index = self._sample(probability)
            tokens = (index if ids is None else ids.gather(1, index))[:, 0]
        if forced is not None:
            tokens = torch.full_like(tokens, forced)
        if self._penalties:
            self._penalties.add(tokens)
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows, in this order."""
        index = torch.tensor(rows, device=self._device)
        if self._penalties:
            self._penalties.keep(index)
        self._generators = [self._generators[row] for row in rows]
        if len(self._uniforms):
            self._uniforms = self._uniforms[:, index]

    @torch.inference_mode()
    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the distribution to sample from, for a temperature above 0.

        Returns: probabilities (B, K), float32, and their ids (B, K), most probable first; or
            probabilities (B, V) and None if all tokens are candidates.
        """
        config = self.config
        logits = self._penalized(logits)
        if config.temperature < _TINY_TEMPERATURE:
            # Otherwise the division overflows before the softmax subtracts the largest logit.
            logits = logits - logits.amax(dim=-1, keepdim=True)
        # A smaller temperature would be 0 in float32, and 0 / 0 is NaN.
        logits = logits / max(config.temperature, torch.finfo(torch.float32).tiny)
        if config.top_k or config.top_p < 1 or config.min_p:
            kept, ids = _kept(logits, config)
            return kept.softmax(dim=-1), ids
        return logits.softmax(dim=-1), None

    def _penalized(self, logits: Tensor) -> Tensor:
        """Apply options 1 to 3."""
        if len(self._never):
            logits = logits.index_fill(1, self._never, -torch.inf)
        return self._penalties.penalized(logits) if self._penalties else logits

    def _sample(self, probability: Tensor) -> Tensor:
        """Sample by inversion: return the index (B, 1) where the cumulative sum passes a uniform.

        The uniforms are drawn on the CPU and copied in blocks: on a GPU, drawing one number takes
        as long as a complete step of a small model.
        """
        if not len(self._uniforms):
            drawn = [
                torch.rand(_N_UNIFORMS, 1, dtype=torch.float64, generator=generator)
                for generator in self._generators
            ]
            self._uniforms = torch.stack(drawn, dim=1).to(self._device, self._cumulative.dtype)
        uniform, self._uniforms = self._uniforms[0], self._uniforms[1:]
        # float64 if supported: a float32 cumulative sum loses many rare tokens to rounding.
        dtype = self._cumulative.dtype
        if self._cumulative.shape != probability.shape:
            self._cumulative = torch.empty_like(probability, dtype=dtype)
        torch.cumsum(probability, dim=-1, dtype=dtype, out=self._cumulative)
        index = torch.searchsorted(self._cumulative, uniform * self._cumulative[:, -1:], right=True)
        # With NaN logits the index is out of range; the decoder raises an error for them.
        return index.clamp_(max=probability.shape[1] - 1)


def _kept(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Apply top-k, top-p and min-p to logits (B, V).

    Each keeps the most probable tokens, so sorting can stop at the first one removed. Sorting a
    large vocabulary takes milliseconds.

    Returns: logits, most probable first, -inf if removed, and their ids, each (B, K).
    """
    n_vocab = logits.shape[1]
    # Checking whether these are enough would synchronize with a GPU.
    n_first = max(_FIRST_CANDIDATES, 2 * config.top_k) if logits.device.type == "cpu" else n_vocab
    total = logits.logsumexp(dim=-1, keepdim=True) if config.top_p < 1 else None
    for n in (n_first, 16 * n_first):
        if 4 * n < n_vocab:
            best, ids = logits.topk(n)
            kept = _truncated(best, total, config)
            if bool((kept[:, -1] == -torch.inf).all()):
                return kept, ids
    best, ids = logits.sort(dim=-1, descending=True, stable=True)
    return _truncated(best, total, config), ids


def _truncated(best: Tensor, total: Tensor | None, config: SamplingConfig) -> Tensor:
    """Set the logits that top-k, top-p and min-p remove to -inf.

    Args: best, the highest logits (B, K), descending; total (B, 1), logsumexp of all logits, needed
        for top_p.
    Sources: top-p, Holtzman et al. 2020, arXiv:1904.09751, section 3.1; min-p, Nguyen et al. 2024,
        arXiv:2407.01082.
    """
    if 0 < config.top_k < best.shape[1]:
        # Keep ties with the k-th token.
        best = best.masked_fill(best < best[:, config.top_k - 1, None], -torch.inf)
        total = best.logsumexp(dim=-1, keepdim=True)
    if config.top_p < 1:
        assert total is not None
        probability = (best - total).exp()
        # Remove tokens before which the probabilities already sum to p, but never the first.
        is_removed = probability.cumsum(dim=-1) - probability >= config.top_p
        is_removed[:, 0] = False
        best = best.masked_fill(is_removed, -torch.inf)
    if config.min_p:
        best = best.masked_fill(best < best[:, :1] + math.log(config.min_p), -torch.inf)
    return best
