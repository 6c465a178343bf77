"""Whole traces, and what the analysis adds to the records of ``tracing/events.py``.

Shapes: L layers, H query heads, T positions, D head dim, K sources kept per row.
"""

import html
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import cut
from minigpt.rings import ring
from minigpt.text.escape import JoinedTokens
from minigpt.tracing.events import Candidate, Source, Token, TraceFooter, TraceHeader, TraceStep


@dataclass(frozen=True)
class Alternative:
    """A token whose logit is subtracted from that of each generated token."""

    text: str
    """Text that was given."""
    id: int
    """Id of its first token."""
    data: bytes
    """Bytes of its first token."""
    n_tokens: int
    """Number of tokens of the text. Only the first is compared."""


@dataclass(frozen=True)
class Effect:
    """The effect of knocking out one source on the probability of the generated token."""

    source: Source
    change: float
    """Change of ln p(token) without the source, in nats. Negative: the source raised p."""
    control_of: int | None = None
    """Index of the source that a control belongs to. None for a source."""


@dataclass(frozen=True)
class Kept:
    """The prediction of a token from its sources and the sink alone: all else is knocked out."""

    change: float
    """Change of ln p(token), in nats: exp(change) of p remains."""
    logit_change: float
    """Change of the token's logit."""


@dataclass(frozen=True)
class Lens:
    """What the model would predict after each layer: the logit lens (nostalgebraist 2020)."""

    layer: int | None
    """Layer from which the token is the first choice. None if it is not after the last one."""
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
    """Fractions of a head's attention, in [0, 1], that each known kind of head would pay.

    Source: Olsson et al. 2022, arXiv:2209.11895; Wang et al. 2022, arXiv:2211.00593.
    """

    previous: float
    """Attention on the previous token."""
    duplicate: float
    """Attention on the previous occurrence of the same token."""
    induction: float
    """Attention on the token after the previous occurrence."""
    sink: float
    """Attention on position 0."""
    local: float
    """Attention on the last few tokens, including itself."""
    tag: str
    """Main role, abbreviated to at most five letters. Empty for none."""


ROLE_SCORES = tuple(f.name for f in fields(Roles) if f.name != "tag")
"""Names of the scores of a head's roles."""


@dataclass(frozen=True)
class CauseCheck:
    """Whether sources with more attention have larger effects, over all knockouts of a trace."""

    n_sources: int
    n_controls: int
    mean_effect: float
    """Mean |change| of the sources, in nats."""
    mean_control_effect: float
    """Mean |change| of the controls, in nats."""
    rank_correlation: float | None
    """Spearman correlation of weight and |change|. None if there are too few values."""


@dataclass(frozen=True, eq=False)
class HeadWorking:
    """What the weights of a head are computed from, over all positions T of a text.

    The weights of position t are softmax(queries_TD[t] . keys_TD[j] * scale) over the positions j
    in its view, and its output is the sum of the values times them.
    """

    layer: int
    head: int
    scale: float
    """Factor of the products of queries and keys."""
    window: int
    """Number of positions that a query attends to, up to its own. 0 for all."""
    queries_TD: NDArray[np.float32]
    """Queries as they meet the keys: rotated and normalized, if the model does that."""
    keys_TD: NDArray[np.float32]
    values_TD: NDArray[np.float32]


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
    def of(cls, facts: Mapping[str, NDArray[Any]], n_layer: int) -> "HeadRows":
        """Return the summaries in ``RowReader.facts`` of the rows after the first."""
        rows = {f.name: facts[f.name][1:] for f in fields(cls)}
        shape = n_layer, len(rows["sink"]) // n_layer
        return cls(**{name: x.reshape(*shape, *x.shape[1:]) for name, x in rows.items()})


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """A complete trace."""

    header: TraceHeader
    steps: tuple[TraceStep, ...]
    footer: TraceFooter

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Tokens of the prompt and generated tokens."""
        n_prompt = len(self.header.prompt)
        generated = (step.token for step in self.steps if step.token.position >= n_prompt)
        return (*self.header.prompt, *generated)

    @property
    def has_prompt_rows(self) -> bool:
        """Whether tokens of the prompt have rows too."""
        return bool(self.steps) and self.steps[0].token.position < len(self.header.prompt)

    @cached_property
    def joined(self) -> JoinedTokens:
        """Texts of the tokens, escaped, with characters joined that tokens split."""
        return JoinedTokens(token.data for token in self.tokens)

    @property
    def text(self) -> str:
        """Generated text."""
        return "".join(step.text for step in self.steps)

    def __repr__(self) -> str:
        """Return the model, the numbers of tokens and the text, cut to a line."""
        n_prompt, n_steps = len(self.header.prompt), self.footer.n_tokens
        finish = self.footer.finish or "interrupted"
        return (
            f"Trace(model={self.header.model!r}, prompt of {n_prompt} tokens, {n_steps} generated, "
            f"finish={finish!r}, text={cut(self.text)})"
        )

    def _repr_html_(self) -> str:
        """Return the page of the trace in a frame, for notebooks."""
        page = html.escape(ring("tracing.views.page").to_html(self), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" '
            'style="width: 100%; height: 40rem; border: 0"></iframe>'
        )
