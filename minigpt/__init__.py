"""minigpt trains a small GPT, samples from it, and shows what each generated token attended to."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.generation.api import generate
    from minigpt.tracing.api import trace

__all__ = ["generate", "trace"]

_HOMES = {"generate": "minigpt.generation.api", "trace": "minigpt.tracing.api"}


def __getattr__(name: str) -> Any:
    # Imported when it is first used: torch takes seconds, and --help needs none of it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
