"""Tracing: generation that yields, with each token, the earlier tokens it attended to."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder, FinishReason
from minigpt.generation.stream import TextStep, stream_text
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.config import DEFAULTS, N_SOURCES, TraceConfig
from minigpt.tracing.events import (
    Candidate,
    Row,
    Token,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.rows import RowReader, reduce_rows

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig


def trace(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: TraceConfig = DEFAULTS,
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

    With ``config.prompt_rows``, or if no token is to be generated, the steps of the prompt's own
    tokens come first, from the second one on.

    The tokens are the same as without a trace. A KeyboardInterrupt after the header, here or thrown
    into this generator, ends the trace with a footer.

    Args: forced, the token ids of ``sampling.force``; intervention, that of ``model``, for the
        header; special, whether special tokens in ``config.against`` are parsed; dense, called with
        the weights of all heads (L, H, S) at each step.
    Raises: DataError if the prompt is empty or longer than the context; ConfigError for heads that
        the model does not have, overflow slide, a sink outside the prompt, a rollout over too many
        positions, or roles of a model that is too small to have any; CheckpointError if the logits
        are NaN or inf.
    """
    if sampling.overflow != "stop":
        raise ConfigError(
            "overflow slide would recompute rows that were already traced. Trace at most one "
            "context window, or generate without a trace."
        )
    sampling = replace(sampling, logprobs=max(sampling.logprobs, config.candidates))
    has_prompt_rows = config.prompt_rows or sampling.max_new_tokens == 0
    prompt_rows = ring("tracing.analysis.prompt_rows") if has_prompt_rows else None
    if prompt_rows:
        prompt_rows.require_rows(prompt)
    if config.is_plain:
        observer = AttentionObserver(model, config, len(prompt))
    else:
        observer = ring("tracing.analysis.observer").AnalysisObserver(
            model,
            config,
            len(prompt),
            tokenizer=tokenizer,
            max_new_tokens=sampling.max_new_tokens,
            special=special,
        )
    tokens = [Token(i, token, tokenizer.token_bytes(token)) for i, token in enumerate(prompt)]
    started = time.perf_counter()
    decoder = Decoder(
        model,
        prompt,
        observer.recorder,
        max_new_tokens=sampling.max_new_tokens,
        compiles=compiles,
    )
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
    items: Iterator[TextStep] = stream_text(steps, tokenizer, sampling.stop)
    if prompt_rows:
        items = chain(prompt_rows.prompt_steps(decoder, sampling.logprobs), items)

    def traced() -> Iterator[TraceStep]:
        for index, item in enumerate(items):
            step = item.step
            observed = observer.observe(tokens[: step.position], step.token)
            if dense is not None:
                dense(observer.recorder.weights_LHS)
            token = Token(step.position, step.token, tokenizer.token_bytes(step.token))
            if step.position == len(tokens):
                tokens.append(token)
            yield TraceStep(
                index=index,
                token=token,
                log_probability=step.log_probability,
                text=item.text,
                finish=step.finish,
                candidates=tuple(
                    Candidate(id_, tokenizer.token_bytes(id_), value) for id_, value in step.best
                ),
                is_given=step.is_forced,
                **observed,
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
    yield TraceFooter(n_generated, finish, seconds, **observer.results(tokens))


def _kernel(model: LanguageModel, *, is_compiled: bool) -> str:
    if is_compiled:
        return "compiled graph"
    is_dot_product = model.attentions[0].score.is_dot_product
    return "scaled_dot_product_attention" if is_dot_product else "tanh score, in chunks"


class AttentionObserver:
    """Turns the attention of each forward pass into a row of a trace, and checks it."""

    def __init__(self, model: LanguageModel, config: TraceConfig, n_prompt: int) -> None:
        """Prepare to observe passes of a model; ``recorder`` must be given to all of them.

        Raises: ConfigError if the model cannot be traced with this config.
        """
        self.recorder = RowRecorder(model)
        if isinstance(config.sink, int) and config.sink >= max(n_prompt, 1):
            raise ConfigError(
                f"the sink must be a position of the prompt: it is {config.sink}, and the prompt "
                f"has {n_prompt} tokens."
            )
        self.model, self.config, self.n_prompt = model, config, n_prompt
        self.selection: Any = None
        find = find_ring if config.layers is None and config.heads is None else ring
        if lists := find("tracing.head_lists"):
            self.selection = lists.select_heads(
                model.config.n_attention_layer,
                model.config.n_head,
                layers=config.layers,
                heads=config.heads,
            )
        self.reader: RowReader
        self._sum_error: float | None = None
        self._product_error: Tensor | None = None

    def header(self, **facts: Any) -> TraceHeader:
        """Return the header; call it after the prefill.

        Args: facts, the fields of the header that do not follow from model and config.
        """
        config, shape = self.config, self.model.config
        sink, rule = self.sink()
        n_sources = N_SOURCES if config.n_sources is None else config.n_sources
        self.reader = RowReader(sink=sink, n_prompt=self.n_prompt, n_sources=n_sources)
        return TraceHeader(
            n_layer=shape.n_attention_layer,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            d_model=shape.d_model,
            d_head=shape.d_head,
            dtype=str(self.model.dtype).removeprefix("torch."),
            score=self.model.attentions[0].score.name,
            selection=self.selection,
            measures=config.measures,
            reduce=config.reduce,
            sink=sink,
            sink_rule=rule,
            **facts,
        )

    def sink(self) -> tuple[int, str]:
        """Return the position of the sink, and how it was chosen."""
        return self.config.sink, "given" if self.config.sink else "first"

    @torch.inference_mode()
    def observe(self, tokens: Sequence[Token], target: int) -> dict[str, Any]:
        """Return the rows of the last pass, as fields of a step.

        Args: tokens, those in view; target, the id of the token that was drawn.
        """
        weights_LHS = self.recorder.weights_LHS
        reduced_S = reduce_rows(weights_LHS, self.selection, is_max=self.config.reduce == "max")
        rows_RS = self.with_heads(reduced_S, weights_LHS)
        row = self.reader.row(rows_RS, tokens, self.model.config.n_attention_layer)
        self.check(row)
        return {"rows": (row,)}

    def with_heads(self, reduced_S: Tensor, rows_LHS: Tensor) -> Tensor:
        """Return a row and, if they are to be kept, those of all heads: (R, S)."""
        rows_RS = reduced_S[None]
        return torch.cat((rows_RS, rows_LHS.flatten(0, 1))) if self.config.has_heads else rows_RS

    def check(self, row: Row) -> None:
        """Take the errors of the last pass into account. Args: row, by the first measure."""
        if self.config.reduce != "max" and row.measure == "weight":
            self._sum_error = max(self._sum_error or 0.0, abs(row.total - 1))
        error, so_far = self.recorder.product_error, self._product_error
        if error is not None:
            self._product_error = error if so_far is None else torch.maximum(so_far, error)

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
