"""Settings of a trace; imports neither torch nor numpy, so that --help can import it."""

from dataclasses import dataclass

from minigpt.config import SamplingConfig
from minigpt.fields import Checked, option
from minigpt.rings import find_ring

N_SOURCES = 8
"""Default number of sources kept per token."""
DIGITS = 6
"""Decimal places of numbers in a trace file. Views round to them first, so that a replay shows the
same text."""
GROUP = "Attention"
"""Heading of the options in --help."""


@dataclass(frozen=True, kw_only=True)
class TraceConfig(Checked):
    """Settings of a trace of attention weights, averaged over all heads."""

    n_sources: int | None = option(
        None,
        "[0, inf)",
        group=GROUP,
        shown=f"what fits; files {N_SOURCES}",
        aliases=("--sources",),
    )
    """Number of sources to show per token. None for N_SOURCES."""

    @property
    def n_kept(self) -> int:
        """Number of sources to keep per token."""
        return N_SOURCES if self.n_sources is None else self.n_sources

    @property
    def is_plain(self) -> bool:
        """Whether no setting of the analysis ring differs from its default."""
        return True

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures of each row, in order."""
        return ("weight",)


def has_prompt_rows(config: TraceConfig, sampling: SamplingConfig) -> bool:
    """Return whether tokens of the prompt have rows too: on request, or if none are generated."""
    return getattr(config, "prompt_rows", False) or sampling.max_new_tokens == 0


def config_class() -> type[TraceConfig]:
    """Return AnalysisConfig if the analysis ring is installed, else TraceConfig."""
    ring = find_ring("tracing.analysis_config")
    return ring.AnalysisConfig if ring else TraceConfig


SAMPLING = SamplingConfig(max_new_tokens=40)
"""Default sampling of a trace: fewer tokens than ``generate``, so that a trace fits a screen."""
