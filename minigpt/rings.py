"""Look up rings: parts of the package that the core works without."""

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


def ring(module: str) -> Any:
    """Import a module of a ring by its name below ``minigpt``, as in ``"generation.fast"``.

    The core never imports a ring with an import statement, so that a ring can be deleted.

    Raises: ModuleNotFoundError if that ring is not installed.
    """
    return import_module(f"minigpt.{module}")


def find_ring(module: str) -> Any:
    """Import a module of a ring; None if it, or a ring that it needs, is not installed."""
    try:
        return ring(module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("minigpt"):
            return None
        raise  # a library that the ring needs


def has_ring(module: str) -> bool:
    """Return whether this installation has a ring, without importing it or the package above it."""
    name = f"minigpt.{module}"
    above = sys.modules.get(name.rpartition(".")[0])
    folder = Path(__file__).parent.joinpath(*module.split(".")[:-1])
    return PathFinder.find_spec(name, above.__path__ if above else [str(folder)]) is not None


def load_class(entry: str) -> Any:
    """Import the class that a registry names as ``"module:Class"`` below ``minigpt``.

    Raises: ModuleNotFoundError if it is in a ring that is not installed.
    """
    module, _, name = entry.partition(":")
    return getattr(ring(module), name)
