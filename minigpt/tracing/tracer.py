"""Tracing: generation that yields, with each token, the earlier tokens it attended to."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor

from minigpt.config import InterventionConfig, SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder, FinishReason
from minigpt.generation.stream import TextStep, stream_text
from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.config import DEFAULTS, N_SOURCES, Measure, TraceConfig, facts_of
from minigpt.tracing.events import (
    Alternative,
    Candidate,
    HeadWorking,
    Lens,
    Row,
    Token,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.recorder import RowRecorder, require_attention, require_measures
from minigpt.tracing.rows import RowReader, reduce_rows
from minigpt.tracing.selection import HeadSelection, select_heads


def trace(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    config: TraceConfig = DEFAULTS,
    *,
    seed: int,
    model_name: str = "",
    model_sha256: str | None = None,
    stop_at_end_of_text: bool = True,
    compiles: bool | None = False,
    forced: Sequence[int] = (),
    intervention: InterventionConfig | None = None,
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
    if intervention is not None and "logit" in config.measures:
        raise ConfigError(
            "--measure logit explains the logit by the outputs of all heads, which an intervention "
            "replaces. Use --measure gradient, which goes through the changed model."
        )
    sampling = replace(sampling, logprobs=max(sampling.logprobs, config.candidates))
    has_prompt_rows = config.prompt_rows or sampling.max_new_tokens == 0
    if has_prompt_rows and len(prompt) == 1:
        raise ConfigError(
            "the prompt has one token, and rows are those of the tokens after it. Give a longer "
            "prompt, or generate tokens without --prompt-rows."
        )
    against = None
    if config.against is not None:
        against = _alternative(tokenizer, config.against, special=special)
    observer = AttentionObserver(model, config, len(prompt), sampling, against)
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
        model_sha256=model_sha256,
        kernel=_kernel(model, is_compiled=decoder.forward.is_compiled),
        seed=seed,
        sampling=sampling,
        prompt=tuple(tokens),
        intervention=intervention,
    )
    end_of_text = tokenizer.end_of_text_ids if stop_at_end_of_text else ()
    steps = decoder.generate(sampling, seed=seed, end_of_text=end_of_text, forced=forced)
    items: Iterator[TextStep] = stream_text(steps, tokenizer, sampling.stop)
    if has_prompt_rows:
        items = chain(map(TextStep, decoder.prompt_steps(sampling.logprobs), repeat("")), items)

    def traced() -> Iterator[TraceStep]:
        for index, item in enumerate(items):
            step = item.step
            rows = observer.rows(tokens[: step.position], step.token)
            if dense is not None:
                dense(observer.recorder.weights_LHS)
            token = Token(step.position, step.token, tokenizer.token_bytes(step.token))
            if step.position == len(tokens):
                tokens.append(token)
            yield TraceStep(
                index,
                token,
                step.log_probability,
                rows,
                item.text,
                step.finish,
                candidates=tuple(
                    Candidate(id_, tokenizer.token_bytes(id_), value) for id_, value in step.best
                ),
                lens=observer.lens(step.token, tokenizer),
                is_given=step.is_forced,
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
    workings = observer.workings([token.id for token in tokens])
    yield TraceFooter(n_generated, finish, seconds, workings=workings, **observer.checks())


def _alternative(tokenizer: Tokenizer, text: str, *, special: bool) -> Alternative:
    """Return the first token of an alternative text, which continues a text.

    Raises: ConfigError for an empty text.
    """
    ids = tokenizer.encode(text, is_start=False, special=special)
    if not ids:
        raise ConfigError(
            "--against needs a token: the text is empty. Give at least one character."
        )
    return Alternative(text, ids[0], tokenizer.token_bytes(ids[0]), len(ids))


def _kernel(model: LanguageModel, *, is_compiled: bool) -> str:
    if is_compiled:
        return "compiled graph"
    is_dot_product = model.attentions[0].score.is_dot_product
    return "scaled_dot_product_attention" if is_dot_product else "tanh score, in chunks"


class AttentionObserver:
    """Turns the attention of each forward pass into a trace's rows, effects and checks."""

    def __init__(
        self,
        model: LanguageModel,
        config: TraceConfig,
        n_prompt: int,
        sampling: SamplingConfig,
        against: Alternative | None = None,
    ) -> None:
        """Prepare to observe passes of a model; ``recorder`` must be given to all of them.

        Args: against, what the token is compared with, if anything.
        Raises: ConfigError if the model cannot be traced with this config.
        """
        require_attention(model)
        require_measures(config)
        self._verifier = None
        if config.n_verified:
            self._verifier = ring("tracing.analysis.knockout").Verifier(model, config)
        if config.sink != "auto" and config.sink >= max(n_prompt, 1):
            raise ConfigError(
                f"the sink must be a position of the prompt: it is {config.sink}, and the prompt "
                f"has {n_prompt} tokens."
            )
        self._model, self._config, self._n_prompt = model, config, n_prompt
        self._against = against
        shape = model.config
        self._selection = select_heads(
            shape.n_attention_layer, shape.n_head, layers=config.layers, heads=config.heads
        )
        self._rollout = self._sink_finder = None
        if config.reduce == "rollout":
            n_positions = min(shape.context_length, n_prompt + sampling.max_new_tokens)
            self._rollout = ring("tracing.analysis.rollout").Rollout(self._selection, n_positions)
        if config.sink == "auto":
            self._sink_finder = ring("tracing.analysis.sink").SinkFinder(n_prompt)
        watchers = [one for one in (self._rollout, self._sink_finder) if one is not None]
        self.recorder = RowRecorder(
            model,
            measures=config.measures,
            watchers=watchers,
            config=config,
            needs_residual=config.lens,
        )
        self._explained: HeadSelection | None = None
        if config.explain is not None:
            workings = ring("tracing.analysis.workings")
            self._explained = workings.explained_heads(model, config.explain)
        self._reader: RowReader
        self._sum_error: float | None = None
        self._product_error: Tensor | None = None

    def header(self, **facts: Any) -> TraceHeader:
        """Return the header; call it after the prefill.

        Args: facts, the fields of the header that do not follow from model and config.
        """
        config, shape = self._config, self._model.config
        if self._sink_finder is not None:
            sink, rule = self._sink_finder.sink(), "detected"
        else:
            sink, rule = config.sink, "given" if config.sink else "first"
        n_sources = N_SOURCES if config.n_sources is None else config.n_sources
        self._reader = RowReader(sink=sink, n_prompt=self._n_prompt, n_sources=n_sources)
        return TraceHeader(
            n_layer=shape.n_attention_layer,
            n_head=shape.n_head,
            n_kv_head=shape.n_kv_head,
            d_model=shape.d_model,
            d_head=shape.d_head,
            dtype=str(self._model.dtype).removeprefix("torch."),
            score=self._model.attentions[0].score.name,
            selection=self._selection,
            measures=config.measures,
            reduce=config.reduce,
            sink=sink,
            sink_rule=rule,
            n_verified=config.n_verified,
            knockout=config.knockout,
            against=self._against,
            verified_heads=self._verifier and self._verifier.selection,
            roles=ring("tracing.analysis.roles").head_roles(self._model) if config.roles else None,
            **facts,
        )

    @torch.inference_mode()
    def rows(self, tokens: Sequence[Token], target: int) -> tuple[Row, ...]:
        """Return the last pass's row by each measure.

        Args: tokens, those in view; target, the token that was drawn.
        """
        config, recorder = self._config, self.recorder
        rows = tuple(self._row(measure, tokens, target) for measure in config.measures)
        if config.reduce != "max" and config.measures[0] == "weight":
            self._sum_error = max(self._sum_error or 0.0, abs(rows[0].total - 1))
        if recorder.product_error is not None:
            so_far = self._product_error
            error = recorder.product_error
            self._product_error = error if so_far is None else torch.maximum(so_far, error)
        return rows

    def _row(self, measure: Measure, tokens: Sequence[Token], target: int) -> Row:
        config, selection, facts = self._config, self._selection, facts_of(measure)
        against = None if self._against is None else self._against.id
        ids = [token.id for token in tokens]
        measured = self.recorder.measured(measure, ids, target, against)
        rows, parts = measured.rows, dict(measured.parts)
        if not facts.has_heads:
            reduced_S = rows
        elif self._rollout is not None:
            reduced_S = self._rollout.row()
        else:
            reduced_S = reduce_rows(rows, selection, is_max=config.reduce == "max")
            if facts.is_signed:
                reduced_S = reduced_S * selection.n_chosen  # summed
                if not selection.is_all and parts:
                    parts["other_heads"] = rows.sum() - reduced_S.sum()
        rows_RS = reduced_S[None]
        if config.has_heads and facts.has_heads:
            rows_RS = torch.cat((rows_RS, rows.flatten(0, 1)))
        if measure != "weight" and facts.unit == "share":  # these need not sum to 1: normalize
            rows_RS = rows_RS / rows_RS.sum(dim=1, keepdim=True).clamp(min=1e-30)
        row = self._reader.row(measure, rows_RS, tokens, selection.n_layer)
        if measured.whole is None:
            return row
        whole, *values = torch.stack([measured.whole, *parts.values()]).tolist()
        return replace(row, whole=whole, parts=dict(zip(parts, values, strict=True)))

    def lens(self, target: int, tokenizer: Tokenizer) -> Lens | None:
        """Return the logit lens of the last pass, which predicted ``target``, if requested."""
        if not self._config.lens:
            return None
        residual_NC = self.recorder.residual_NC
        lens: Lens = ring("tracing.analysis.lens").read_lens(
            self._model, residual_NC, target, tokenizer
        )
        return lens

    def verified(
        self, steps: Iterator[TraceStep], tokens: Sequence[Token], cache: KVCache
    ) -> Iterator[TraceStep]:
        """Yield steps with the effects of knockouts, which may wait for later steps.

        Args: tokens, at least those in view of the newest step's query.
        """
        if self._verifier is None:
            return steps
        verified: Iterator[TraceStep] = self._verifier.verify(
            steps, tokens, cache, sink=self._reader.sink
        )
        return verified

    def workings(self, tokens: Sequence[int]) -> tuple[HeadWorking, ...]:
        """Return the queries, keys and values of the heads to explain, over a whole text."""
        if self._explained is None:
            return ()
        workings: tuple[HeadWorking, ...] = ring("tracing.analysis.workings").head_workings(
            self._model, tokens, self._explained
        )
        return workings

    def checks(self) -> dict[str, Any]:
        """Return the fields of the footer that hold the results of checks."""
        error = self._product_error
        return {
            "worst_row_sum_error": self._sum_error,
            "worst_product_error": None if error is None else error.item(),
            "cause": self._verifier and self._verifier.tally.check(),
        }
