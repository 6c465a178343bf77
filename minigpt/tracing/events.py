"""The records of a trace: a header, a step per generated token, and a footer.

What only an analysis adds to them is in ``tracing/findings.py``.

Shapes: S positions in view.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import FinishReason

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig
    from minigpt.tracing.analysis_config import Knockout, Reduce
    from minigpt.tracing.findings import (
        Alternative,
        CauseCheck,
        Effect,
        HeadRows,
        HeadWorking,
        Kept,
        Lens,
        Roles,
    )
    from minigpt.tracing.head_lists import HeadSelection

CONVENTION = (
    "The attention of a generated token is the row of the query that produced it, at the position "
    "before it; so a token is not among its own sources."
)


@dataclass(frozen=True)
class Token:
    """A token at its position."""

    position: int
    """Index in the sequence; 0 is the first token of the prompt."""
    id: int
    data: bytes
    """Bytes of its text."""


@dataclass(frozen=True)
class Source:
    """An earlier token that received attention."""

    token: Token
    weight: float
    """Number in the row: in [0, 1], unless the measure is signed."""


_ROUNDING = 1e-6
"""Largest float32 rounding error of the sum of a row."""


@dataclass(frozen=True, eq=False)
class Row:
    """The attention of one query by one measure, reduced over the chosen heads."""

    measure: str
    """Name of the measure; weight for attention weights."""
    total: float
    """Sum of the row; 1 unless the reduction is max."""
    sink: float
    """Weight on the sink, the position that heads attend to when nothing is relevant (Xiao et al.
    2023, arXiv:2309.17453)."""
    own: float
    """Weight on the query's own position."""
    prompt: float
    """Weight on the prompt, including the sink."""
    generated: float
    """Weight on generated tokens."""
    entropy: float
    """Entropy in bits, in [0, log2 S]; of the magnitudes, if the measure is signed."""
    distance: float
    """Mean distance from the query to the positions, in tokens, weighted as the entropy."""
    sources: tuple[Source, ...]
    """Positions with the largest weights by magnitude, except the sink, in descending order."""
    weights_S: NDArray[np.float32] = field(repr=False)
    """The whole row."""
    heads: "HeadRows | None" = field(default=None, repr=False)
    """Rows of all heads by this measure. None if they were not kept."""
    whole: float | None = None
    """What the row and its parts sum to, such as the logit of the token. None if the measure has no
    such sum."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What belongs to the whole and to no position of the row, such as that of the MLPs."""
    is_signed: bool = False
    """Whether its numbers may be negative."""

    @property
    def sums_to_one(self) -> bool:
        """Whether the row sums to 1."""
        return not self.is_signed and abs(self.total - 1) < 1e-3

    @property
    def rest(self) -> float | None:
        """Weight on positions other than the sink and the sources; None if the row is of shares and
        need not sum to 1.
        """
        rest = self.total - self.sink - sum(source.weight for source in self.sources)
        if self.is_signed:
            return rest
        if not self.sums_to_one:
            return None
        return rest if rest > _ROUNDING else 0.0


@dataclass(frozen=True)
class Candidate:
    """A token that the model could have generated at a step."""

    id: int
    data: bytes
    """Bytes of its text."""
    log_probability: float
    """ln p of the token, before any sampling option."""

    @property
    def probability(self) -> float:
        """Probability of the token, before any sampling option."""
        return math.exp(self.log_probability)


@dataclass(frozen=True)
class TraceHeader:
    """The model, the settings and the prompt of a trace."""

    model: str
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_head: int
    dtype: str
    """Dtype of the activations."""
    kernel: str
    """Implementation that computed the model's attention."""
    score: str
    """Attention score, as in ``ModelConfig.attention``."""
    selection: "HeadSelection"
    """Chosen heads. None for all, without the ring of lists of heads."""
    measures: tuple[str, ...]
    reduce: "Reduce"
    sink: int
    """Position of the sink."""
    sink_rule: str
    """How the sink was chosen: first, given or detected."""
    seed: int
    sampling: SamplingConfig
    prompt: tuple[Token, ...]
    n_verified: int | Literal["all"] = 0
    """Number of sources per token that are knocked out, or all for every position in view."""
    knockout: "Knockout" = "key"
    against: "Alternative | None" = None
    """Token that each generated token is compared with. None for no comparison."""
    verified_heads: "HeadSelection | None" = None
    """Heads in which positions are knocked out. None for all."""
    roles: "tuple[tuple[Roles, ...], ...] | None" = None
    """Roles of the heads of each layer. None if they were not requested."""
    intervention: "InterventionConfig | None" = None
    """Heads that were ablated or patched. None if there were none."""
    model_sha256: str | None = None
    """SHA-256 of the weights file. None if it was not requested."""


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One token, generated or of the prompt, and the attention of the query that produced it."""

    index: int
    """Index of the step, from 0; steps of the prompt's own tokens come first."""
    token: Token
    log_probability: float
    """ln p of the token, before any sampling option."""
    rows: tuple[Row, ...]
    """One row per measure, in the order of the header."""
    text: str
    """Text completed by this token."""
    finish: FinishReason | None
    effects: "tuple[Effect, ...]" = ()
    """Effects of the sources, largest weight first, then those of their controls. With
    ``changes_S``, the largest effects."""
    candidates: tuple[Candidate, ...] = ()
    """Most probable tokens at this step, in descending order. Empty if they were not kept."""
    lens: "Lens | None" = None
    """Predictions after each layer. None if they were not requested."""
    is_given: bool = False
    """Whether the token was given, by the prompt or ``force``, instead of sampled."""
    changes_S: NDArray[np.float32] | None = field(default=None, repr=False)
    """Change of ln p(token) without each position in view, in nats. None unless all are knocked
    out."""
    kept: "Kept | None" = None
    """Prediction from the sources and the sink alone. None unless sources are knocked out."""

    @property
    def probability(self) -> float:
        """Probability of the token, before any sampling option."""
        return math.exp(self.log_probability)

    @property
    def row(self) -> Row:
        """The row of the first measure."""
        return self.rows[0]


@dataclass(frozen=True)
class TraceFooter:
    """How a trace ended, and the results of its checks."""

    n_tokens: int
    finish: FinishReason | None
    """Reason to stop. None if interrupted."""
    seconds: float
    """Time from the start of the prefill to the last token."""
    worst_row_sum_error: float | None
    """Largest |sum of a row of weights - 1|. None if rows need not sum to 1."""
    worst_product_error: float | None = None
    """Largest relative difference between a head's output and its row times the values, in one
    layer per step. None if it was not measured."""
    cause: "CauseCheck | None" = None
    workings: "tuple[HeadWorking, ...]" = ()
    """Queries, keys and values of the heads that are explained."""


TraceEvent = TraceHeader | TraceStep | TraceFooter
