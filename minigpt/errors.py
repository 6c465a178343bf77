"""Exceptions of minigpt, each with its exit code on the command line.

A message says in one line what is wrong, the value, and the remedy.
"""

import difflib
import re
from collections.abc import Iterable
from typing import ClassVar

DISTRIBUTION = "minigpt-attention"
"""Name of the distribution on PyPI, where minigpt is another program."""


_NEAR = 0.75
_SHORTEST_PART = 3
_MAX_SUGGESTIONS = 3


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
    """Another process writes to the same run folder; exit code 7."""

    exit_code = 7


class MinigptWarning(UserWarning):
    """Something that was not asked for could not be done, and the work continues without it."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return the remedy for a misspelled name: what it may have meant, or all choices."""
    names = list(choices)
    return did_you_mean(word, names) or f"Choose from {', '.join(names)}."


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a question that names the choices near a misspelled name; empty if none is near.

    Near are the names that it abbreviates, as --temp does --temperature, --max-tokens does
    --max-new-tokens and --steps does --max-steps; else the one that has the fewest other letters,
    if these are few.
    """
    names = list(choices)
    parts = [part.removesuffix("s") or part for part in _parts(word)]
    near = [name for name in names if _abbreviates(parts, _parts(name))]
    first = [name for name in near if _begin(name).startswith(parts[0])]
    # Without the first part of a name, only whole parts count: --temp is no --chat-template.
    whole = [name for name in near if set(parts) <= {p.removesuffix("s") for p in _parts(name)}]
    near = first or whole
    if not near:
        best = max(names, key=lambda name: _likeness(word, name), default="")
        near = [best] if best and _likeness(word, best) >= _NEAR else []
    return f"Did you mean {' or '.join(near)}?" if 0 < len(near) <= _MAX_SUGGESTIONS else ""


def _parts(name: str) -> list[str]:
    return re.split(r"[-_.]", name.strip("-'\"").lower())


def _begin(name: str) -> str:
    """Return the first part of a name that is not only a count, as in --n-verified."""
    parts = _parts(name)
    return parts[1] if parts[0] == "n" and len(parts) > 1 else parts[0]


def _abbreviates(word: list[str], name: list[str]) -> bool:
    """Return whether the parts of a word begin parts of a name, in order; all of it are letters."""
    rest = iter(name)
    is_long = max(map(len, word)) >= _SHORTEST_PART
    return is_long and all(any(other.startswith(part) for other in rest) for part in word)


def _likeness(word: str, name: str) -> float:
    """Return the share of letters that two names have in common, without parts that both have."""
    ours, theirs = _parts(word), _parts(name)
    for end in (0, -1):
        while len(ours) > 1 and len(theirs) > 1 and ours[end] == theirs[end]:
            ours.pop(end), theirs.pop(end)
    one, other = "-".join(ours), "-".join(theirs)
    if len(one) == len(other) > 2 and sum(map(str.__ne__, one, other)) == 1:
        return 1.0  # one letter for another
    return difflib.SequenceMatcher(None, one, other).ratio()


def require_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Raise ConfigError, with the nearest choice, if a value is not one of the choices."""
    names = list(choices)
    if value not in names:
        raise ConfigError(f"unknown {name} {cut(value)}. {nearest(str(value)[:80], names)}")


def cut(value: object, most: int = 80) -> str:
    """Return the repr of a value of a file or a command, with its middle left out if it is long."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 23]}...{text[-20:]}"


def install_extra(extra: str) -> str:
    """Return the command that installs an optional dependency, for the remedy of a message."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
