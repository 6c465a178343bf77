"""Prefill and decode: a prompt's token ids in, one Step per generated token out."""

import math
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import CheckpointError, DataError
from minigpt.generation.forward import make_forward
from minigpt.generation.sampling import Sampler
from minigpt.model.attention import Recorder
from minigpt.model.cache import KVCache
from minigpt.model.device import widest_float
from minigpt.model.language_model import LanguageModel

FinishReason = Literal["length", "stop", "end_of_text", "context"]
"""max_new_tokens reached, stop string found, end-of-text token sampled, or context window full."""


@dataclass(frozen=True)
class Step:
    """One generated token."""

    index: int
    """0 for the first generated token."""
    position: int
    """Index in prompt and output, from 0, including tokens that have left the window."""
    token: int
    log_probability: float
    """Natural log of the model's probability, before any sampling option."""
    finish: FinishReason | None
    """Reason to stop after this token; None if generation continues."""
    best: tuple[tuple[int, float], ...] = ()
    """Most probable tokens with their log-probabilities, as many as ``logprobs``."""
    is_forced: bool = False
    """Whether the token was given, by ``forced`` or the prompt, instead of sampled."""
    n_slides: int = 0
    """Number of times that the window has slid."""
    n_forgotten: int = 0
    """Number of tokens that have left the window."""


def fresh_seed() -> int:
    """Return a random seed that is short enough to type."""
    return secrets.randbelow(2**32)


def check_prompt(prompt: Sequence[int], config: ModelConfig, overflow: str | None) -> None:
    """Check that a model can continue a prompt.

    Args: overflow, as in SamplingConfig; None if the caller cannot choose it.
    Raises: DataError if the prompt is empty, has unknown token ids, or is longer than the context
        and its window does not slide.
    """
    if not prompt:
        raise DataError("the prompt is empty. Give at least one character of text.")
    if len(prompt) > config.context_length and overflow != "slide":
        slide = "use --overflow slide, " if overflow else ""
        raise DataError(
            f"the prompt has {len(prompt)} tokens, but the model sees {config.context_length}. "
            f"Shorten the prompt, {slide}or train with a larger --context-length."
        )
    n_tokens = config.vocab_size
    if unknown := [token for token in prompt if not 0 <= token < n_tokens]:
        raise DataError(
            f"the prompt has the token id {unknown[0]}: the model's are 0 to {n_tokens - 1}. "
            "Encode the prompt with the model's own tokenizer."
        )


class Decoder:
    """A model and its cache, filled with a prompt that ``generate`` and ``batch`` continue."""

    def __init__(
        self,
        model: LanguageModel,
        prompt: Sequence[int],
        recorder: Recorder | None = None,
        *,
        max_new_tokens: int | None = None,
        n_rows: int = 1,
        compile: bool | None = False,
        overflow: str | None = None,
    ) -> None:
        """Prefill.

        Args: max_new_tokens, the maximum for ``generate``, None for the full context; n_rows, the
            maximum number of seeds for ``batch``; compile, as for ``fast.is_compiled``; overflow,
            as for ``check_prompt``.
        Raises: ConfigError if compiling is requested but not possible; DataError as
            ``check_prompt``.
        """
        self.context_length = model.config.context_length
        check_prompt(prompt, model.config, overflow)
        self.prompt = self._in_view(prompt)
        """Prompt tokens in the context window."""
        self.n_prompt = len(prompt)
        """Number of prompt tokens, including those that have left the window."""
        self.model = model
        self.recorder = recorder
        self.n_rows = n_rows
        wanted = self.context_length if max_new_tokens is None else len(prompt) + max_new_tokens
        self.forward = make_forward(
            model,
            capacity=min(self.context_length, wanted),
            n_rows=n_rows,
            recorder=recorder,
            compile=compile,
        )
        self.prefill()

    @property
    def cache(self) -> KVCache:
        """The keys and values of all positions that were fed."""
        return self.forward.cache

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Feed tokens and return the logits (V,), float32, of the next one."""
        return self.forward.feed(torch.tensor([tokens], device=self.forward.device))[0]

    def generate(
        self,
        config: SamplingConfig,
        *,
        seed: int,
        end_of_text: Collection[int] = (),
        forced: Sequence[int] = (),
    ) -> Iterator[Step]:
        """Yield the tokens of a continuation of the prompt.

        When a Step is yielded, the recorder's latest pass is the one that predicted its token.

        Args: end_of_text, token ids that end a text; forced, as for ``batch``.
        Raises: CheckpointError for NaN or inf in the logits.
        """
        for _, step in self.batch(config, seeds=[seed], end_of_text=end_of_text, forced=forced):
            yield step

    def batch(
        self,
        config: SamplingConfig,
        *,
        seeds: Sequence[int],
        end_of_text: Collection[int] = (),
        stopped: Collection[int] = (),
        forced: Sequence[int] = (),
    ) -> Iterator[tuple[int, Step]]:
        """Yield (row, Step) of one continuation per seed, decoded as a batch, rows in order.

        Each row samples from its own generator, so it equals the row decoded alone, up to
        rounding that depends on the batch size. Finished rows are removed.

        Args: stopped, a set to which the caller adds the rows whose stop string was found; forced,
            the first tokens of every row, used instead of sampled ones.
        Raises: CheckpointError for NaN or inf in the logits.
        """
        n_positions = min(self.context_length, len(self.prompt) + config.max_new_tokens)
        assert n_positions <= self.cache.capacity, "the decoder was made for fewer new tokens"
        rows = list(range(len(seeds)))
        logits = self._begin(len(rows))
        sampler = Sampler(
            config,
            seeds=seeds,
            device=logits.device,
            prompt=self.prompt,
            end_of_text=[token for token in end_of_text if token < logits.shape[1]],
        )
        finished: set[int] = set()
        for index in range(config.max_new_tokens):
            is_forced = index < len(forced)
            tokens = sampler.draw(logits, forced[index] if is_forced else None)
            position = self.n_prompt + index
            limit = self._limit(config, index)
            results = to_host(logits, tokens, config.logprobs)
            for row, result in zip(rows, results, strict=True):
                require_finite(result, position)
                token, log_probability, best = result
                finish = "end_of_text" if token in end_of_text else limit
                if finish:
                    finished.add(row)
                step = Step(index, position, token, log_probability, finish, best, is_forced)
                yield row, step
            places = [i for i, row in enumerate(rows) if row not in finished | set(stopped)]
            if not places:
                return
            if len(places) < len(rows):
                rows = [rows[place] for place in places]
                tokens = tokens[torch.tensor(places, device=tokens.device)]
                sampler.keep(places)
                self.forward.keep(places)
            logits = self._feed(rows, tokens)

    def _limit(self, config: SamplingConfig, index: int) -> FinishReason | None:
        """Return the limit that ends every row after token ``index``; None if there is none."""
        if index + 1 == config.max_new_tokens:
            return "length"
        is_full = self.cache.length == self.context_length
        return "context" if is_full and config.overflow == "stop" else None

    def prefill(self, n_cached: int = 0) -> None:
        """Feed the prompt, except for its first ``n_cached`` tokens, which are in the cache."""
        self.cache.truncate(n_cached)
        # A copy, because the next forward pass may overwrite its output.
        self.prompt_logits = self.logits(self.prompt[n_cached:]).clone()

    def _in_view(self, prompt: Sequence[int]) -> list[int]:
        """Return the prompt's tokens in the context window."""
        return list(prompt)

    def _begin(self, n_rows: int) -> Tensor:
        """Rewind to the end of the prompt with n rows; return its logits (B, V)."""
        assert self.recorder is None or n_rows == 1, "a recorder sees one row"
        if self.cache.n_rows > 1:
            self.forward.keep([0])
        if not self._holds_prompt:
            self.prefill()
        self.cache.truncate(len(self.prompt))
        if n_rows > 1:
            self.forward.keep([0] * n_rows)
        return self.prompt_logits.expand(n_rows, -1)

    @property
    def _holds_prompt(self) -> bool:
        """Whether the cache starts with the prompt, and the recorder's latest pass is for it."""
        return self.recorder is None or self.cache.length <= len(self.prompt)

    def _feed(self, rows: Sequence[int], tokens: Tensor) -> Tensor:
        """Feed the newest token of each row (B,), and return the logits (B, V)."""
        return self.forward.feed(tokens[:, None])


_Result = tuple[int, float, tuple[tuple[int, float], ...]]


def require_finite(result: _Result, position: int) -> None:
    """Raise CheckpointError for NaN or inf in the logits: it makes every log-probability NaN."""
    if not math.isfinite(result[1]):
        raise CheckpointError(
            f"the model's logits are NaN or inf at position {position}, so its weights are "
            "damaged. Use another checkpoint, or download it again."
        )


@torch.inference_mode()
def to_host(logits: Tensor, tokens: Tensor, n_best: int) -> list[_Result]:
    """Return each row's token and log-probability, and the most probable tokens with theirs."""
    log_probability = logits.log_softmax(dim=-1)
    ids = values = log_probability[:, :0]
    if n_best:
        values, ids = log_probability.topk(min(n_best, logits.shape[1]))
    columns = [tokens[:, None], log_probability.gather(1, tokens[:, None]), ids, values]
    if logits.device.type != "cpu":
        # One copy, and so one synchronization, per token. float64 represents any id exactly, and
        # float32 ids below 2**24, which is larger than any vocabulary.
        dtype = widest_float(logits.device)
        joined = torch.cat([column.to(dtype) for column in columns], dim=1).cpu()
        columns = list(joined.split([column.shape[1] for column in columns], dim=1))
    return [
        (int(token), value, tuple(zip(map(int, ids), values, strict=True)))
        for [token], [value], ids, values in zip(*(c.tolist() for c in columns), strict=True)
    ]
