"""Suggest names similar to a misspelled one."""

import difflib
import re
from collections.abc import Iterable

_NEAR = 0.75
_SHORTEST_PART = 3
_MAX_SUGGESTIONS = 3
_SYNONYMS = {
    **{"gpu": "cuda", "metal": "mps", "bf16": "bfloat16", "fp32": "float32"},
    **dict.fromkeys(("char", "chars", "character", "characters"), "bytes"),
}
"""Common names of values, too different in spelling to be found otherwise."""


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "Did you mean ...?" with the choices similar to a name; empty if there are none.

    These are the choices that it abbreviates, as in --temp for --temperature, --max-tokens for
    --max-new-tokens and --steps for --max-steps; if there are none, the choice with the most
    similar spelling, if it is similar enough.
    """
    names = list(dict.fromkeys(choices))
    if (synonym := _SYNONYMS.get(word.lower())) in names:
        return f"Did you mean {synonym}?"
    parts = [part.removesuffix("s") or part for part in _parts(word)]
    near = [name for name in names if _abbreviates(parts, _parts(name))]
    first = [name for name in near if _first_part(name).startswith(parts[0])]
    # Parts other than the first must match fully: --temp does not mean --chat-template.
    whole = [name for name in near if set(parts) <= {p.removesuffix("s") for p in _parts(name)}]
    near = first or whole
    if not near:
        best = max(names, key=lambda name: _similarity(word, name), default="")
        near = [best] if best and _similarity(word, best) >= _NEAR else []
    return f"Did you mean {' or '.join(near)}?" if 0 < len(near) <= _MAX_SUGGESTIONS else ""


def _parts(name: str) -> list[str]:
    return re.split(r"[-_.]", name.strip("-'\"").lower())


def _first_part(name: str) -> str:
    """Return the first part of a name, or the second after ``n`` for a count: --n-verified."""
    parts = _parts(name)
    return parts[1] if parts[0] == "n" and len(parts) > 1 else parts[0]


def _abbreviates(word: list[str], name: list[str]) -> bool:
    """Return whether the parts of a word, not all very short, begin parts of a name, in order."""
    rest = iter(name)
    is_long = max(map(len, word)) >= _SHORTEST_PART
    return is_long and all(any(other.startswith(part) for other in rest) for part in word)


def _similarity(word: str, name: str) -> float:
    """Return the similarity of two names, in [0, 1], without equal parts at their ends."""
    ours, theirs = _parts(word), _parts(name)
    for end in (0, -1):
        while len(ours) > 1 and len(theirs) > 1 and ours[end] == theirs[end]:
            ours.pop(end)
            theirs.pop(end)
    one, other = "-".join(ours), "-".join(theirs)
    if len(one) == len(other) > 2 and sum(map(str.__ne__, one, other)) == 1:
        return 1.0  # a single letter differs
    return difflib.SequenceMatcher(None, one, other).ratio()
