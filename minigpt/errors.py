"""Exceptions of minigpt, each with its exit code on the command line.

A message says in one line what is wrong, the value, and the remedy.
"""

from collections.abc import Iterable
from typing import ClassVar

from minigpt.rings import find_ring

DISTRIBUTION = "minigpt-attention"
"""Name of the distribution on PyPI, where ``minigpt`` is an unrelated package."""


class MinigptError(Exception):
    """Base of all errors that are not bugs of minigpt."""

    exit_code: ClassVar[int] = 1


class ConfigError(MinigptError):
    """A setting is unknown, out of range or contradicts another; exit code 2."""

    exit_code = 2


class DataError(MinigptError):
    """A corpus or prompt is missing, empty, binary, too short or not available; exit code 3."""

    exit_code = 3


class CheckpointError(MinigptError):
    """A model folder is missing, incomplete, damaged or not supported; exit code 4."""

    exit_code = 4


class DivergedError(MinigptError):
    """The loss or a gradient became NaN or inf, or training diverged; exit code 5."""

    exit_code = 5


class ResourceError(MinigptError):
    """Not enough disk space or memory, or no permission; exit code 6."""

    exit_code = 6


class LockedError(MinigptError):
    """Another process is writing to the same run folder; exit code 7."""

    exit_code = 7


class MinigptWarning(UserWarning):
    """Something not explicitly requested could not be done, and the work continues without it."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the remedy for a misspelled name: similar choices, or all if none is similar."""
    names = list(choices)
    return did_you_mean(word, names) or f"Choose from {', '.join(names)}."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "Did you mean ...?" with the choices similar to a name; empty if there are none."""
    suggestions = find_ring("suggestions")
    return str(suggestions.did_you_mean(word, choices)) if suggestions else ""


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest choice, if a value is not one of the choices."""
    names = list(choices)
    if value not in names:
        raise ConfigError(f"unknown {name} {cut(value)}. {nearest(str(value)[:80], names)}")


def cut(value: object, most: int = 80) -> str:
    """Return the repr of a value for an error message, with the middle of a long one left out."""
    text = " ".join(line.strip() for line in repr(value).splitlines())  # an array has several
    return text if len(text) <= most else f"{text[: most - 23]}...{text[-20:]}"


def install_extra(extra: str) -> str:
    """Return the command that installs an optional dependency, for the remedy of a message."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
