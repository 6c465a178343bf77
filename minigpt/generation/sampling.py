"""Logits -> token.

The order in which the options apply, each skipped at its neutral value:

1. ignore_eos takes out the tokens that end a text;
2. repetition_penalty, of tokens in the prompt or generated, as transformers and vLLM count;
3. presence_penalty and frequency_penalty, of tokens generated, as OpenAI and vLLM count;
4. temperature; 0 takes the most probable token, and nothing of what follows applies;
5. top_k;
6. top_p, of the probabilities that top_k left;
7. min_p, of the most probable token;
8. the draw, with one uniform number of the row's own generator.

From 4 on it is the order of transformers. logprobs are of the logits before all of this.

Shapes: B rows, V vocabulary, K candidates, N tokens.
"""

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from minigpt.config import SamplingConfig

_FIRST_CANDIDATES = 64
_UNIFORMS_AT_ONCE = 64
_TINY_TEMPERATURE = 1e-6


class Sampler:
    """Draws a token for each of some rows by a SamplingConfig.

    Each row has its own generator: no global state is touched, and no row's draws depend on the
    other rows.
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
        """Args: seeds, of each row; prompt, ids that every row begins with."""
        self.config = config
        self._uniforms = _Uniforms(seeds, device)
        never = sorted(end_of_text) if config.ignore_eos else []
        self._never = torch.tensor(never, dtype=torch.int64, device=device)
        self._penalizes = (
            config.repetition_penalty != 1
            or config.presence_penalty != 0
            or config.frequency_penalty != 0
        )
        self._n_prompt = len(prompt) if self._penalizes else 0
        begin = [list(prompt[: self._n_prompt]) for _ in seeds]
        # All that was ever there, whatever a window that slides has forgotten: (B, N).
        self._tokens = torch.tensor(begin, dtype=torch.int64, device=device)
        self._cumulated = torch.empty(0, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def draw(self, logits: Tensor) -> Tensor:
        """Draw the next token of each row, without waiting for the device.

        Args: logits (B, V), float32; they are not changed.
        Returns: ids (B,), int64, on the device.
        """
        if self.config.temperature == 0:
            tokens = self._penalized(logits).argmax(dim=-1)
        else:
            probability, ids = self.candidates(logits)
            places = self._places(probability)
            tokens = (places if ids is None else ids.gather(1, places))[:, 0]
        if self._penalizes:
            self._tokens = torch.cat((self._tokens, tokens[:, None]), dim=1)
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in this order."""
        index = torch.tensor(rows, device=self._tokens.device)
        self._tokens = self._tokens[index]
        self._uniforms.keep(rows)

    @torch.inference_mode()
    def candidates(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the draw is made from; the temperature must be above 0.

        Returns: probabilities (B, K), float32, and their ids (B, K), most probable first; or
            probabilities (B, V) and None where all tokens are candidates.
        """
        config = self.config
        logits = self._penalized(logits)
        if config.temperature < _TINY_TEMPERATURE:
            # It would overflow before the softmax could subtract the largest logit.
            logits = logits - logits.amax(dim=-1, keepdim=True)
        # One below float32's range would be 0 there, and 0 / 0 no number.
        logits = logits / max(config.temperature, torch.finfo(torch.float32).tiny)
        if config.top_k or config.top_p < 1 or config.min_p:
            kept, ids = _kept(logits, config)
            return kept.softmax(dim=-1), ids
        return logits.softmax(dim=-1), None

    def _penalized(self, logits: Tensor) -> Tensor:
        """Apply options 1 to 3 of the order above."""
        if len(self._never):
            logits = logits.index_fill(1, self._never, -torch.inf)
        if self._penalizes:
            config, generated = self.config, self._tokens[:, self._n_prompt :]
            logits = penalize_repetition(logits, self._tokens, config.repetition_penalty)
            logits = penalize_presence(logits, generated, config.presence_penalty)
            logits = penalize_frequency(logits, generated, config.frequency_penalty)
        return logits

    def _places(self, probability: Tensor) -> Tensor:
        """Return the place (B, 1) where each row's cumulated probability passes its number."""
        # In float32, the sum of many rare tokens would be rounded to few different numbers.
        if self._cumulated.shape != probability.shape:
            self._cumulated = torch.empty_like(probability, dtype=torch.float64)
        torch.cumsum(probability, dim=-1, dtype=torch.float64, out=self._cumulated)
        number = self._uniforms.next() * self._cumulated[:, -1:]
        places = torch.searchsorted(self._cumulated, number, right=True)
        # Logits that are no numbers give places that do not exist; the decoder refuses them.
        return places.clamp_(max=probability.shape[1] - 1)


def penalize_repetition(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Make tokens that were already there less likely.

    Positive logits are divided by the penalty, negative ones multiplied.

    Args: logits (B, V); tokens, ids (B, N), repeats allowed.
    Source: Keskar et al. 2019, arXiv:1909.05858, section 4.1.
    """
    if penalty == 1:
        return logits
    chosen = logits.gather(1, tokens)
    return logits.scatter(1, tokens, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def penalize_presence(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Take ``penalty`` once from the logits (B, V) of the tokens (B, N), repeats allowed.

    Source: OpenAI, API guide, "Frequency and presence penalties".
    """
    if penalty == 0:
        return logits
    return logits.scatter(1, tokens, logits.gather(1, tokens) - penalty)


def penalize_frequency(logits: Tensor, tokens: Tensor, penalty: float) -> Tensor:
    """Take ``penalty`` from the logits (B, V) of the tokens (B, N) as often as each is there.

    Source: OpenAI, API guide, "Frequency and presence penalties".
    """
    if penalty == 0:
        return logits
    return logits.scatter_add(1, tokens, logits.new_full(tokens.shape, -penalty))


def _kept(logits: Tensor, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Apply top-k, top-p and min-p to logits (B, V).

    Each keeps the first of the tokens in the order of their probability, so none beyond the first
    that was left out needs to be ordered; to order a large vocabulary takes milliseconds.

    Returns: logits, most probable first, -inf for what is left out, and their ids, each (B, K).
    """
    n_vocab = logits.shape[1]
    # Only on a CPU can it be asked for nothing whether these were enough.
    n_first = max(_FIRST_CANDIDATES, 2 * config.top_k) if logits.device.type == "cpu" else n_vocab
    total = logits.logsumexp(dim=-1, keepdim=True) if config.top_p < 1 else None
    for n in (n_first, 16 * n_first):
        if 4 * n < n_vocab:
            best, ids = logits.topk(n)
            kept = _first_of(best, total, config)
            if bool((kept[:, -1] == -torch.inf).all()):
                return kept, ids
    best, ids = logits.sort(dim=-1, descending=True, stable=True)
    return _first_of(best, total, config), ids


def _first_of(best: Tensor, total: Tensor | None, config: SamplingConfig) -> Tensor:
    """Replace by -inf what top-k, top-p and min-p leave out.

    Args: best, the highest logits (B, K) in falling order; total (B, 1), ln of the sum of exp of
        all logits, if there is a top_p.
    Sources: top-p, Holtzman et al. 2020, arXiv:1904.09751, section 3.1; min-p, Nguyen et al. 2024,
        arXiv:2407.01082.
    """
    if 0 < config.top_k < best.shape[1]:
        # Tokens as probable as the last stay with it.
        best = best.masked_fill(best < best[:, config.top_k - 1, None], -torch.inf)
        total = best.logsumexp(dim=-1, keepdim=True)
    if config.top_p < 1:
        assert total is not None
        probability = (best - total).exp()
        # A token is left out when those before it already reach p; the first never is.
        is_left_out = probability.cumsum(dim=-1) - probability >= config.top_p
        is_left_out[:, 0] = False
        best = best.masked_fill(is_left_out, -torch.inf)
    if config.min_p:
        best = best.masked_fill(best < best[:, :1] + math.log(config.min_p), -torch.inf)
    return best


class _Uniforms:
    """Numbers in [0, 1), a stream of its own for each row.

    They are drawn on the host and copied many at a time: one number a token is all that a draw
    needs, and a device would take as long for it as for a whole step of a small model.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._device = device
        self._block = torch.empty(0)
        self._n_used = 0

    def next(self) -> Tensor:
        """Return a number for each row, (B, 1), float64."""
        if self._n_used == len(self._block):
            drawn = [
                torch.rand(_UNIFORMS_AT_ONCE, 1, dtype=torch.float64, generator=generator)
                for generator in self._generators
            ]
            self._block = torch.stack(drawn, dim=1).to(self._device)
            self._n_used = 0
        self._n_used += 1
        return self._block[self._n_used - 1]

    def keep(self, rows: Sequence[int]) -> None:
        self._generators = [self._generators[row] for row in rows]
        if len(self._block):
            self._block = self._block[:, torch.tensor(rows, device=self._device)]
