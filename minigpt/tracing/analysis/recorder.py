"""Recording of more than attention weights: other measures, all queries, the residual stream.

Shapes: L layers, B batch, H query heads, G key/value heads, T queries, S keys, C model dim.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.measures import Measured, Prediction, find
from minigpt.tracing.analysis_config import DEFAULTS, MEASURES, AnalysisConfig, Measure, facts_of
from minigpt.tracing.observers import CheckedRecorder

_CHUNK = 64  # queries of a prompt whose weights are in memory at a time


def require_measures(config: AnalysisConfig) -> None:
    """Raise ConfigError for settings that do not apply to the measures of a config."""
    for measure in config.measures:
        facts = facts_of(measure)
        if config.against is not None and not facts.needs_token:
            able = [m for m in MEASURES if facts_of(m).needs_token]
            raise ConfigError(
                f"--against compares the logits of two tokens, and --measure {measure} does not "
                f"depend on the token. Use --measure {', '.join(able)}."
            )
        if facts.is_signed and config.reduce != "mean":
            why = "sums over heads" if facts.has_heads else "has no rows of single heads"
            raise ConfigError(
                f"--reduce {config.reduce} does not apply to --measure {measure}, which {why}. "
                "Leave --reduce out."
            )
        if not facts.has_heads and (config.layers is not None or config.heads is not None):
            name = "--heads" if config.layers is None else "--layers"
            raise ConfigError(
                f"{name} has no effect on --measure {measure}, which has no rows of single heads. "
                "Leave it out."
            )


class Accumulator(Protocol):
    """Sums up the weights of all queries, including the prompt's: a rollout or a sink finder."""

    def add(self, layer: int, weights_HTS: Tensor) -> None:
        """Add the weights of the newest queries of a layer; queries come in order."""


class MeasureRecorder(CheckedRecorder):
    """Keeps the last query's rows by any measure, and passes all queries' weights on."""

    def __init__(
        self,
        model: LanguageModel,
        *,
        measures: Sequence[Measure] = ("weight",),
        accumulators: Sequence[Accumulator] = (),
        config: AnalysisConfig = DEFAULTS,
        needs_residual: bool = False,
    ) -> None:
        """Prepare to record forward passes of a model.

        Args: measures, available from ``measured``; accumulators, which receive the weights of all
            queries, not only of the last one; config, with the settings of the measures;
            needs_residual, whether to keep the residual stream even if no measure needs it.
        Raises: ConfigError if the model has no attention, or if a measure is not installed or does
            not support the model.
        """
        super().__init__(model)
        self._scores = [attention.score for attention in model.attentions]
        self._accumulators = accumulators
        self.needs_queries = bool(accumulators)
        facts = {name: facts_of(name) for name in measures if name != "weight"}
        self.needs_residual = needs_residual or any(f.needs_residual for f in facts.values())
        self._measures: dict[Measure, Any] = {
            name: find(name).make(model, config) for name in facts
        }
        self._rows: dict[Measure, Tensor | Measured] = {}

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Record a forward pass, and compute the rows of the first sequence in the batch."""
        super().record(attention)
        self._rows = {
            name: rows_LHS(Prediction(attention))
            for name, rows_LHS in self._measures.items()
            if not facts_of(name).needs_token
        }
        if self._accumulators:
            for layer in range(len(self._scores)):
                for weights_HTS in self._new_rows(attention, layer):
                    for accumulator in self._accumulators:
                        accumulator.add(layer, weights_HTS)

    def _new_rows(self, attention: AttentionPass, layer: int) -> Iterator[Tensor]:
        """Yield the weights (H, T, S) of the new queries, a few at a time to save memory."""
        if attention.queries is None or attention.keys is None:
            yield attention.weights_LBHS[layer, 0, :, None]
            return
        q_BHTD, k_BGSD = attention.queries[layer][:1], attention.keys[layer][:1]
        n_query, n_key = q_BHTD.shape[2], k_BGSD.shape[2]
        for first in range(0, n_query, _CHUNK):
            last = min(first + _CHUNK, n_query)
            k_in_view_BGSD = k_BGSD[:, :, : n_key - n_query + last]
            yield self._scores[layer].weights(q_BHTD[:, :, first:last], k_in_view_BGSD)[0]

    def measured(self, measure: Measure) -> Measured:
        """Return the rows of the last pass by a measure that does not need the token."""
        return _as_measured(self.weights_LHS if measure == "weight" else self._rows[measure])

    def measured_late(self, measure: Measure, predictions: Sequence[Prediction]) -> list[Measured]:
        """Return the rows of several predictions by a measure that needs the token."""
        rows = self._measures[measure]
        found = rows(predictions) if facts_of(measure).is_batched else map(rows, predictions)
        return [_as_measured(one) for one in found]


def _as_measured(rows: Tensor | Measured) -> Measured:
    return rows if isinstance(rows, Measured) else Measured(rows)
