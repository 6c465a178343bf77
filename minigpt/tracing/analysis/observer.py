"""Observation of a model for traces with more than rows of attention weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.format import count
from minigpt.generation.decoder import Decoder, Step, require_finite, to_host
from minigpt.generation.forcing import continuation_ids
from minigpt.generation.stream import TextStep
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing import events
from minigpt.tracing.analysis.lens import read_lens
from minigpt.tracing.analysis.measures import Measured, Prediction
from minigpt.tracing.analysis.recorder import MeasureRecorder, require_measures
from minigpt.tracing.analysis.roles import head_roles
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.analysis.verifier import Verifier
from minigpt.tracing.analysis.workings import explained_heads, head_workings
from minigpt.tracing.analysis_config import AnalysisConfig, Measure, facts_of
from minigpt.tracing.config import has_prompt_rows
from minigpt.tracing.events import Token
from minigpt.tracing.findings import Alternative, Candidate, HeadWorking, Row
from minigpt.tracing.head_lists import HeadSelection, reduce_rows, select_heads
from minigpt.tracing.observers import BurstObserver, PassQueue, Pending


def find_alternative(tokenizer: Tokenizer, text: str, *, special: bool) -> Alternative:
    """Tokenize an alternative text as a continuation, and return its first token.

    Raises: ConfigError for an empty text, or one that the vocabulary cannot represent.
    """
    ids = continuation_ids(tokenizer, text, "--against", special=special)
    if not ids:
        raise ConfigError(
            "--against needs a token: the text is empty. Give at least one character."
        )
    return Alternative(text, ids[0], tokenizer.token_bytes(ids[0]), len(ids))


def prompt_steps(decoder: Decoder, n_best: int) -> Iterator[TextStep]:
    """Yield the tokens of the prompt from the second on, as if they were generated.

    They are decoded one at a time, so that the recorder's latest pass is the one that predicted the
    step's token. Then the prompt is prefilled again in one pass, so that ``generate`` samples the
    same tokens as without these steps. Their text is empty, as it is not generated.

    Args: n_best, number of most probable tokens to report at each step.
    Raises: CheckpointError for NaN or inf in the logits.
    """
    decoder.cache.truncate(0)
    for index, (token, following) in enumerate(pairwise(decoder.prompt)):
        logits = decoder.logits([token])[None]
        [result] = to_host(logits, torch.tensor([following], device=logits.device), n_best)
        require_finite(result, index + 1)
        step = Step(index, index + 1, following, result[1], None, result[2], is_forced=True)
        yield TextStep(step, "")
    decoder.prefill()


_Draft = tuple[Tensor, dict[str, Tensor]]
"""Rows (R, S) of a step, and its ``whole`` and ``parts``, if any, as tensors on the device."""


class AnalysisObserver(BurstObserver):
    """Turns forward passes into rows by any measure, with effects, roles and hidden states."""

    config: AnalysisConfig
    recorder: MeasureRecorder

    def __init__(
        self,
        model: LanguageModel,
        config: AnalysisConfig,
        n_prompt: int,
        sampling: SamplingConfig,
        tokenizer: Tokenizer,
        *,
        special: bool,
        dense: Callable[[Tensor], None] | None,
    ) -> None:
        """Prepare to observe a model's forward passes, all of which must be sent to ``watcher``.

        Args: as for ``tracer.trace``.
        Raises: ConfigError if the model cannot be traced with this config.
        """
        self._has_prompt_rows = has_prompt_rows(config, sampling)
        if self._has_prompt_rows and n_prompt == 1:
            raise ConfigError(
                "the prompt has one token, and only tokens after the first have rows. Give a "
                "longer prompt, or generate tokens without --prompt-rows."
            )
        sampling = replace(sampling, logprobs=max(sampling.logprobs, config.candidates))
        self._against: Alternative | None = None
        if config.against is not None:
            self._against = find_alternative(tokenizer, config.against, special=special)
        super().__init__(model, config, n_prompt, sampling, tokenizer, dense=dense)
        if isinstance(config.sink, int) and config.sink >= max(n_prompt, 1):
            raise ConfigError(
                f"the sink must be a position of the prompt: it is {config.sink}, and the prompt "
                f"has {count(n_prompt, 'token')}."
            )
        shape = model.config.n_attention_layer, model.config.n_head
        self.selection = select_heads(*shape, layers=config.layers, heads=config.heads)
        require_measures(config)
        self._verifier = Verifier(model, config) if config.n_verified else None
        self._rollout = self._sink_finder = None
        if config.reduce == "rollout":
            n_positions = min(model.config.context_length, n_prompt + sampling.max_new_tokens)
            self._rollout = Rollout(self.selection, n_positions)
        if config.sink == "auto":
            self._sink_finder = SinkFinder(n_prompt)
        accumulators = [one for one in (self._rollout, self._sink_finder) if one is not None]
        self.recorder = MeasureRecorder(
            model,
            measures=config.measures,
            accumulators=accumulators,
            config=config,
            needs_residual=config.lens,
        )
        self.watcher = PassQueue(self.recorder)
        self._explained: HeadSelection | None = None
        if config.explain is not None:
            self._explained = explained_heads(model, config.explain)

    def header(self, **fields: Any) -> events.TraceHeader:
        """Return the header; call it after the prefill.

        Raises: ConfigError for roles of a patched model; those of ``head_roles``.
        """
        intervention = fields["intervention"]
        if self.config.roles and intervention is not None and intervention.patch is not None:
            raise ConfigError(
                "roles are measured on random tokens, which have no position to patch. Leave roles "
                "out, and see them with minigpt heads."
            )
        rule = "given" if self.config.sink else "first"
        if self._sink_finder is not None:
            self.sink, rule = self._sink_finder.sink(), "detected"
        else:
            self.sink = int(self.config.sink)
        return super().header(
            selection=self.selection,
            measures=self.config.measures,
            reduce=self.config.reduce,
            sink=self.sink,
            sink_rule=rule,
            n_verified=self.config.n_verified,
            knockout=self.config.knockout,
            against=self._against,
            verified_heads=self._verifier and self._verifier.selection,
            roles=head_roles(self.model) if self.config.roles else None,
            **fields,
        )

    def steps(
        self, items: Iterator[TextStep], tokens: list[Token], decoder: Decoder
    ) -> Iterator[Any]:
        """Yield a step for each token of the prompt, if requested, and each generated token.

        Args: tokens, the prompt's; generated tokens are appended to it.
        """
        if self._has_prompt_rows:
            items = chain(prompt_steps(decoder, self.sampling.logprobs), items)
        steps: Iterator[Any] = super().steps(items, tokens, decoder)
        if self._verifier is not None:
            steps = self._verifier.verify(steps, tokens, decoder.cache, sink=self.sink)
        return steps

    @torch.inference_mode()
    def observe(self, burst: Sequence[Pending], tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return each step's rows, one per measure, its candidates, and its logit lens."""
        tokenizer, measures = self.tokenizer, self.config.measures
        against = None if self._against is None else self._against.id
        late = [measure for measure in measures if facts_of(measure).needs_token]
        ids = [token.id for token in tokens] if late else []
        predictions: list[Prediction] = []
        observed: list[dict[str, Any]] = []
        drafts: dict[Measure, list[_Draft]] = {measure: [] for measure in measures}
        for item, passes in burst:
            step = item.step
            self.record(passes)
            in_view, attention = ids[: step.position], self.recorder.attention
            predictions.append(Prediction(attention, in_view, step.token, against))
            for measure in measures:
                if measure not in late:
                    measured = self.recorder.measured(measure)
                    drafts[measure].append(self._draft(measure, measured))
            best = (Candidate(id_, tokenizer.token_bytes(id_), value) for id_, value in step.best)
            observed.append({"candidates": tuple(best)})
            if self.config.lens:
                residual_NC = predictions[-1].residual_NC
                observed[-1]["lens"] = read_lens(self.model, residual_NC, step.token, tokenizer)
        for measure in late:
            found = self.recorder.measured_late(measure, predictions)
            drafts[measure] = [self._draft(measure, measured) for measured in found]
        rows = [self._rows(measure, of_measure, tokens) for measure, of_measure in drafts.items()]
        if measures[0] == "weight" and self.config.reduce != "max":
            self.check_sums(rows[0])
        return [
            {"rows": of_step, **others}
            for of_step, others in zip(zip(*rows, strict=True), observed, strict=True)
        ]

    def _draft(self, measure: Measure, measured: Measured) -> _Draft:
        """Return a step's row, followed by all heads' rows if these are kept, and its parts."""
        selection, facts = self.selection, facts_of(measure)
        rows, parts = measured.rows, dict(measured.parts)
        if not facts.has_heads:
            rows_RS = rows[None]
        else:
            reduced_S = self._reduced(rows)
            if facts.is_signed:
                reduced_S = reduced_S * selection.n_chosen  # summed
                if not selection.is_all and parts:
                    parts["other_heads"] = rows.sum() - reduced_S.sum()
            rows_RS = reduced_S[None]
            if self.config.has_heads:
                rows_RS = torch.cat((rows_RS, rows.flatten(0, 1)))
        if measure != "weight" and facts.unit == "share":  # may not sum to 1 yet
            rows_RS = rows_RS / rows_RS.sum(dim=1, keepdim=True).clamp(min=1e-30)
        if measured.whole is not None:
            parts = {"whole": measured.whole, **parts}
        return rows_RS, parts

    def _reduced(self, rows_LHS: Tensor) -> Tensor:
        if self._rollout is not None:
            return self._rollout.row()
        return reduce_rows(rows_LHS, self.selection, is_max=self.config.reduce == "max")

    def _rows(
        self, measure: Measure, drafts: Sequence[_Draft], tokens: Sequence[Token]
    ) -> list[Row]:
        rows = self.summarizer.rows(
            [rows_RS for rows_RS, _ in drafts],
            tokens,
            self.selection.n_layer,
            measure=measure,
            is_signed=facts_of(measure).is_signed,
        )
        names = list(drafts[0][1])
        if not names:
            return rows
        numbers = torch.stack([x for _, parts in drafts for x in parts.values()])
        found = []
        for row, values in zip(rows, numbers.view(len(rows), -1).tolist(), strict=True):
            parts = dict(zip(names, values, strict=True))
            found.append(replace(row, whole=parts.pop("whole", None), parts=parts))
        return found

    def results(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the checks, the summary of all knockouts, and the workings of explained heads."""
        workings: tuple[HeadWorking, ...] = ()
        if self._explained is not None:
            ids = [token.id for token in tokens]
            workings = head_workings(self.model, ids, self._explained)
        cause = self._verifier and self._verifier.tally.check()
        return {**super().results(tokens), "cause": cause, "workings": workings}
