"""minigpt trains a small GPT, samples from it, and shows what each generated token attended to."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.commands.python_api import evaluate, train
    from minigpt.generation.api import generate, load
    from minigpt.tracing.api import trace

    __version__: str

__all__ = ["__version__", "evaluate", "generate", "load", "trace", "train"]

_HOMES = {
    "evaluate": "minigpt.commands.python_api",
    "generate": "minigpt.generation.api",
    "load": "minigpt.generation.api",
    "trace": "minigpt.tracing.api",
    "train": "minigpt.commands.python_api",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: importing torch takes seconds, and --help does not need it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        from minigpt.errors import DISTRIBUTION

        try:
            return version(DISTRIBUTION)
        except PackageNotFoundError:  # run from the source tree
            return "0+source"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # with Tab, a shell completes names not yet imported
