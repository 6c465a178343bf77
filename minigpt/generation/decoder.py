"""Prefill and decode: a prompt's token ids in, one Step per generated token out."""

import math
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError, DataError
from minigpt.generation.forward import make_forward
from minigpt.generation.sampling import Sampler
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT

FinishReason = Literal["length", "stop", "end_of_text", "context"]
"""max_new_tokens reached, a stop text found, an end of text drawn, or the model's window full."""


@dataclass(frozen=True)
class Step:
    """One generated token."""

    index: int
    """0 for the first generated token."""
    position: int
    """Its place in the context, the prompt's first token being 0."""
    token: int
    log_probability: float
    """ln of the model's own probability of it, before any sampling option."""
    finish: FinishReason | None
    """Why it is the last one; None if it is not."""


def fresh_seed() -> int:
    """Return a seed from the system's randomness, short enough to type again."""
    return secrets.randbelow(2**32)


def check_prompt(prompt: Sequence[int], context_length: int) -> None:
    """Raise DataError if a prompt leaves the model nothing to look at, or does not fit."""
    if not prompt:
        raise DataError("the prompt is empty. Give at least one character of text.")
    if len(prompt) > context_length:
        raise DataError(
            f"the prompt has {len(prompt)} tokens, the model sees {context_length}. "
            "Shorten the prompt, or train with a larger --context-length."
        )


class Decoder:
    """A model and its cache, decoding one sequence; eager mode.

    ``prompt`` fills the cache once; ``generate`` may then be called any number of times, each
    time from the end of the prompt.
    """

    def __init__(
        self,
        model: GPT,
        prompt: Sequence[int],
        recorder: Recorder | None = None,
        *,
        max_new_tokens: int | None = None,
    ) -> None:
        """Prefill.

        Args: max_new_tokens, the most that ``generate`` will be asked for, so that the cache is no
            larger than that; None for all that the context has room for.
        Raises: DataError if the prompt is empty or longer than the context.
        """
        context_length = model.config.context_length
        check_prompt(prompt, context_length)
        self.model = model
        self.prompt = list(prompt)
        self.recorder = recorder
        wanted = context_length if max_new_tokens is None else len(prompt) + max_new_tokens
        self.forward = make_forward(model, capacity=min(context_length, wanted), recorder=recorder)
        self.prompt_logits = self.logits(self.prompt)

    @property
    def cache(self) -> KVCache:
        """The keys and values of every position so far."""
        return self.forward.cache

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens and return the logits (V,), float32, of the one after them."""
        return self.forward.feed(torch.tensor([tokens], device=self.forward.device))[0]

    def generate(
        self, config: SamplingConfig, *, seed: int, end_of_text: Collection[int] = ()
    ) -> Iterator[Step]:
        """Yield tokens after the prompt until one is the last.

        When a Step is yielded, the recorder has last seen the forward pass whose final query
        produced its token.

        Args: end_of_text, the ids of which any ends the text.
        Raises: CheckpointError if the model's logits are no numbers.
        """
        context_length = self.model.config.context_length
        wanted = min(context_length, len(self.prompt) + config.max_new_tokens)
        assert wanted <= self.cache.capacity, "the decoder was made for a smaller max_new_tokens"
        if self.recorder is not None and self.cache.length > len(self.prompt):
            # It has seen later passes since, and the first token's is the prompt's.
            self.forward.truncate(0)
            self.prompt_logits = self.logits(self.prompt)
        self.forward.truncate(len(self.prompt))
        sampler = Sampler(config, seed=seed, device=self.forward.device)
        context = list(self.prompt)
        logits = self.prompt_logits
        for index in range(config.max_new_tokens):
            token, log_probability = self._choose(sampler, logits, context)
            finish: FinishReason | None = None
            if token in end_of_text:
                finish = "end_of_text"
            elif index + 1 == config.max_new_tokens:
                finish = "length"
            elif len(context) == context_length:
                finish = "context"
            yield Step(index, len(context), token, log_probability, finish)
            if finish:
                return
            context.append(token)
            logits = self.logits([token])

    @torch.inference_mode()
    def _choose(self, sampler: Sampler, logits: Tensor, context: list[int]) -> tuple[int, float]:
        penalizes = sampler.config.repetition_penalty != 1
        seen = torch.tensor(
            context if penalizes else [], dtype=torch.int64, device=self.forward.device
        )
        token = sampler.draw(logits, seen)
        log_probability = logits.log_softmax(dim=0)[token]
        # One copy, and so one synchronisation, a token: float64 holds any id exactly.
        drawn, value = torch.stack((token.double(), log_probability.double())).tolist()
        # One logit that is nan or inf makes every log-probability nan, so this looks at them all.
        if not math.isfinite(value):
            raise CheckpointError(
                f"the model's logits are no finite numbers at position {len(context)}, so its "
                "weights are damaged. Use another checkpoint, or download it again."
            )
        return int(drawn), value
