"""A prompt in; out, each generated token with the earlier tokens that it attended to."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder, FinishReason
from minigpt.generation.stream import stream_text
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import Tokenizer
from minigpt.trace.analysis import summarize_row
from minigpt.trace.recorder import Reduce, RowRecorder
from minigpt.trace.selection import HeadSelection

CONVENTION = (
    "The attention of a generated token is the row of the query that produced it, at the position "
    "before it; so a token is not among its own sources."
)


@dataclass(frozen=True)
class Token:
    """A token in its place."""

    position: int
    """0 for the prompt's first token."""
    id: int
    data: bytes
    """The bytes that it stands for."""


@dataclass(frozen=True)
class Source:
    """An earlier token that was attended to."""

    token: Token
    weight: float
    """Share of the attention, 0 to 1."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace is of."""

    model: str
    n_layer: int
    n_head: int
    selection: HeadSelection
    reduce: Reduce
    seed: int
    sampling: SamplingConfig
    prompt: tuple[Token, ...]


@dataclass(frozen=True)
class TraceStep:
    """One generated token and what its query attended to."""

    index: int
    """0 for the first generated token."""
    token: Token
    log_probability: float
    """ln of the model's own probability of the token, before any sampling option."""
    sink: float
    """Weight on position 0, the sink."""
    sources: tuple[Source, ...]
    """The other positions with the most weight, most first."""
    rest: float | None
    """Weight on all others; None if the reduction does not sum to 1."""
    text: str
    """Text that became certain with this token."""
    finish: FinishReason | None

    @property
    def probability(self) -> float:
        """The model's own probability of the token."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class TraceFooter:
    """How a trace ended."""

    n_tokens: int
    finish: FinishReason | None
    """None if it was interrupted."""
    seconds: float
    """From the first forward pass to the last token."""
    worst_row_sum_error: float | None
    """Largest |sum of a row - 1|; None if the reduction does not sum to 1."""


TraceEvent = TraceHeader | TraceStep | TraceFooter


def trace(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    selection: HeadSelection,
    reduce: Reduce = "mean",
    n_sources: int = 8,
    seed: int,
    model_name: str = "",
    stop_at_end_of_text: bool = True,
    compiles: bool = False,
) -> Iterator[TraceEvent]:
    """Generate as ``Decoder`` does and yield a header, a step per token, and a footer.

    The tokens are those that generation without a trace gives.

    Raises: DataError if the prompt is empty or longer than the context; CheckpointError if the
        model's logits are no numbers.
    """
    tokens = [Token(i, token, tokenizer.token_bytes(token)) for i, token in enumerate(prompt)]
    started = time.perf_counter()
    recorder = RowRecorder(selection, reduce)
    decoder = Decoder(
        model, prompt, recorder, max_new_tokens=sampling.max_new_tokens, compiles=compiles
    )
    config = model.config
    yield TraceHeader(
        model=model_name,
        n_layer=config.n_layer,
        n_head=config.n_head,
        selection=selection,
        reduce=reduce,
        seed=seed,
        sampling=sampling,
        prompt=tuple(tokens),
    )
    sums_to_one = reduce == "mean"
    worst, finish, n_generated = 0.0, None, 0
    end_of_text = tokenizer.end_of_text_ids if stop_at_end_of_text else ()
    steps = decoder.generate(sampling, seed=seed, end_of_text=end_of_text)
    for item in stream_text(steps, tokenizer, sampling.stop):
        step = item.step
        summary = summarize_row(recorder.row(), n_sources)
        worst = max(worst, abs(summary.total - 1))
        tokens.append(Token(step.position, step.token, tokenizer.token_bytes(step.token)))
        finish, n_generated = step.finish, n_generated + 1
        yield TraceStep(
            index=step.index,
            token=tokens[-1],
            log_probability=step.log_probability,
            sink=summary.sink,
            sources=tuple(
                Source(tokens[position], weight)
                for position, weight in zip(summary.positions, summary.weights, strict=True)
            ),
            rest=summary.rest if sums_to_one else None,
            text=item.text,
            finish=finish,
        )
    yield TraceFooter(
        n_tokens=n_generated,
        finish=finish,
        seconds=time.perf_counter() - started,
        worst_row_sum_error=worst if sums_to_one else None,
    )
