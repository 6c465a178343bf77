"""Where a trace goes, as options of attention-trace."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minigpt.commands.options import NOT_COMPILED, Mode, PromptForm
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.fields import check_fields, option
from minigpt.files import require_writable
from minigpt.rings import has_ring, ring

LINES = "lines"
_VIEWS = (LINES, *(ring("tracing.views").terminal_views() if has_ring("tracing.views") else ()))
_PICTURES = ("svg", "png")
_FILES = "Files"
_PICTURE_NEEDS = {
    "--picture": ("--svg", "--png"),
    "--position": ("--view text", "--picture strip"),
}
_EXPLAINING = ("logit", "gradient", "integrated")  # measures of the generated token, in logits
_SAMPLING = tuple(  # options of sampled tokens
    f"--{f.name.replace('_', '-')}"
    for f in fields(SamplingConfig)
    if f.name not in ("max_new_tokens", "force")
)
_DRAWN = ("--json", "--out", "--html")

LIVE = Mode(
    needs={
        **PromptForm.NEEDS,
        **dict.fromkeys(("--knockout", "--verify-layers", "--verify-heads"), ("--n-verified",)),
        "--n-verified": ("--view lines", *_DRAWN),
        "--n-sources": ("--view lines", *_DRAWN),
        "--explain": ("--html", "--out", "--json"),
        "--candidates": ("--view lines", "--view text", *_DRAWN),
        "--lens": ("--view lines", "--view lens", *_DRAWN),
        "--against": tuple(f"--measure {measure}" for measure in _EXPLAINING),
        "--n-steps": ("--measure integrated",),
        "--roles": ("--view lines", "--view heads", *_DRAWN),
        **dict.fromkeys(
            ("--layers", "--heads", "--reduce"),
            ("--view other than heads", "--svg", "--png", *_DRAWN),
        ),
        **_PICTURE_NEEDS,
    },
    refuses={
        "--json": ("--view",),
        **dict.fromkeys((f"--measure {m}" for m in _EXPLAINING), ("--reduce",)),
        "--max-new-tokens 0": _SAMPLING,
        **PromptForm.REFUSES,
        **NOT_COMPILED,
    },
    defaults={"--view": LINES},
)
REPLAY = Mode(
    "--replay",
    takes=(
        *("--view", "--position", "--n-sources", "--json"),
        *("--html", "--svg", "--png", "--picture"),
        *("--dense", "--layers", "--heads", "--reduce"),
    ),
    why="It shows a file that --out wrote: there is no model and no prompt to continue.",
    needs={
        "--n-sources": ("--view lines",),
        **dict.fromkeys(("--layers", "--heads", "--reduce"), ("--dense",)),
        **_PICTURE_NEEDS,
    },
    refuses={"--json": ("--view", "--n-sources")},
    defaults={"--view": LINES},
)
DIFF = Mode(
    "--diff",
    takes=("--json",),
    why="It compares two files that --out wrote: there is no model and no prompt to continue.",
)
"""The ways to call the command, and the options of each."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What stdout shows of a trace, and the files that it is written to."""

    view: str | None = option(None, choices=_VIEWS, group="Output", shown=LINES)
    """View. None for lines, or for nothing if a replay writes a file."""
    position: int | None = option(None, group="Output", shown="the last")
    """Generated token whose sources the view text or the picture strip shows."""
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

    def __post_init__(self) -> None:
        check_fields(self)

    def check(self, n_samples: int, replayed: Path | None = None) -> None:
        """Check the files before anything long begins.

        Args: replayed, the file that is shown, which must not be replaced.
        Raises: ConfigError for a file without a folder, a picture without matplotlib, one file
            for several traces, or several options that name one file; ResourceError for a file
            that cannot be written.
        """
        options: dict[str, str] = {}
        if replayed is not None:
            options[os.path.realpath(replayed)] = "--replay"
        for name in ("dense", "out", "html", *_PICTURES):
            path: Path | None = getattr(self, name)
            if path is None:
                continue
            if name != "out" and n_samples > 1:
                raise ConfigError(
                    f"--{name} shows one trace, and there are {n_samples}. Leave --num-samples out."
                )
            if name == "dense" and replayed is not None:  # it is read
                options[os.path.realpath(path)] = "--dense"
                continue
            other = options.setdefault(os.path.realpath(path), f"--{name}")
            if other != f"--{name}":
                raise ConfigError(f"{other} and --{name} name the same file {str(path)!r}.")
            if not path.parent.is_dir():
                raise ConfigError(
                    f"--{name}: there is no folder {str(path.parent)!r}. Make it first."
                )
            if name == "out" and self.is_stdout:
                if self.view is not None or self.as_json:
                    other = "--json" if self.as_json else "--view"
                    raise ConfigError(
                        f"--out {str(path)!r} is standard output, which {other} takes too. Leave "
                        "one of them out."
                    )
                continue
            if path.is_dir() or (name != "out" and path.exists() and not path.is_file()):
                # These files are written aside and renamed, which would replace a device.
                raise ConfigError(f"--{name}: {str(path)!r} is not a file. Choose another name.")
            if name in _PICTURES:
                ring("figures").require_matplotlib(path)
            require_writable(path)

    @property
    def is_stdout(self) -> bool:
        """Whether --out is standard output, as /dev/stdout."""
        try:
            return self.out is not None and os.path.samestat(os.stat(self.out), os.fstat(1))
        except OSError:
            return False

    @property
    def files(self) -> list[Path]:
        """Files of a view: the page and the pictures."""
        return [path for path in (self.html, self.svg, self.png) if path is not None]

    @property
    def has_heads(self) -> bool:
        """Whether a summary of each head's row is needed."""
        return self.out is not None or self.html is not None or self.view == "heads"
