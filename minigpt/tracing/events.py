"""What a trace consists of: a header, a step for each generated token, and a footer.

Shapes: L layers, H query heads, S positions in view, K sources that are kept of a row.
"""

import html
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import FinishReason
from minigpt.rings import ring
from minigpt.tracing.config import Knockout, Measure, Reduce
from minigpt.tracing.selection import HeadSelection

CONVENTION = (
    "The attention of a generated token is the row of the query that produced it, at the position "
    "before it; so a token is not among its own sources."
)


@dataclass(frozen=True)
class Token:
    """A token in its place."""

    position: int
    """0 for the prompt's first token."""
    id: int
    data: bytes
    """The bytes that it stands for."""


@dataclass(frozen=True)
class Source:
    """An earlier token that was attended to."""

    token: Token
    weight: float
    """Its part of the row: a share from 0 to 1, but for the reduction max."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The rows of every head of every layer at one step, in brief."""

    sink_LH: NDArray[np.float32]
    """Share on the sink."""
    own_LH: NDArray[np.float32]
    """Share on the query's own position."""
    prompt_LH: NDArray[np.float32]
    """Share on the prompt, the sink and the own position among it."""
    entropy_LH: NDArray[np.float32]
    """Bits: 0 for all on one position, log2 S for all alike."""
    distance_LH: NDArray[np.float32]
    """Positions from the query back to what it looked at, on average."""
    positions_LHK: NDArray[np.int32]
    """The positions with the most weight but the sink, most first."""
    weights_LHK: NDArray[np.float32]
    """Their weights."""


@dataclass(frozen=True, eq=False)
class Row:
    """What one query attended to, by one measure, reduced over the chosen heads."""

    measure: Measure
    total: float
    """Sum of the whole row: 1, but for the reduction max."""
    sink: float
    """Weight on the sink, where heads put what they have no use for (Xiao et al. 2023,
    arXiv:2309.17453)."""
    own: float
    """Weight on the query's own position."""
    prompt: float
    """Weight on the prompt, the sink and the own position among it."""
    generated: float
    """Weight on what was generated."""
    entropy: float
    """Bits: 0 for all on one position, log2 S for all alike."""
    distance: float
    """Positions from the query back to what it looked at, on average."""
    sources: tuple[Source, ...]
    """The positions with the most weight but the sink, most first."""
    weights_S: NDArray[np.float32]
    """The whole row."""
    heads: HeadRows | None = None
    """Every head's row by the same measure, chosen or not; None if they were not asked for."""

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights are shares of a whole."""
        return abs(self.total - 1) < 1e-3

    @property
    def rest(self) -> float | None:
        """Weight on all positions but the sink and the sources; None if they are no shares."""
        if not self.sums_to_one:
            return None
        return max(0.0, self.total - self.sink - sum(source.weight for source in self.sources))


@dataclass(frozen=True)
class Effect:
    """What became of a generated token's probability when one source was knocked out."""

    source: Source
    change: float
    """ln of the token's probability without the source, less that with it: negative if the source
    had helped."""
    control_of: int | None = None
    """For a control, which of the step's sources it was matched with; None for a source."""


@dataclass(frozen=True)
class Roles:
    """How much of a head's attention went where a known kind of head looks, 0 to 1 each.

    Source: Olsson et al. 2022, arXiv:2209.11895; Wang et al. 2022, arXiv:2211.00593.
    """

    previous: float
    """On the token before."""
    duplicate: float
    """On the earlier appearance of the same token."""
    induction: float
    """On the token after the earlier appearance."""
    sink: float
    """On position 0."""
    local: float
    """On the few tokens before and itself."""
    tag: str
    """The role that it plays for the most part, in at most five letters; empty for none."""


@dataclass(frozen=True)
class TraceHeader:
    """What a trace is of."""

    model: str
    n_layer: int
    n_head: int
    n_kv_head: int
    d_model: int
    d_head: int
    dtype: str
    """Of the model's activations."""
    kernel: str
    """What computed the model's own attention."""
    score: str
    """How a query and a key are compared, as ModelConfig.attention names it."""
    selection: HeadSelection
    measures: tuple[Measure, ...]
    reduce: Reduce
    sink: int
    """The position that counts as the sink."""
    sink_rule: str
    """How it was found: first, given or detected."""
    seed: int
    sampling: SamplingConfig
    prompt: tuple[Token, ...]
    n_verified: int = 0
    """How many sources of each token are knocked out; 0 for none."""
    knockout: Knockout = "key"
    roles: tuple[tuple[Roles, ...], ...] | None = None
    """For each layer its heads' roles; None if they were not asked for."""
    model_sha256: str | None = None
    """Of the file of its weights; None if it was not asked for."""


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One generated token and what its query attended to."""

    index: int
    """0 for the first generated token."""
    token: Token
    log_probability: float
    """ln of the model's own probability of the token, before any sampling option."""
    rows: tuple[Row, ...]
    """One for each measure, in the header's order."""
    text: str
    """Text that became certain with this token."""
    finish: FinishReason | None
    effects: tuple[Effect, ...] = ()
    """Of each source that was knocked out, most weight first, and then of each control."""

    @property
    def probability(self) -> float:
        """The model's own probability of the token."""
        return math.exp(self.log_probability)

    @property
    def row(self) -> Row:
        """What it attended to, by the first measure."""
        return self.rows[0]


@dataclass(frozen=True)
class CauseCheck:
    """Whether more attention went with more effect, over all that was knocked out in a trace."""

    n_sources: int
    n_controls: int
    mean_effect: float
    """Mean |change| of the sources, in nats."""
    mean_control_effect: float
    """Mean |change| of the controls, in nats."""
    rank_correlation: float | None
    """Spearman's, between weight and |change|; None if there is too little to rank."""


@dataclass(frozen=True)
class TraceFooter:
    """How a trace ended."""

    n_tokens: int
    finish: FinishReason | None
    """None if it was interrupted."""
    seconds: float
    """From the first forward pass to the last token."""
    worst_row_sum_error: float | None
    """Largest |sum of a row of weights - 1|; None if the reduction does not sum to 1."""
    worst_product_error: float | None = None
    """Largest difference between a head's output and its row times the values, over the largest
    output: of each step, one layer. None where there is nothing beside the row to compare with."""
    cause: CauseCheck | None = None


TraceEvent = TraceHeader | TraceStep | TraceFooter


@dataclass(frozen=True, eq=False)
class Trace:
    """A whole trace."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    footer: TraceFooter

    @property
    def tokens(self) -> tuple[Token, ...]:
        """The prompt, and what was generated."""
        return (*self.header.prompt, *(step.token for step in self.steps))

    @property
    def text(self) -> str:
        """What was generated."""
        return "".join(step.text for step in self.steps)

    def _repr_html_(self) -> str:
        """Show itself in a notebook, in a frame of its own."""
        page = html.escape(ring("tracing.views.page").to_html(self), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" '
            'style="width: 100%; height: 40rem; border: 0"></iframe>'
        )
