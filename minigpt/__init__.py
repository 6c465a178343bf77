"""minigpt trains a small GPT, samples from it, and shows what each generated token attended to."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minigpt.generation.api import generate

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    # Imported when it is first used: torch takes seconds, and --help needs none of it.
    if name == "generate":
        from minigpt.generation.api import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
