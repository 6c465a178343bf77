"""Values of hostile or damaged JSON files, and the places in a document to put them."""

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    5,
    2**31,
    2**63,
    10**400,
    -(10**400),
    0.5,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    "5",
    "NaN",
    "x" * 200_000,
    "\x1b[2J\u202e<script>",
    "\ud800",
    [],
    [[]],
    [None] * 3,
    {},
    {"a": 1},
    "*" * 50,
    "0-999999999",
]
REMOVED = object()
"""Marks that the key of the value is removed."""


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the place of every value in a document."""
    yield at
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value[:3]):
            yield from places(item, (*at, key))


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a document with another value at one place."""
    if not place:
        return {} if value is REMOVED else value
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document


values = st.one_of(
    st.sampled_from([*VALUES, REMOVED]),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), st.lists, max_leaves=5),
)
"""Hostile values, and REMOVED."""
