"""Settings of a trace; imports neither torch nor numpy, so that --help may import it."""

from dataclasses import dataclass

from minigpt.config import SamplingConfig
from minigpt.fields import Checked, option
from minigpt.rings import find_ring

N_SOURCES = 8
"""Number of sources kept per token, unless another is asked for."""
GROUP = "Attention"
"""Heading of the options in --help."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig(Checked):
    """What a trace shows of the attention, which is the mean over all heads."""

    n_sources: int | None = option(
        None,
        "[0, inf)",
        group=GROUP,
        shown=f"what fits; files {N_SOURCES}",
        aliases=("--sources",),
    )
    """Number of sources to show per token. None for N_SOURCES."""

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing that an analysis adds."""
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of each row, in order."""
        return ("weight",)


def config_class() -> type[TraceConfig]:
    """Return the settings of this installation: those of the analysis too, if it has that ring."""
    ring = find_ring("tracing.analysis_config")
    return ring.AnalysisConfig if ring else TraceConfig


SAMPLING = SamplingConfig(max_new_tokens=40)
"""Sampling of a trace by default: fewer tokens than ``generate``, so that a trace fits a screen."""
