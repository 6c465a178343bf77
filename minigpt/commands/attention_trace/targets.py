"""Options of attention-trace for stdout and the files to write."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from minigpt.fields import Checked, option
from minigpt.rings import has_ring, ring

LINES = "lines"
_VIEWS = (LINES, *(ring("tracing.views").terminal_views() if has_ring("tracing.views") else ()))
_FILES = "Files"


@dataclass(frozen=True, kw_only=True)
class Targets(Checked):
    """What stdout shows of a trace, and the files to write."""

    view: str | None = option(None, choices=_VIEWS, group="Output", shown=LINES)
    """View. None for lines, or for nothing if a replay writes a file."""
    position: int | None = option(None, group="Output", shown="the last")
    """Position of the token whose row --view text or --picture strip shows."""
    as_json: bool = option(False, group="Output", name="json")
    """Print JSON, one object per line."""
    out: Path | None = option(None, group=_FILES)
    """Write the trace as JSON lines."""
    dense: Path | None = option(None, group=_FILES)
    """Write the full rows of all heads as safetensors, or with --replay, read them."""
    html: Path | None = option(None, group=_FILES)
    """Write an interactive page for a browser."""
    svg: Path | None = option(None, group=_FILES)
    """Write a picture as SVG."""
    png: Path | None = option(None, group=_FILES)
    """Write a picture as PNG."""
    picture: Literal["matrix", "strip"] = option("matrix", group=_FILES)
    """Picture."""

    @property
    def are_lines(self) -> bool:
        """Whether stdout shows only the lines of the rows, and no file is written."""
        is_other = self.as_json or self.view not in (None, LINES)
        return not (is_other or self.out or self.dense or self.drawings)

    @property
    def drawings(self) -> list[Path]:
        """The page and pictures to write."""
        return [path for path in (self.html, self.svg, self.png) if path is not None]

    @property
    def has_heads(self) -> bool:
        """Whether a summary of each head's row is needed."""
        return self.out is not None or self.html is not None or self.view == "heads"
