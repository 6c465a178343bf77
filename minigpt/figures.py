"""Pictures by matplotlib, which is an extra: checked for before, and written whole."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt.errors import ConfigError
from minigpt.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NO_DATE: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
_RC: dict[Any, Any] = {"svg.hashsalt": "minigpt", "svg.fonttype": "none"}


def require_matplotlib(path: Path, suffixes: Sequence[str], *, what: str = "a picture") -> None:
    """Check that a picture can be written under this name, before anything long begins.

    Args: suffixes, of the formats to choose from; what, the option or thing that is to be written.
    Raises: ConfigError if it is no name of a picture, or of a folder, or matplotlib is missing.
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
            f"{what} needs matplotlib. Install it: pip install 'minigpt[plot]'."
        ) from None


@contextmanager
def our_style() -> Iterator[None]:
    """Draw by matplotlib's own defaults, whatever the user's are: TeX would run what it is told."""
    import matplotlib.style

    with matplotlib.style.context("default", after_reset=True), matplotlib.rc_context(_RC):
        yield


def write_figure(path: Path, figure: "Figure", *, dpi: int = 150) -> None:
    """Write a picture, in the format that its name ends in; the same figure gives the same bytes.

    Args: path, of ``require_matplotlib``.
    Raises: ResourceError.
    """
    format = path.suffix.lower().removeprefix(".")
    picture = BytesIO()
    with warnings.catch_warnings(), our_style():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # of a name
        figure.savefig(picture, format=format, dpi=dpi, metadata=_NO_DATE.get(format, {}))
    write_atomically(path, picture.getvalue())
