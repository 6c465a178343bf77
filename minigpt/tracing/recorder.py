"""Recording of attention: the last query's row of every head.

Shapes: L layers, B batch, H query heads, G key/value heads, T queries, S keys, D head dim.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring
from minigpt.tracing.config import DEFAULTS, MEASURES, Measure, TraceConfig, facts_of

_CHUNK = 64  # queries of a prompt whose weights are in memory together


def require_attention(model: LanguageModel) -> None:
    """Raise ConfigError if a model has no attention."""
    if not model.attentions:
        raise ConfigError(
            f"a model of arch {model.config.arch} has no attention to show. Choose another one."
        )


@dataclass(frozen=True)
class Prediction:
    """A forward pass and the token that was drawn after it, as a measure sees them."""

    attention: AttentionPass
    tokens: Sequence[int] = ()
    """Ids of the tokens in view. Empty for a measure that does not need the token."""
    target: int = -1
    """Id of the generated token; -1 for a measure that does not need it."""
    against: int | None = None
    """Id of the alternative whose logit is subtracted. None for none."""


@dataclass(frozen=True)
class Measured:
    """Rows by a measure, with what else belongs to their sum."""

    rows: Tensor
    """Rows of every head (L, H, S), or one row (S,), float32."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Numbers that belong to no single position, each of shape ()."""
    whole: Tensor | None = None
    """What the rows of all heads and the parts sum to, of shape ()."""


def require_measures(config: TraceConfig) -> None:
    """Raise ConfigError for settings that have no meaning for the measures of a config."""
    for measure in config.measures:
        facts = facts_of(measure)
        if config.against is not None and "token" not in facts.needs:
            able = [m for m in MEASURES if "token" in facts_of(m).needs]
            raise ConfigError(
                f"--against compares the logits of two tokens, and --measure {measure} does not "
                f"depend on the token. Use --measure {', '.join(able)}."
            )
        if facts.is_signed and config.reduce != "mean":
            raise ConfigError(
                f"--reduce {config.reduce} has no meaning for --measure {measure}, which is "
                "summed. Leave --reduce out."
            )
        if not facts.has_heads and (config.layers is not None or config.heads is not None):
            name = "--heads" if config.layers is None else "--layers"
            raise ConfigError(
                f"{name} has no effect on --measure {measure}, which goes through the whole "
                "model. Leave it out."
            )


class Watcher(Protocol):
    """Receives the weights of all queries, also those of the prompt, as a rollout does."""

    def add(self, layer: int, weights_HTS: Tensor) -> None:
        """Take the weights of the newest queries of a layer; queries come in order."""


class RowRecorder:
    """Keeps each head's attention row of the last query of the last forward pass.

    In a decode step these are the weights that the model used. In a prefill, the model uses a fused
    kernel, and the row is the softmax of the model's own score, computed separately in float32.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        measures: Sequence[Measure] = ("weight",),
        watchers: Sequence[Watcher] = (),
        config: TraceConfig = DEFAULTS,
        needs_residual: bool = False,
    ) -> None:
        """Prepare to record forward passes of a model.

        Args: measures, available from ``measured``; watchers, which receive the weights of all
            queries, not only the last one; config, which measures read their settings from;
            needs_residual, whether to keep the residual stream for others than the measures.
        Raises: ConfigError if the model has no attention, or if a measure is not installed or does
            not support the model.
        """
        require_attention(model)
        self._scores = [attention.score for attention in model.attentions]
        self._watchers = watchers
        self.needs_queries = bool(watchers)
        facts = {name: facts_of(name) for name in measures if name != "weight"}
        self.needs_residual = needs_residual or any("residual" in f.needs for f in facts.values())
        self._measures = {
            name: ring("tracing.analysis.measures").find(name).make(model, config) for name in facts
        }
        self._waiting = {name for name, f in facts.items() if "token" in f.needs}
        self._last: AttentionPass | None = None
        self._rows: dict[Measure, Tensor] = {}
        self._n_passes = 0
        self.product_error: Tensor | None = None
        """Largest difference between a row times the values and the head's output, relative to the
        largest output; of the last pass, in one layer (each pass checks the next layer)."""

    @torch.no_grad()
    def record(self, attention: AttentionPass) -> None:
        """Take the rows of the first sequence of the batch."""
        weights_LHS = attention.weights_LBHS[:, 0]
        self._last = attention
        self._rows = {
            name: rows_LHS(Prediction(attention))
            for name, rows_LHS in self._measures.items()
            if name not in self._waiting
        }
        self._rows["weight"] = weights_LHS
        values_LGSD = attention.values_LBGSD[:, 0]
        layer = self._n_passes % len(self._scores)
        self.product_error = _product_error(
            weights_LHS[layer], values_LGSD[layer], attention.context_LBHD[layer, 0]
        )
        self._n_passes += 1
        if self._watchers:
            for layer in range(len(self._scores)):
                for weights_HTS in self._new_rows(attention, layer):
                    for watcher in self._watchers:
                        watcher.add(layer, weights_HTS)

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

    @property
    def weights_LHS(self) -> Tensor:
        """Attention weights of the last pass, float32, on the model's device; rows sum to 1."""
        return self.rows_LHS("weight")

    def rows_LHS(self, measure: Measure) -> Tensor:
        """Return the rows of the last pass by a measure, float32, on the model's device."""
        assert measure in self._rows, f"no forward pass was recorded with the measure {measure}"
        return self._rows[measure]

    def measured(
        self, measure: Measure, tokens: Sequence[int], target: int, against: int | None = None
    ) -> Measured:
        """Return the rows of the last pass by any measure.

        Args: tokens, ids of the tokens in view; target, id of the token drawn after the pass;
            against, id of the alternative whose logit is subtracted.
        """
        if measure not in self._waiting:
            return Measured(self.rows_LHS(measure))
        assert self._last is not None, "no forward pass was recorded"
        rows = self._measures[measure](Prediction(self._last, tokens, target, against))
        return rows if isinstance(rows, Measured) else Measured(rows)

    @property
    def residual_NC(self) -> Tensor | None:
        """Residual stream of the last pass at the last position, as in AttentionPass."""
        residual_NBC = None if self._last is None else self._last.residual_NBC
        return None if residual_NBC is None else residual_NBC[:, 0]


def _product_error(weights_HS: Tensor, v_GSD: Tensor, context_HD: Tensor) -> Tensor:
    rows_GRS = weights_HS.unflatten(0, (v_GSD.shape[0], -1))
    product_HD = (rows_GRS @ v_GSD.float()).flatten(0, 1)
    context_HD = context_HD.float()
    return (product_HD - context_HD).abs().max() / context_HD.abs().max().clamp(min=1e-30)
