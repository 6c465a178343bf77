"""Complete traces, and the records of ``tracing/events.py`` with the fields of an analysis.

Shapes: L layers, H query heads, T positions, D head dim, K sources kept per row.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import ConfigError, cut
from minigpt.rings import ring
from minigpt.text.joined import JoinedTokens
from minigpt.tracing import events
from minigpt.tracing.analysis_config import Knockout, Measure, Reduce
from minigpt.tracing.config import DIGITS
from minigpt.tracing.events import Source, Token
from minigpt.tracing.head_lists import HeadSelection, select_heads

CONVENTION = (
    "The row of a generated token is that of the query that produced it, at the position before "
    "it; so a token is not among its own sources."
)


def shown_probability(log_probability: float) -> float:
    """Return a probability rounded as in a trace file, so that a replay shows the same."""
    return round(math.exp(round(log_probability, DIGITS)), DIGITS)


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
class Alternative:
    """A token whose logit is subtracted from that of each generated token."""

    text: str
    """Text given by the user."""
    id: int
    """Id of its first token."""
    data: bytes
    """Bytes of its first token."""
    n_tokens: int
    """Number of tokens in the text. Only the first is compared."""


@dataclass(frozen=True)
class Effect:
    """Effect of knocking out one source on the probability of the generated token."""

    source: Source
    change: float
    """Change of ln p(token) without the source, in nats. Negative: the source raised p."""
    control_of: int | None = None
    """Index of the source that this is a control for. None for a source."""


@dataclass(frozen=True)
class Kept:
    """Prediction of a token with all positions knocked out except its sources and the sink."""

    change: float
    """Change of ln p(token), in nats: exp(change) of p remains."""
    logit_change: float
    """Change of the token's logit."""


@dataclass(frozen=True)
class Lens:
    """Logit lens: the prediction read from each layer's output (nostalgebraist 2020)."""

    layer: int | None
    """First layer from which the token stays the top prediction. None if it is not at the end."""
    log_probabilities: tuple[float, ...]
    """ln p of the token after each layer."""
    top: tuple[tuple[Candidate, ...], ...]
    """Most probable tokens after each layer, in descending order."""

    @property
    def probabilities(self) -> tuple[float, ...]:
        """Probability of the token after each layer."""
        return tuple(map(math.exp, self.log_probabilities))


@dataclass(frozen=True)
class Roles:
    """Scores of a head for each known role: the fraction of its attention, in [0, 1], that fits it.

    Source: Olsson et al. 2022, arXiv:2209.11895; Wang et al. 2022, arXiv:2211.00593.
    """

    previous: float
    """Attention on the previous token."""
    duplicate: float
    """Attention on the previous occurrence of the same token."""
    induction: float
    """Attention on the token after the previous occurrence of the same token."""
    sink: float
    """Attention on position 0."""
    local: float
    """Attention on the last few tokens, including the query's own."""
    tag: str
    """Main role, abbreviated to at most five letters. Empty for none."""


ROLE_SCORES = tuple(f.name for f in fields(Roles) if f.name != "tag")
"""Names of the scores of a head's roles."""


@dataclass(frozen=True)
class CauseCheck:
    """Test of whether sources with more attention have larger effects, over all knockouts."""

    n_sources: int
    n_controls: int
    mean_effect: float
    """Mean |change| of the sources, in nats."""
    mean_control_effect: float | None
    """Mean |change| of the controls, in nats. None without controls."""
    rank_correlation: float | None
    """Spearman correlation of weight and |change|. None if there are too few values."""


@dataclass(frozen=True, eq=False)
class HeadWorking:
    """Queries, keys and values of a head, over all positions T of a text.

    The weights of position t are softmax(queries_TD[t] . keys_TD[j] * scale) over the positions j
    in its view. Its output is the sum of the values multiplied by these weights.
    """

    layer: int
    head: int
    scale: float
    """Scale of the dot products of queries and keys."""
    window: int
    """Number of positions that a query attends to, up to its own. 0 for all."""
    queries_TD: NDArray[np.float32]
    """Queries just before the dot product: after RoPE and normalization, if the model has them."""
    keys_TD: NDArray[np.float32]
    values_TD: NDArray[np.float32]


HEAD_DIGITS = 4
"""Decimal places of ``HeadRows`` numbers in a trace file."""


@dataclass(frozen=True, eq=False)
class HeadRows:
    """Summaries of the rows of all heads at one step; each array is [layer, head]."""

    sink: NDArray[np.float32]
    """Weight on the sink."""
    own: NDArray[np.float32]
    """Weight on the query's own position."""
    prompt: NDArray[np.float32]
    """Weight on the prompt, including the sink."""
    entropy: NDArray[np.float32]
    """Entropy in bits, in [0, log2 S]."""
    distance: NDArray[np.float32]
    """Mean distance from the query to the positions, in tokens."""
    positions: NDArray[np.int32]
    """Positions with the largest weights, except the sink, in descending order (L, H, K)."""
    weights: NDArray[np.float32]
    """Weights of those positions (L, H, K)."""

    @classmethod
    def of(cls, summaries: Mapping[str, NDArray[Any]], n_layer: int) -> "HeadRows":
        """Build the summaries from ``RowSummarizer.summaries``, skipping the first row."""
        rows = {f.name: summaries[f.name][1:] for f in fields(cls)}
        shape = n_layer, len(rows["sink"]) // n_layer
        return cls(**{name: x.reshape(*shape, *x.shape[1:]) for name, x in rows.items()})

    def shown(self) -> "HeadRows":
        """Return the summaries rounded as in a trace file, so that a replay shows the same."""
        return HeadRows(**{f.name: getattr(self, f.name).round(HEAD_DIGITS) for f in fields(self)})


@dataclass(frozen=True, eq=False, kw_only=True)
class Row(events.Row):
    """The attention of one query by one measure, reduced over the chosen heads."""

    measure: str
    """Name of the measure: weight for attention weights."""
    own: float
    """Weight on the query's own position."""
    prompt: float
    """Weight on the prompt, including the sink."""
    generated: float
    """Weight on generated tokens."""
    distance: float
    """Mean distance from the query to the positions, weighted by the row, in tokens."""
    heads: HeadRows | None = field(default=None, repr=False)
    """Rows of all heads by this measure. None if they were not kept."""
    whole: float | None = None
    """Sum of the row and its parts, such as the token's logit. None if it has no meaning."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """Contributions to ``whole`` from no position of the row, such as the MLPs'."""
    is_signed: bool = False
    """Whether numbers may be negative. If so, entropy, distance and order use magnitudes."""

    @property
    def sums_to_one(self) -> bool:
        """Whether the row sums to 1."""
        return not self.is_signed and abs(self.total - 1) < 1e-3

    @property
    def rest(self) -> float | None:
        """Weight on all but the sink and the sources. None for shares that do not sum to 1."""
        if self.is_signed:
            return self.total - self.sink - sum(source.weight for source in self.sources)
        return super().rest if self.sums_to_one else None


@dataclass(frozen=True)
class TraceHeader(events.TraceHeader):
    """The model, the settings and the prompt of a trace."""

    selection: HeadSelection = None  # type: ignore[assignment]
    """Chosen heads. None selects all."""
    measures: tuple[Measure, ...] = ("weight",)
    reduce: Reduce = "mean"
    sink: int = 0
    """Position of the sink."""
    sink_rule: str = "first"
    """How the sink was chosen: first, given or detected."""
    n_verified: int | Literal["all"] = 0
    """Number of sources knocked out per token. all: every position in view."""
    knockout: Knockout = "key"
    against: Alternative | None = None
    """Token to compare each generated token with. None for no comparison."""
    verified_heads: HeadSelection | None = None
    """Heads in which positions are knocked out. None for all."""
    roles: tuple[tuple[Roles, ...], ...] | None = None
    """Roles of the heads of each layer. None if they were not requested."""
    model_sha256: str | None = None
    """SHA-256 of the weights file. None if it was not requested."""

    def __post_init__(self) -> None:
        if self.selection is None:
            object.__setattr__(self, "selection", select_heads(self.n_layer, self.n_head))


@dataclass(frozen=True, eq=False)
class TraceStep(events.TraceStep):
    """One token, generated or of the prompt, and the analysis of its prediction."""

    rows: tuple[Row, ...]
    """One row per measure, in the order of the header."""
    candidates: tuple[Candidate, ...] = ()
    """Most probable tokens at this step, in descending order. Empty if they were not kept."""
    effects: tuple[Effect, ...] = ()
    """Effects of the sources, largest weight first, then those of their controls. If ``changes_S``
    is set, the largest effects."""
    lens: Lens | None = None
    """Predictions after each layer. None if they were not requested."""
    changes_S: NDArray[np.float32] | None = field(default=None, repr=False)
    """Change of ln p(token) when each position in view is knocked out, in nats. None unless
    ``n_verified`` is all."""
    kept: Kept | None = None
    """Prediction from the sources and the sink alone. None without knockouts."""

    @property
    def row(self) -> Row:
        """The row of the first measure."""
        return self.rows[0]

    @property
    def has_lines_below(self) -> bool:
        """Whether the terminal shows lines below this step's own."""
        return bool(self.candidates or self.lens is not None or self.effects)


@dataclass(frozen=True)
class TraceFooter(events.TraceFooter):
    """How a trace ended, and the results of its checks and of analyses of the whole text."""

    worst_row_sum_error: float | None = None
    """Largest |sum of a row of weights - 1|. None if rows need not sum to 1."""
    worst_product_error: float | None = None
    """Largest relative difference between a head's output and its row times the values."""
    cause: CauseCheck | None = None
    workings: tuple[HeadWorking, ...] = ()
    """Queries, keys and values of the heads to explain."""


TraceEvent = TraceHeader | TraceStep | TraceFooter


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A complete trace."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    footer: TraceFooter
    dense: tuple[NDArray[np.float32], ...] = ()
    """Attention weights of each step in every head, (L, H, S). Empty unless requested."""

    @classmethod
    def of(cls, events: Iterable[Any], dense: Sequence[NDArray[np.float32]] = ()) -> "Trace":
        """Build a trace from its events: a header, steps and a footer."""
        header, *steps, footer = events
        return cls(header, tuple(steps), footer, tuple(dense))

    @cached_property
    def weights_LHTS(self) -> NDArray[np.float32]:
        """Attention weights of all T steps in every head, (L, H, T, S), 0 for later positions.

        Row t belongs to the query that predicted ``steps[t].token``, whose position is one less.

        Raises: ConfigError if the trace was made without ``dense=True``.
        """
        if len(self.dense) != len(self.steps):
            raise ConfigError("this trace has no weights of single heads. Trace with dense=True.")
        n_view = max((weights_LHS.shape[2] for weights_LHS in self.dense), default=0)
        shape = (self.header.n_layer, self.header.n_head, len(self.dense), n_view)
        weights_LHTS = np.zeros(shape, np.float32)
        for t, weights_LHS in enumerate(self.dense):
            weights_LHTS[:, :, t, : weights_LHS.shape[2]] = weights_LHS
        return weights_LHTS

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Tokens of the prompt, then generated tokens."""
        n_prompt = len(self.header.prompt)
        generated = (step.token for step in self.steps if step.token.position >= n_prompt)
        return (*self.header.prompt, *generated)

    @property
    def has_prompt_rows(self) -> bool:
        """Whether tokens of the prompt have rows too."""
        return bool(self.steps) and self.steps[0].token.position < len(self.header.prompt)

    @cached_property
    def joined(self) -> JoinedTokens:
        """Texts of the tokens, escaped, with characters that span several tokens joined."""
        return JoinedTokens(token.data for token in self.tokens)

    @property
    def text(self) -> str:
        """Generated text."""
        return "".join(step.text for step in self.steps)

    def __repr__(self) -> str:
        """Return one line with the model, the token counts and the truncated text."""
        n_prompt, n_steps = len(self.header.prompt), self.footer.n_tokens
        finish = self.footer.finish or "interrupted"
        return (
            f"Trace(model={self.header.model!r}, prompt of {n_prompt} tokens, {n_steps} generated, "
            f"finish={finish!r}, text={cut(self.text)})"
        )

    def to_html(self) -> str:
        """Return the page that ``--html`` writes."""
        page: str = ring("tracing.views.page").to_html(self)
        return page

    def to_jsonl(self) -> str:
        """Return the JSON lines that ``--out`` writes, without the hash of the weights."""
        file = ring("tracing.file")
        events = (self.header, *self.steps, self.footer)
        return "".join(file.to_json_line(event) + "\n" for event in events)

    def _repr_html_(self) -> str:
        """Return the page of the trace in a frame, for notebooks."""
        page = html.escape(self.to_html(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" '
            'style="width: 100%; height: 40rem; border: 0"></iframe>'
        )
