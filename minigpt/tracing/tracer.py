"""A prompt in; out, each generated token with the earlier tokens that it attended to."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.language_model import LanguageModel
from minigpt.model.scores import Score
from minigpt.rings import ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.config import DEFAULTS, N_SOURCES, Measure, TraceConfig
from minigpt.tracing.events import (
    CauseCheck,
    Effect,
    HeadRows,
    Row,
    Source,
    Token,
    TraceEvent,
    TraceFooter,
    TraceHeader,
    TraceStep,
)
from minigpt.tracing.recorder import RowRecorder, require_attention
from minigpt.tracing.rows import RowFacts, RowReader, reduce_rows
from minigpt.tracing.selection import select_heads


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
    compiles: bool = False,
    dense: Callable[[Tensor], None] | None = None,
) -> Iterator[TraceEvent]:
    """Generate as ``Decoder`` does and yield a header, a step per token, and a footer.

    The tokens are those that generation without a trace gives.

    Args: dense, called with the rows of all heads (L, H, S) at each step.
    Raises: DataError if the prompt is empty or longer than the context; ConfigError for heads that
        the model lacks, overflow slide, a sink behind the prompt, a rollout that is too long, or
        roles of a model that is too small to have any; CheckpointError if the model's logits are no
        numbers.
    """
    if sampling.overflow != "stop":
        raise ConfigError(
            "overflow slide would encode again what was traced. Trace at most a context window, "
            "or generate without a trace."
        )
    watch = _Watch(model, config, len(prompt), sampling)
    tokens = [Token(i, token, tokenizer.token_bytes(token)) for i, token in enumerate(prompt)]
    started = time.perf_counter()
    decoder = Decoder(
        model,
        prompt,
        watch.recorder,
        max_new_tokens=sampling.max_new_tokens,
        compiles=compiles,
    )
    watch.find_sink()
    shape, score = model.config, model.attentions[0].score
    yield TraceHeader(
        model=model_name,
        model_sha256=model_sha256,
        n_layer=shape.n_attention_layer,
        n_head=shape.n_head,
        n_kv_head=shape.n_kv_head,
        d_model=shape.d_model,
        d_head=shape.d_head,
        dtype=str(model.dtype).removeprefix("torch."),
        kernel=_kernel(score, compiles=compiles),
        score=score.name,
        selection=watch.selection,
        measures=config.measures,
        reduce=config.reduce,
        sink=watch.sink,
        sink_rule=watch.sink_rule,
        seed=seed,
        sampling=sampling,
        prompt=tuple(tokens),
        n_verified=config.n_verified,
        knockout=config.knockout,
        roles=ring("tracing.analysis.roles").head_roles(model) if config.roles else None,
    )
    finish, n_generated = None, 0
    end_of_text = tokenizer.end_of_text_ids if stop_at_end_of_text else ()
    steps = decoder.generate(sampling, seed=seed, end_of_text=end_of_text)
    for item in stream_text(steps, tokenizer, sampling.stop):
        step = item.step
        rows = watch.rows(tokens)
        if dense is not None:
            dense(watch.recorder.weights_LHS)
        effects = watch.effects(decoder, tokens, rows[0], step.token)
        tokens.append(Token(step.position, step.token, tokenizer.token_bytes(step.token)))
        finish, n_generated = step.finish, n_generated + 1
        yield TraceStep(
            index=step.index,
            token=tokens[-1],
            log_probability=step.log_probability,
            rows=rows,
            text=item.text,
            finish=finish,
            effects=effects,
        )
    yield TraceFooter(
        n_tokens=n_generated,
        finish=finish,
        seconds=time.perf_counter() - started,
        worst_row_sum_error=watch.worst_sum_error,
        worst_product_error=watch.worst_product_error(),
        cause=watch.cause(),
    )


def _kernel(score: Score, *, compiles: bool) -> str:
    if compiles:
        return "compiled graph"
    return "scaled_dot_product_attention" if score.is_dot_product else "tanh score, in chunks"


class _Watch:
    """A recorder, and what a trace makes of what it keeps."""

    def __init__(
        self, model: LanguageModel, config: TraceConfig, n_prompt: int, sampling: SamplingConfig
    ) -> None:
        require_attention(model)
        self._knockout = ring("tracing.analysis.knockout") if config.n_verified else None
        if self._knockout is not None:
            self._knockout.require_knockout(model, config.knockout)
        shape = model.config
        self.config, self.n_prompt = config, n_prompt
        self.selection = select_heads(
            shape.n_attention_layer, shape.n_head, layers=config.layers, heads=config.heads
        )
        n_positions = min(shape.context_length, n_prompt + sampling.max_new_tokens)
        self._rollout = self._finder = None
        if config.reduce == "rollout":
            self._rollout = ring("tracing.analysis.rollout").Rollout(self.selection, n_positions)
        if config.sink == "auto":
            self._finder = ring("tracing.analysis.sink").SinkFinder(n_prompt)
        watchers = [one for one in (self._rollout, self._finder) if one is not None]
        self.recorder = RowRecorder(model, has_norms="norm" in config.measures, watchers=watchers)
        self.sink = 0 if config.sink == "auto" else config.sink
        self.sink_rule = "first" if config.sink == 0 else "given"
        if self.sink >= max(n_prompt, 1):
            raise ConfigError(
                f"the sink must be a position of the prompt: it is {self.sink}, and the prompt has "
                f"{n_prompt} tokens."
            )
        self._effects: list[Effect] = []
        """Of all steps so far."""
        self.worst_sum_error: float | None = None
        self._product_error: Tensor | None = None

    def find_sink(self) -> None:
        """Look at what the prompt's pass has shown."""
        if self._finder is not None:
            self.sink, self.sink_rule = self._finder.sink(), "detected"
        self._reader = RowReader(
            sink=self.sink,
            n_prompt=self.n_prompt,
            n_sources=N_SOURCES if self.config.n_sources is None else self.config.n_sources,
        )

    @torch.inference_mode()
    def rows(self, tokens: Sequence[Token]) -> tuple[Row, ...]:
        """Return the last pass's row by each measure; tokens are those in view."""
        rows = tuple(self._row(measure, tokens) for measure in self.config.measures)
        if self.config.reduce != "max" and self.config.measures[0] == "weight":
            error = abs(rows[0].total - 1)
            self.worst_sum_error = max(self.worst_sum_error or 0.0, error)
        error_now = self.recorder.product_error
        if error_now is not None:
            worst = self._product_error
            self._product_error = error_now if worst is None else torch.maximum(worst, error_now)
        return rows

    def effects(
        self, decoder: Decoder, tokens: Sequence[Token], row: Row, target: int
    ) -> tuple[Effect, ...]:
        """Knock out sources of the row of the token that was drawn last."""
        if self._knockout is None:
            return ()
        effects: tuple[Effect, ...] = self._knockout.source_effects(
            decoder.model,
            decoder.cache,
            tokens,
            row,
            target,
            sink=self.sink,
            n_sources=self.config.n_verified,
            knockout=self.config.knockout,
        )
        self._effects += effects
        return effects

    def cause(self) -> CauseCheck | None:
        """Return what the knockouts of all steps have shown; None without knockouts."""
        if self._knockout is None:
            return None
        check: CauseCheck | None = self._knockout.check_cause(self._effects)
        return check

    def worst_product_error(self) -> float | None:
        """Return the largest difference between a row times the values and a head's output."""
        return None if self._product_error is None else self._product_error.item()

    def _row(self, measure: Measure, tokens: Sequence[Token]) -> Row:
        config, recorder = self.config, self.recorder
        rows_LHS = recorder.weights_LHS if measure == "weight" else recorder.norms_LHS
        if self._rollout is not None:
            reduced_S = self._rollout.row()
        else:
            reduced_S = reduce_rows(rows_LHS, self.selection, is_max=config.reduce == "max")
        rows_RS = reduced_S[None]
        if config.has_heads:
            rows_RS = torch.cat((rows_RS, rows_LHS.flatten(0, 1)))
        if measure == "norm":  # lengths have no unit of their own: shares of the row have
            rows_RS = rows_RS / rows_RS.sum(dim=1, keepdim=True).clamp(min=1e-30)
        facts = self._reader.facts(rows_RS)
        total, prompt = float(facts.total_R[0]), float(facts.prompt_R[0])
        return Row(
            measure=measure,
            total=total,
            sink=float(facts.sink_R[0]),
            own=float(facts.own_R[0]),
            prompt=prompt,
            generated=max(0.0, total - prompt),
            entropy=float(facts.entropy_R[0]),
            distance=float(facts.distance_R[0]),
            sources=tuple(
                Source(tokens[position], weight)
                for position, weight in zip(
                    facts.positions_RK[0].tolist(), facts.weights_RK[0].tolist(), strict=True
                )
            ),
            weights_S=facts.first_S,
            heads=_head_rows(facts, rows_LHS.shape[0]) if config.has_heads else None,
        )


def _head_rows(facts: RowFacts, n_layer: int) -> HeadRows:
    """Return the facts about all rows but the first, by layer and head."""

    def by_head(array_RX: NDArray[Any]) -> NDArray[Any]:
        return array_RX[1:].reshape(n_layer, (len(array_RX) - 1) // n_layer, *array_RX.shape[1:])

    return HeadRows(
        sink_LH=by_head(facts.sink_R),
        own_LH=by_head(facts.own_R),
        prompt_LH=by_head(facts.prompt_R),
        entropy_LH=by_head(facts.entropy_R),
        distance_LH=by_head(facts.distance_R),
        positions_LHK=by_head(facts.positions_RK),
        weights_LHK=by_head(facts.weights_RK),
    )
