"""Prefill and decode: a prompt's token ids in, one Step per generated token out."""

import math
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import CheckpointError, DataError
from minigpt.generation.forward import make_forward
from minigpt.generation.sampling import Sampler
from minigpt.generation.window import Window
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.cost import cache_bytes_per_token
from minigpt.model.language_model import LanguageModel

FinishReason = Literal["length", "stop", "end_of_text", "context"]
"""max_new_tokens reached, stop string found, end-of-text token sampled, or context window full."""

_MAX_CACHE_BYTES = 2**30
_MAX_ROWS = 256


@dataclass(frozen=True)
class Step:
    """One generated token."""

    index: int
    """0 for the first generated token."""
    position: int
    """Index in prompt and output, counted from 0, with the tokens that left the window."""
    token: int
    log_probability: float
    """Natural log of the model's probability, before any sampling option."""
    finish: FinishReason | None
    """Reason to stop after this token; None if generation continues."""
    best: tuple[tuple[int, float], ...] = ()
    """Most probable tokens with their log-probabilities, as many as ``logprobs``."""
    n_slides: int = 0
    """Number of times that the window has slid."""
    n_forgotten: int = 0
    """Number of tokens that have left the window."""


def fresh_seed() -> int:
    """Return a random seed that is short enough to type."""
    return secrets.randbelow(2**32)


def check_prompt(prompt: Sequence[int], context_length: int) -> None:
    """Raise DataError if a prompt is empty or longer than the context."""
    if not prompt:
        raise DataError("the prompt is empty. Give at least one character of text.")
    if len(prompt) > context_length:
        raise DataError(
            f"the prompt has {len(prompt)} tokens, the model sees {context_length}. "
            "Shorten the prompt, or train with a larger --context-length."
        )


def max_rows_together(config: ModelConfig, n_rows: int, n_positions: int) -> int:
    """Return how many of n rows to decode together: at least 1, and at most a GiB of cache."""
    row_bytes = min(n_positions, config.context_length) * cache_bytes_per_token(config)
    return max(1, min(n_rows, _MAX_ROWS, _MAX_CACHE_BYTES // row_bytes))


class Decoder:
    """A model and its cache, which continue a prompt.

    The constructor fills the cache with the prompt; ``generate`` and ``batch`` may be called any
    number of times, each time from the end of the prompt. ``extend`` makes the prompt longer.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        recorder: Recorder | None = None,
        *,
        max_new_tokens: int | None = None,
        n_rows: int = 1,
        compiles: bool = False,
    ) -> None:
        """Prefill.

        Args: max_new_tokens, the most that ``generate`` will be asked for, so that the cache is no
            larger than that; None for all that the context has room for. n_rows, the most rows
            that ``batch`` will be asked for. compiles, through torch.compile: slow to begin.
        Raises: DataError if the prompt is empty or longer than the context.
        """
        self.context_length = model.config.context_length
        check_prompt(prompt, self.context_length)
        self.model = model
        self.recorder = recorder
        self.n_rows = n_rows
        wanted = self.context_length if max_new_tokens is None else len(prompt) + max_new_tokens
        self.forward = make_forward(
            model,
            capacity=min(self.context_length, wanted),
            n_rows=n_rows,
            recorder=recorder,
            compiles=compiles,
        )
        self._n_live = 1
        self._start = self._window = Window([prompt])
        self._prefill()

    @property
    def cache(self) -> KVCache:
        """The keys and values of every position so far."""
        return self.forward.cache

    @property
    def prompt(self) -> list[int]:
        """The tokens in view that ``generate`` continues."""
        return self._start.rows[0]

    @property
    def is_full(self) -> bool:
        """Whether the window has no room for another token."""
        return len(self._window) > self.context_length

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens and return the logits (V,), float32, of the one after them."""
        return self.forward.feed(torch.tensor([tokens], device=self.forward.device))[0]

    def generate(
        self, config: SamplingConfig, *, seed: int, end_of_text: Collection[int] = ()
    ) -> Iterator[Step]:
        """Yield tokens after the prompt until one is the last.

        When a Step is yielded, the recorder has last seen the forward pass whose final query
        produced its token.

        Args: end_of_text, the ids that end a text.
        Raises: CheckpointError for NaN or inf in the logits.
        """
        for _, step in self.batch(config, seeds=[seed], end_of_text=end_of_text):
            yield step

    def batch(
        self, config: SamplingConfig, *, seeds: Sequence[int], end_of_text: Collection[int] = ()
    ) -> "Continuations":
        """Return several continuations of the prompt, one for each seed, decoded together."""
        return Continuations(self, config, seeds, end_of_text)

    def extend(self, tokens: Sequence[int], *, overflow: str = "stop") -> None:
        """Append to the prompt what was generated last, and then these tokens.

        An end-of-text token is left out. Only tokens that the cache lacks are fed.

        Args: overflow, as in SamplingConfig.
        Raises: DataError if they do not fit, and the window may not slide.
        """
        window = Window(self._window.rows[:1], self._window.n_slides, self._window.n_forgotten)
        window.rows[0] += tokens
        n_held = min(self.cache.length, len(window) - 1)
        if len(window) > self.context_length:
            if overflow == "stop":
                raise DataError(
                    f"the context window is full: {len(window)} tokens were said, the model sees "
                    f"{self.context_length}. Begin again, or let it --overflow slide."
                )
            window.slide(self.context_length)
            n_held = 0
        if self._n_live > 1:
            self._keep([0])
        self._start = self._window = window
        self._prefill(n_held)

    def _prefill(self, n_held: int = 0) -> None:
        """Feed the prompt, except for the first tokens that the cache holds."""
        self.forward.truncate(n_held)
        # The next call may overwrite them.
        self.prompt_logits = self.logits(self.prompt[n_held:]).clone()

    def _keep(self, rows: Sequence[int]) -> None:
        self.forward.keep(rows)
        self._n_live = len(rows)

    def _begin(self, n_rows: int) -> tuple[Window, Tensor]:
        """Return to the end of the prompt, with n rows; return its window and logits (B, V)."""
        assert self.recorder is None or n_rows == 1, "a recorder sees one row"
        if self._n_live > 1:
            self._keep([0])
        has_slid = self._window.n_slides > self._start.n_slides
        if has_slid or (self.recorder is not None and self.cache.length > len(self.prompt)):
            # The cache begins with other tokens; or the recorder has seen later passes since, and
            # the first token's is the prompt's.
            self._prefill()
        self.forward.truncate(len(self.prompt))
        if n_rows > 1:
            self.forward.repeat(n_rows)
            self._n_live = n_rows
        self._window = self._start.copies(n_rows)
        return self._window, self.prompt_logits.expand(n_rows, -1)

    def _feed(self, window: Window, tokens: Tensor) -> Tensor:
        """Feed each row's newest token (B,), already in its window; return logits (B, V)."""
        if len(window) <= self.context_length:
            return self.forward.feed(tokens[:, None])
        window.slide(self.context_length)
        self.forward.truncate(0)
        return self.forward.feed(torch.tensor(window.rows, device=self.forward.device))


class Continuations:
    """Continuations of one prompt, decoded together: iterate over it for (row, Step).

    Each row samples from its own generator, so it equals what it would be alone, up to the rounding
    of products of another shape. Rows that have ended are removed.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: SamplingConfig,
        seeds: Sequence[int],
        end_of_text: Collection[int],
    ) -> None:
        wanted = min(decoder.context_length, len(decoder.prompt) + config.max_new_tokens)
        assert wanted <= decoder.cache.capacity, "the decoder was made for less max_new_tokens"
        self._decoder, self._config = decoder, config
        self._seeds, self._end_of_text = seeds, end_of_text
        self._ended: set[int] = set()

    def drop(self, row: int) -> None:
        """Stop a row whose stop string was found."""
        self._ended.add(row)

    def __iter__(self) -> Iterator[tuple[int, Step]]:
        """Decode from the end of the prompt, a token of every row in turn.

        Raises: CheckpointError for NaN or inf in the logits.
        """
        decoder, config = self._decoder, self._config
        rows = list(range(len(self._seeds)))
        window, logits = decoder._begin(len(rows))
        sampler = Sampler(
            config,
            seeds=self._seeds,
            device=logits.device,
            prompt=decoder.prompt,
            end_of_text=[token for token in self._end_of_text if token < logits.shape[1]],
        )
        for index in range(config.max_new_tokens):
            tokens = sampler.draw(logits)
            facts = _facts(logits, tokens, config.logprobs)
            n_seen = len(window)
            for place, row in enumerate(rows):
                step = self._step(index, facts[place], n_seen, window)
                if step.finish != "end_of_text":
                    window.rows[place].append(step.token)
                if step.finish:
                    self._ended.add(row)
                yield row, step
            places = [place for place, row in enumerate(rows) if row not in self._ended]
            if not places:
                return
            if len(places) < len(rows):
                rows = [rows[place] for place in places]
                window.rows = [window.rows[place] for place in places]
                tokens = tokens[torch.tensor(places, device=tokens.device)]
                sampler.keep(places)
                decoder._keep(places)
            logits = decoder._feed(window, tokens)

    def _step(self, index: int, facts: Sequence[float], n_seen: int, window: Window) -> Step:
        position = window.n_forgotten + n_seen
        token, log_probability, *best = facts
        # One logit that is nan or inf makes every log-probability nan, so this looks at them all.
        if not math.isfinite(log_probability):
            raise CheckpointError(
                f"the model's logits are NaN or inf at position {position}, so its "
                "weights are damaged. Use another checkpoint, or download it again."
            )
        finish: FinishReason | None = None
        if token in self._end_of_text:
            finish = "end_of_text"
        elif index + 1 == self._config.max_new_tokens:
            finish = "length"
        elif self._config.overflow == "stop" and n_seen == self._decoder.context_length:
            finish = "context"
        k = len(best) // 2
        pairs = tuple(zip(map(int, best[:k]), best[k:], strict=True))
        return Step(
            index,
            position,
            int(token),
            log_probability,
            finish,
            pairs,
            window.n_slides,
            window.n_forgotten,
        )


@torch.inference_mode()
def _facts(logits: Tensor, tokens: Tensor, n_best: int) -> list[list[float]]:
    """Return for each row its token, log-probability, the best ids, and their log-probabilities."""
    log_probability = logits.log_softmax(dim=-1)
    facts = [tokens[:, None], log_probability.gather(1, tokens[:, None])]
    if n_best:
        best = log_probability.topk(min(n_best, logits.shape[1]))
        facts += [best.indices, best.values]
    if logits.device.type == "cpu":  # nothing to wait for
        columns = [fact.tolist() for fact in facts]
        return [[*chain.from_iterable(row)] for row in zip(*columns, strict=True)]
    # One copy, and so one synchronisation, a token: float64 holds any id exactly.
    return torch.cat([fact.double() for fact in facts], dim=1).tolist()
