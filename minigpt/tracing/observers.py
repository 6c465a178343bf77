"""Observation of several tokens at a time (a burst), with all numbers of each row."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import TextStep
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.config import TraceConfig, has_prompt_rows
from minigpt.tracing.events import Row, Token, TraceHeader
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.rows import RowSummarizer
from minigpt.tracing.signals import delay_signals
from minigpt.tracing.tracer import AttentionObserver

Pending = tuple[TextStep, Sequence[AttentionPass]]
"""A generated token, and the forward passes since the previous token."""
_BURST_S = 0.04
"""Longest time for which tokens are collected to be observed together; too short to notice."""


def make_observer(
    model: LanguageModel,
    config: TraceConfig,
    n_prompt: int,
    sampling: SamplingConfig,
    tokenizer: Tokenizer,
    *,
    special: bool,
    dense: Callable[[Tensor], None] | None,
) -> "BurstObserver":
    """Return the observer for a config. Args: special and dense, as for ``tracer.trace``."""
    arguments = (model, config, n_prompt, sampling, tokenizer)
    if config.is_plain and not has_prompt_rows(config, sampling):
        return BurstObserver(*arguments, dense=dense)
    analysis = ring("tracing.analysis.observer")
    observer: BurstObserver = analysis.AnalysisObserver(*arguments, dense=dense, special=special)
    return observer


class CheckedRecorder(RowRecorder):
    """Checks the rows of one layer in each pass, cycling through the layers."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__(model)
        self._n_layer = len(model.attentions)
        self._n_passes = 0
        self.product_error: Tensor | None = None
        """Largest difference between a row times the values and the head's output, relative to the
        largest output, in the layer checked in the last pass."""

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Record a forward pass, and check the rows of the first sequence in the batch."""
        super().record(attention)
        layer = self._n_passes % self._n_layer
        self._n_passes += 1
        v_GSD = attention.values_LBGSD[layer, 0].float()
        rows_GRS = attention.weights_LBHS[layer, 0].view(len(v_GSD), -1, v_GSD.shape[1])
        product_GRD = torch.bmm(rows_GRS, v_GSD)
        context_GRD = attention.context_LBHD[layer, 0].float().view(product_GRD.shape)
        largest = torch.linalg.vector_norm(context_GRD, ord=math.inf)
        error = torch.dist(product_GRD, context_GRD, p=math.inf)
        self.product_error = error / largest.clamp(min=1e-30)


class PassQueue:
    """Queues forward passes for a recorder."""

    def __init__(self, recorder: RowRecorder) -> None:
        self.needs_queries, self.needs_residual = recorder.needs_queries, recorder.needs_residual
        self._passes: list[AttentionPass] = []
        self.record = self._passes.append

    def take(self) -> list[AttentionPass]:
        """Return the passes since the last call, in order."""
        passes = self._passes.copy()
        self._passes.clear()
        return passes


class BurstObserver(AttentionObserver):
    """Observes several tokens at a time, if their passes stay valid until then.

    A burst is faster: code that has left the CPU's caches takes three times as long. No token waits
    longer than ``_BURST_S``, or beyond the end or failure of decoding.
    """

    sink = 0
    """Position of the sink, which sources do not include."""

    def __init__(
        self,
        *model_to_tokenizer: Any,
        dense: Callable[[Tensor], None] | None,
    ) -> None:
        """Args: as for ``AttentionObserver``; dense, as for ``tracer.trace``."""
        super().__init__(*model_to_tokenizer)
        self.recorder: CheckedRecorder = CheckedRecorder(self.model)
        self._sum_error: float | None = None
        self._product_error: Tensor | None = None
        self.watcher: PassQueue = PassQueue(self.recorder)
        self._dense = dense
        self.summarizer: RowSummarizer

    def header(self, **fields: Any) -> TraceHeader:
        """Return the header; call it after the prefill."""
        for attention in self.watcher.take():
            self.recorder.record(attention)
        self.summarizer = RowSummarizer(
            sink=self.sink, n_prompt=self.n_prompt, n_sources=self.config.n_kept
        )
        return super().header(**fields)

    def observed(
        self, items: Iterator[TextStep], tokens: list[Token], decoder: Decoder
    ) -> Iterator[tuple[TextStep, dict[str, Any]]]:
        burst: list[Pending] = []
        due = 0.0  # the first token is shown at once
        while True:
            try:
                item = next(items, None)
            except BaseException:  # Ctrl-C, or NaN: show the tokens decoded before
                if burst:
                    yield from self._together(burst, tokens)
                raise
            if item is None:
                return
            burst.append((item, self.watcher.take()))
            step = item.step
            if step.position == len(tokens):
                self.add_token(item, tokens)
            is_new = step.position >= self.n_prompt  # else the cache is about to be overwritten
            may_wait = decoder.forward.keeps_passes and is_new and not step.finish
            if not may_wait or self._dense or time.perf_counter() > due:
                yield from self._together(burst, tokens)
                burst, due = [], time.perf_counter() + _BURST_S
                if self.is_ended:
                    return

    def _together(
        self, burst: Sequence[Pending], tokens: Sequence[Token]
    ) -> Iterator[tuple[TextStep, dict[str, Any]]]:
        found: list[dict[str, Any]] = []
        try:
            with delay_signals():
                found = self.observe(burst, tokens)
        finally:
            for (item, _), fields in zip(burst, found, strict=False):
                if self._dense:
                    self._dense(self.recorder.weights_LHS)
                yield item, fields

    def record(self, passes: Sequence[AttentionPass]) -> None:
        """Send passes to the recorder, and update the product error with that of the last one."""
        for attention in passes:
            self.recorder.record(attention)
        error, so_far = self.recorder.product_error, self._product_error
        if error is not None:
            self._product_error = error if so_far is None else torch.maximum(so_far, error)

    @torch.inference_mode()
    def observe(self, burst: Sequence[Pending], tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return the fields of each step that are computed from its attention.

        Args: tokens, at least those in view.
        """
        rows_N1S = []
        for _, passes in burst:
            self.record(passes)
            rows_N1S.append(self.recorder.weights_LHS.flatten(0, 1).mean(dim=0, keepdim=True))
        rows = self.summarizer.rows(rows_N1S, tokens)
        self.check_sums(rows)
        return [{"rows": (row,)} for row in rows]

    def check_sums(self, rows: Sequence[Row]) -> None:
        """Update the largest error of row sums, which should be 1."""
        self._sum_error = max([self._sum_error or 0.0, *(abs(row.total - 1) for row in rows)])

    def results(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the footer fields that hold results. Args: tokens, all tokens of the text."""
        error = self._product_error
        return {
            "worst_row_sum_error": self._sum_error,
            "worst_product_error": None if error is None else error.item(),
        }
