"""Measures of a row, and the settings that the analysis ring adds to a trace.

Imports neither torch nor numpy, so that --help can import it.
"""

from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from pkgutil import iter_modules
from typing import Literal

from minigpt.errors import ConfigError
from minigpt.fields import option
from minigpt.rings import ring
from minigpt.tracing.config import GROUP, TraceConfig

Measure = str
"""Name of a measure: weight, the attention weight, or a module of tracing/analysis/measures."""
Reduce = Literal["mean", "max", "rollout"]
"""Reduction of the rows of several heads to one. rollout: attention propagated through the layers
(Abnar & Zuidema 2020, arXiv:2005.00928)."""
Knockout = Literal["key", "value"]
"""Part of a source that a knockout removes. key: masked, so that the softmax renormalizes the other
weights. value: set to 0, with the weights unchanged."""
KNOCKOUTS = {
    "key": "its key is hidden from the query of the token, and the other weights grow to sum to 1",
    "value": "its value is set to 0 for the query of the token, and its weight is kept",
}
"""Descriptions of the knockouts."""

MEASURES = (
    "weight",
    *(m.name for m in iter_modules([str(Path(__file__).parent / "analysis" / "measures")])),
)
"""Names of the installed measures."""
_BOTH = ("both",) if "norm" in MEASURES else ()


@dataclass(frozen=True, kw_only=True)
class MeasureFacts:
    """Properties of a measure: the meaning of its numbers, and the inputs it needs."""

    description: str = ""
    """Description of a number of a row."""
    unit: str = "share"
    """Unit of the numbers of a row. share: the row is divided by its sum."""
    is_signed: bool = False
    """Whether numbers may be negative. Signed rows are summed over heads, others averaged."""
    has_heads: bool = True
    """Whether each head has a row of its own."""
    sums_to: str = ""
    """Description of the total that a row and its parts add up to. Empty if there is none."""
    other_parts: str = "parts from no position"
    """Description of the parts that come from no position."""
    needs_token: bool = False
    """Whether a row depends on the generated token, not only on the forward pass."""
    needs_residual: bool = False
    """Whether it reads the residual stream, besides the weights and values of a pass."""
    is_batched: bool = False
    """Whether its function takes a batch of predictions, and returns a row for each."""
    caveat: str = ""
    """Limit of its interpretation, as a sentence."""


@cache
def facts_of(measure: Measure) -> MeasureFacts:
    """Return the properties of a measure in MEASURES."""
    if measure == "weight":
        return MeasureFacts(
            description="the softmax weight of a source",
            sums_to="1",
            caveat="Attention shows where a head looked, not why a token was generated.",
        )
    facts: MeasureFacts = ring("tracing.analysis.measures").find(measure).facts
    return facts


@dataclass(frozen=True, kw_only=True)
class AnalysisConfig(TraceConfig):
    """Settings of a trace: heads, measures, and further analyses."""

    layers: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Layers to show, as in 0,2,4-6. None for all."""
    heads: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Heads to show, layer.head, as in 4.2,5.*. None for all."""
    reduce: Reduce = option("mean", group=GROUP)
    """Reduction over heads."""
    sink: int | Literal["auto"] = option(0, "[0, inf)", group=GROUP)
    """Position of the sink, or auto to find it."""
    candidates: int = option(0, "[0, inf)", group=GROUP)
    """Number of most probable tokens to show at each step, before any sampling option."""
    prompt_rows: bool = option(False, group=GROUP)
    """Show the prompt's tokens too, from the second on."""
    has_heads: bool = False
    """Whether to keep a summary of each head's row."""
    measure: str = option("weight", choices=(*MEASURES, *_BOTH), group=GROUP)
    """Measure. both: weight and norm."""
    against: str | None = option(None, group=GROUP, metavar="TEXT")
    """Text whose first token's logit is subtracted from the logit of each generated token."""
    n_steps: int = option(50, "[1, 2**16]", group=GROUP, aliases=("--steps",))
    """Number of steps of --measure integrated."""
    roles: bool = option(False, group=GROUP)
    """Find the heads' roles first."""
    lens: bool = option(False, group=GROUP)
    """Show the probability of each token after each layer (logit lens)."""
    n_verified: int | Literal["all"] = option(0, "[0, inf)", group=GROUP, aliases=("--verify",))
    """Number of sources per token to knock out, each with a control; all: every position."""
    verify_layers: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Layers in which to knock out sources."""
    verify_heads: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Heads in which to knock out sources, layer.head."""
    knockout: Knockout = option("key", group=GROUP)
    """Part of a source that a knockout removes."""
    explain: str | None = option(None, group=GROUP, metavar="LIST", shown="none")
    """Heads whose weights the page derives from queries and keys, as in 4.2. None for none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce == "rollout" and self.measure != "weight":
            raise ConfigError(f"--reduce rollout requires --measure weight: it is {self.measure}.")
        if not self.n_verified:
            for name in ("verify_layers", "verify_heads", "knockout"):
                if getattr(self, name) not in (None, "key"):
                    option = "--" + name.replace("_", "-")
                    raise ConfigError(f"{option} has no effect without --n-verified. Add it.")

    @property
    def is_plain(self) -> bool:
        """Whether no setting of the analysis ring differs from its default."""
        added = {f.name: f.default for f in fields(self) if f.name != "n_sources"}
        return all(getattr(self, name) == default for name, default in added.items())

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures of each row, in order."""
        return ("weight", "norm") if self.measure == "both" else (self.measure,)


DEFAULTS = AnalysisConfig()
