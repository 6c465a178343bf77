"""Write figures in matplotlib's default style; matplotlib is an optional extra."""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import ConfigError, install_extra
from minigpt.files import write_atomically
from minigpt.places import require_writable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}


def require_matplotlib(
    path: Path, suffixes: Sequence[str] = (".svg", ".png", ".pdf"), *, what: str = "a picture"
) -> None:
    """Check that a picture can be written to a path, before any long computation.

    Args: suffixes, those of the allowed formats; what, option or file named in error messages.
    Raises: ConfigError if the path has another suffix or is a folder, its folder does not exist, or
        matplotlib is not installed; ResourceError if it cannot be written.
    """
    if path.suffix.lower() not in suffixes:
        choices = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise ConfigError(f"{what} must end in {choices}: it is {str(path)!r}.")
    if not path.parent.is_dir():
        raise ConfigError(f"{what}: there is no folder {str(path.parent)!r}. Make it first.")
    if os.path.isdir(path):
        raise ConfigError(f"{what}: {str(path)!r} is a folder. Choose another name.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{what} needs matplotlib. Install it: {install_extra('plot')}."
        ) from None
    require_writable(path)


def to_bytes(draw: Callable[[], "Figure"], format: str, *, dpi: int = 150) -> bytes:
    """Draw a figure; return its bytes in a format such as ``svg``. Equal figures give equal bytes.

    Args: draw, a function that returns the figure. It is called with matplotlib's defaults, not the
        user's settings: with usetex, names of runs and tokens would run as TeX.
    """
    from matplotlib import style

    picture = BytesIO()
    # Silences the message that a fallback font has no bold face.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    own = {"svg.hashsalt": "minigpt", "svg.fonttype": "none"}
    with warnings.catch_warnings(), style.context(["default", own], after_reset=True):
        # Names and tokens may contain characters that are missing from the font.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        draw().savefig(picture, format=format, dpi=dpi, metadata=_NO_DATE.get(format, {}))
    return picture.getvalue()


def write_figure(path: Path, draw: Callable[[], "Figure"]) -> None:
    """Draw a figure and write it in the format of the path's suffix, or raise ResourceError."""
    write_atomically(path, to_bytes(draw, path.suffix.lower().removeprefix(".")))
