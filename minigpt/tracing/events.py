"""The records of a trace: a header, a step per generated token, and a footer.

``tracing/findings.py`` defines subclasses with the fields of an analysis.

Shapes: S positions in view.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import FinishReason

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig


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
    """Number in the row, in [0, 1] unless the measure is signed."""


ROUNDING = 1e-5
"""Largest ``Row.rest`` shown as 0: rounding of float32 and of a trace file."""


@dataclass(frozen=True, eq=False)
class Row:
    """The attention of one query, averaged over heads."""

    total: float
    """Sum of the row."""
    sink: float
    """Weight on the sink, attended to when nothing is relevant (Xiao et al. 2023,
    arXiv:2309.17453)."""
    entropy: float
    """Entropy in bits, in [0, log2 S]."""
    sources: tuple[Source, ...]
    """Positions with the largest weights, except the sink, in descending order."""
    weights_S: NDArray[np.float32] = field(repr=False)
    """The full row."""

    @property
    def rest(self) -> float | None:
        """Weight on all but the sink and the sources."""
        rest = self.total - self.sink - sum(source.weight for source in self.sources)
        return rest if rest > ROUNDING else 0.0


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
    seed: int
    sampling: SamplingConfig
    prompt: tuple[Token, ...]
    intervention: "InterventionConfig | None" = None
    """Ablated or patched heads. None for no intervention."""


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One token, generated or of the prompt, and the attention of the query that produced it."""

    index: int
    """Index of the step, from 0; steps of the prompt's tokens come first."""
    token: Token
    log_probability: float
    """ln p of the token, before any sampling option."""
    rows: tuple[Row, ...]
    """One row per measure, in the order of the header."""
    text: str
    """Text completed by this token."""
    finish: FinishReason | None
    is_given: bool = False
    """Whether the token was given, by the prompt or ``force``, instead of sampled."""

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
    """How a trace ended."""

    n_tokens: int
    finish: FinishReason | None
    """Reason why generation stopped. None if interrupted."""
    seconds: float
    """Time from the start of the prefill to the last token."""


TraceEvent = TraceHeader | TraceStep | TraceFooter


class EndTrace(KeyboardInterrupt):
    """Ends a trace after the steps that are ready, without decoding more, if thrown into it."""
