"""Tracing: generation that yields, with each token, the earlier tokens it attended to."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder, FinishReason
from minigpt.generation.stream import TextStep, stream_text
from minigpt.model.attention import AttentionPass
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing import events
from minigpt.tracing.config import N_SOURCES, TraceConfig, config_class
from minigpt.tracing.events import Row, Token, TraceEvent, TraceHeader, TraceStep
from minigpt.tracing.recorder import PassQueue, RowRecorder
from minigpt.tracing.rows import RowReader

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig

Held = tuple[TextStep, Sequence[AttentionPass]]
"""A generated token, and the forward passes since the one before it."""
_BURST_S = 0.04
"""Time for which generated tokens are collected to be observed together; nobody notices it."""
RECORDS: Any = find_ring("tracing.findings") or events
"""Module of the records of a trace: those of the analysis, if it is there."""


def trace(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: TraceConfig | None = None,
    *,
    seed: int,
    model_name: str = "",
    compiles: bool | None = False,
    forced: Sequence[int] = (),
    intervention: "InterventionConfig | None" = None,
    special: bool = False,
    dense: Callable[[Tensor], None] | None = None,
) -> Iterator[TraceEvent]:
    """Generate as ``Decoder`` does, and yield a header, a step per token, and a footer.

    The tokens are the same as without a trace. If no token is to be generated, the steps are those
    of the prompt's own tokens. Those of a fast model come several at a time, but no later than
    ``_BURST_S`` or when decoding ends or fails. A KeyboardInterrupt after the header, here or
    thrown into this generator, ends the trace with a footer.

    Args: forced, the token ids of ``sampling.force``; intervention, that of ``model``, for the
        header; special, whether special tokens in ``config.against`` are parsed; dense, called with
        the weights of all heads (L, H, S) at each step.
    Raises: DataError if the prompt is empty or longer than the context; ConfigError for overflow
        slide, or if the model cannot be traced with this config; CheckpointError if the logits are
        NaN or inf.
    """
    config = config or config_class()()
    if sampling.overflow != "stop":
        raise ConfigError(
            "overflow slide would recompute rows that were already traced. Trace at most one "
            "context window, or generate without a trace."
        )
    if config.is_plain and sampling.max_new_tokens:
        observer = AttentionObserver(model, config, len(prompt), sampling)
    else:
        observer = ring("tracing.analysis.observer").AnalysisObserver(
            model, config, len(prompt), sampling, tokenizer=tokenizer, special=special
        )
    sampling = observer.sampling
    tokens = [Token(i, token, tokenizer.token_bytes(token)) for i, token in enumerate(prompt)]
    started = time.perf_counter()
    queue = PassQueue(observer.recorder)
    decoder = Decoder(
        model,
        prompt,
        queue,
        max_new_tokens=sampling.max_new_tokens,
        compiles=compiles,
    )
    for attention in queue.take():
        observer.recorder.record(attention)
    yield observer.header(
        model=model_name,
        kernel=_kernel(model, is_compiled=decoder.forward.is_compiled),
        seed=seed,
        sampling=sampling,
        prompt=tuple(tokens),
        intervention=intervention,
    )
    end_of_text = tokenizer.end_of_text_ids
    steps = decoder.generate(sampling, seed=seed, end_of_text=end_of_text, forced=forced)
    items = observer.items(decoder, stream_text(steps, tokenizer, sampling.stop))

    def observed() -> Iterator[tuple[Held, dict[str, Any]]]:
        burst: list[Held] = []
        due = 0.0  # the first token is shown at once
        while True:
            try:
                item = next(items, None)
            except BaseException:  # Ctrl-C, or NaN: what was decoded before is shown
                if burst:
                    yield from zip(burst, observer.observe(burst, tokens), strict=True)
                raise
            if item is None:
                return
            burst.append((item, queue.take()))
            step = item.step
            if step.position == len(tokens):
                tokens.append(Token(step.position, step.token, tokenizer.token_bytes(step.token)))
            is_new = step.position >= len(prompt)  # else the cache is about to be overwritten
            may_wait = decoder.forward.keeps_passes and is_new and not step.finish and not dense
            if not may_wait or time.perf_counter() > due:
                yield from zip(burst, observer.observe(burst, tokens), strict=True)
                burst, due = [], time.perf_counter() + _BURST_S

    def traced() -> Iterator[TraceStep]:
        for index, ((item, _), found) in enumerate(observed()):
            step = item.step
            if dense is not None:
                dense(observer.recorder.weights_LHS)
            yield RECORDS.TraceStep(
                index=index,
                token=tokens[step.position],
                log_probability=step.log_probability,
                text=item.text,
                finish=step.finish,
                is_given=step.is_forced,
                **found,
            )

    finish: FinishReason | None = None if sampling.max_new_tokens else "length"
    n_generated = 0
    try:
        for done in observer.verified(traced(), tokens, decoder.cache):
            if done.token.position >= len(prompt):
                finish, n_generated = done.finish, n_generated + 1
            yield done
    except KeyboardInterrupt:
        finish = None
    seconds = time.perf_counter() - started
    text = tokens[: len(prompt) + n_generated]
    yield RECORDS.TraceFooter(n_generated, finish, seconds, **observer.results(text))


def _kernel(model: LanguageModel, *, is_compiled: bool) -> str:
    if is_compiled:
        return "compiled graph"
    is_dot_product = model.attentions[0].score.is_dot_product
    return "scaled_dot_product_attention" if is_dot_product else "tanh score, in chunks"


class AttentionObserver:
    """Turns the attention of each forward pass into a row of a trace, and checks it."""

    sink = 0
    """Position of the sink, which sources do not include."""

    def __init__(
        self, model: LanguageModel, config: TraceConfig, n_prompt: int, sampling: SamplingConfig
    ) -> None:
        """Prepare to observe passes of a model; ``recorder`` must be given to all of them.

        Raises: ConfigError if the model cannot be traced with this config.
        """
        self.recorder = RowRecorder(model)
        self.model, self.config = model, config
        self.n_prompt, self.sampling = n_prompt, sampling
        self.reader: RowReader
        self._sum_error: float | None = None
        self._product_error: Tensor | None = None

    def header(self, **facts: Any) -> TraceHeader:
        """Return the header; call it after the prefill.

        Args: facts, the fields of the header that do not follow from the model.
        """
        shape, n_sources = self.model.config, self.config.n_sources
        n_sources = N_SOURCES if n_sources is None else n_sources
        self.reader = RowReader(sink=self.sink, n_prompt=self.n_prompt, n_sources=n_sources)
        header: TraceHeader = RECORDS.TraceHeader(
            n_layer=shape.n_attention_layer,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            d_model=shape.d_model,
            d_head=shape.d_head,
            dtype=str(self.model.dtype).removeprefix("torch."),
            score=self.model.attentions[0].score.name,
            **facts,
        )
        return header

    def items(self, decoder: Decoder, generated: Iterator[TextStep]) -> Iterator[TextStep]:
        """Return the steps to observe, given those that are generated."""
        return generated

    def record(self, passes: Sequence[AttentionPass]) -> None:
        """Hand passes to the recorder, and take the error of the last one into account."""
        for attention in passes:
            self.recorder.record(attention)
        error, so_far = self.recorder.product_error, self._product_error
        if error is not None:
            self._product_error = error if so_far is None else torch.maximum(so_far, error)

    @torch.inference_mode()
    def observe(self, burst: Sequence[Held], tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return the fields of each step that its attention gives.

        Args: tokens, at least those in view.

        Each kind of work is done for all steps before the next kind, because code that is not in
        the CPU's caches takes three times as long.
        """
        rows_N1S = []
        for _, passes in burst:
            self.record(passes)
            rows_N1S.append(self.recorder.weights_LHS.flatten(0, 1).mean(dim=0, keepdim=True))
        return [{"rows": (row,)} for row in self.checked(self.reader.rows(rows_N1S, tokens))]

    def checked(self, rows: list[Row]) -> list[Row]:
        """Take the error of the sums of rows, which should be 1, into account."""
        self._sum_error = max([self._sum_error or 0.0, *(abs(row.total - 1) for row in rows)])
        return rows

    def verified(
        self, steps: Iterator[TraceStep], tokens: Sequence[Token], cache: KVCache
    ) -> Iterator[TraceStep]:
        """Yield steps with the effects of knockouts, if there are any.

        Args: tokens, at least those in view of the newest step's query.
        """
        return steps

    def results(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the fields of the footer that hold results. Args: tokens, those of the text."""
        error = self._product_error
        return {
            "worst_row_sum_error": self._sum_error,
            "worst_product_error": None if error is None else error.item(),
        }
