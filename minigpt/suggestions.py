"""What a misspelled name may have meant."""

import difflib
import re
from collections.abc import Iterable

_NEAR = 0.75
_SHORTEST_PART = 3
_MAX_SUGGESTIONS = 3
_SYNONYMS = {"gpu": "cuda", "metal": "mps", "bf16": "bfloat16", "fp32": "float32"}
"""Common names of a value that has few of its letters."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return a question that names the choices near a misspelled name; empty if none is near.

    Near are the names that it abbreviates, as --temp does --temperature, --max-tokens does
    --max-new-tokens and --steps does --max-steps; else the one that has the fewest other letters,
    if these are few.
    """
    names = list(choices)
    if (synonym := _SYNONYMS.get(word.lower())) in names:
        return f"Did you mean {synonym}?"
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
