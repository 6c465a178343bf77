"""Settings of a trace; imports neither torch nor numpy, so that --help may import it."""

from dataclasses import dataclass
from typing import Literal

from minigpt.config import SamplingConfig
from minigpt.fields import check_fields, option
from minigpt.rings import find_ring

N_SOURCES = 8
"""Number of sources kept per token, unless another is asked for."""
GROUP = "Attention"
"""Heading of the options in --help."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig:
    """Which attention a trace shows."""

    layers: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Layers to show, as in 0,2,4-6. None for all."""
    heads: str | None = option(None, group=GROUP, metavar="LIST", shown="all")
    """Heads to show, layer.head, as in 4.2,5.*. None for all."""
    reduce: Literal["mean", "max"] = option("mean", group=GROUP)
    """Reduction over heads."""
    n_sources: int | None = option(
        None,
        "[0, inf)",
        group=GROUP,
        shown=f"what fits; files {N_SOURCES}",
        aliases=("--sources",),
    )
    """Number of sources to show per token. None for N_SOURCES."""
    sink: int = option(0, "[0, inf)", group=GROUP)
    """Position of the sink."""
    candidates: int = option(0, "[0, inf)", group=GROUP)
    """Number of most probable tokens to show at each step, before any sampling option."""
    prompt_rows: bool = option(False, group=GROUP)
    """Show the tokens of the prompt too, from the second one on."""
    has_heads: bool = False
    """Whether to keep a summary of each head's row."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def is_plain(self) -> bool:
        """Whether the trace has rows of attention weights, and nothing that an analysis adds."""
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of each row, in order."""
        return ("weight",)


def config_class() -> type[TraceConfig]:
    """Return the settings of this installation: those of the analysis too, if it has that ring."""
    ring = find_ring("tracing.analysis_config")
    return ring.AnalysisConfig if ring else TraceConfig


DEFAULTS = TraceConfig()
SAMPLING = SamplingConfig(max_new_tokens=40)
"""Sampling of a trace by default: fewer tokens than ``generate``, so that a trace fits a screen."""
