"""Measures of a row other than the attention weight; ``--measure NAME`` finds them by name.

A measure is a function that is registered in a module of the same name:

    @register(unit="logits", is_signed=True, needs_residual=True, needs_token=True)
    def logit(model: LanguageModel, config: AnalysisConfig) -> Rows

It is called once per trace, and returns a function from a prediction to rows: of every head
(L, H, S), or one row (S,) if the measure has no heads; or ``Measured``, which adds the other parts
of the sum. If the measure does not need the token, this function is called after every forward
pass, in order. With ``is_batched``, it gets a list of predictions and returns a list of results.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from minigpt.model.attention import AttentionPass
from minigpt.model.language_model import LanguageModel
from minigpt.rings import ring
from minigpt.tracing.analysis_config import AnalysisConfig, Measure, MeasureFacts


@dataclass(frozen=True)
class Prediction:
    """Input of a measure: a forward pass and the token that was sampled after it."""

    attention: AttentionPass
    tokens: Sequence[int] = ()
    """Ids of the tokens in view. Empty for a measure that does not need the token."""
    target: int = -1
    """Id of the generated token. -1 for a measure that does not need it."""
    against: int | None = None
    """Id of the alternative whose logit is subtracted. None for none."""

    @property
    def residual_NC(self) -> Tensor:
        """Residual stream of the first sequence at the last position, as in AttentionPass."""
        residual_NBC = self.attention.residual_NBC
        assert residual_NBC is not None
        return residual_NBC[:, 0]


@dataclass(frozen=True)
class Measured:
    """Rows by a measure, with the other parts of their sum."""

    rows: Tensor
    """Rows of every head (L, H, S), or one row (S,), float32."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """Contributions from no position, each of shape ()."""
    whole: Tensor | None = None
    """Sum of the rows of all heads and the parts, of shape ()."""


Rows = (
    Callable[[Prediction], Tensor | Measured] | Callable[[Sequence[Prediction]], Sequence[Measured]]
)
Make = Callable[[LanguageModel, AnalysisConfig], Rows]


class Registered(NamedTuple):
    """A measure: its properties, and the function that prepares it for a model."""

    facts: MeasureFacts
    make: Make


_REGISTRY: dict[Measure, Registered] = {}


def register(**facts: Any) -> Callable[[Make], Make]:
    """Return a decorator that registers a function as the measure of the same name.

    Args: facts, fields of MeasureFacts.
    """

    def declare(make: Make) -> Make:
        _REGISTRY[make.__name__] = Registered(MeasureFacts(**facts), make)
        return make

    return declare


def find(measure: Measure) -> Registered:
    """Return the measure of a module in this folder.

    Raises: ConfigError if there is no such module.
    """
    ring(f"tracing.analysis.measures.{measure}")
    return _REGISTRY[measure]
