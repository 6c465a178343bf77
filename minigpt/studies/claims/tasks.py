"""Made-up tasks whose answers stand at a known distance: associative recall, and copying.

A sequence is fillers, then what is to be kept in mind, then fillers, and then what asks for it.
Every symbol, filler and place is drawn, so that nothing but what stands at the source answers. A
distance is counted from the source to the position that answers; a batch may have one for each
sequence, so that where a sequence ends tells nothing of where its source is.

Shapes: B sequences, T positions, N things to be kept in mind.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

N_KEYS = 8
N_VALUES = 16
N_FILLERS = 4
N_PAIRS = 4
"""Pairs of a recall; their values are what a guess that saw the sequence has to pick from."""
N_COPIED = 8
"""Symbols of a copy."""
N_ASKED = 16
"""Keys that a recall asks for; only the first one's source is at the distance asked for."""
FIRST_KEY = N_KEYS * N_VALUES
"""Below are the pairs: a pair of a key and a value is one token, N_VALUES key + value."""
FIRST_VALUE = FIRST_KEY + N_KEYS
_FIRST_FILLER = FIRST_VALUE + N_VALUES
_MARK = _FIRST_FILLER + N_FILLERS
VOCAB_SIZE = _MARK + 1


@dataclass(frozen=True)
class Batch:
    """Sequences, and where which answers are due."""

    tokens_BT: Tensor
    """Token ids."""
    targets_BT: Tensor
    """The answer that is due after a position; -100 where none is."""
    query_B: Tensor
    """The position that is the first to answer."""
    source_B: Tensor
    """Where what answers that stands."""
    other_B: Tensor
    """Where something of the same kind stands, next to the source."""


@dataclass(frozen=True)
class Task:
    """A task, and what blind guesses get right in it."""

    name: str
    draw: Callable[[Tensor, torch.Generator], Batch]
    """Make a sequence for each distance (B,), of their greatest one's length, on the CPU."""
    least_distance: int
    """The nearest that a source can be, wherever in the sequence's pairs or string it is."""
    n_asked: int
    """The last positions, from the query on, among which answers are due."""
    n_exact: int
    """Of those, from the query on, the ones that are at the distance that was asked for."""
    chance: float
    """Share right of a guess among all answers that there are."""
    informed_chance: float
    """Share right of a guess among those that the sequence has."""


def recall(distance_B: Tensor, generator: torch.Generator) -> Batch:
    """Draw pairs of a key and a value; then keys, each to be answered by its pair's value.

    The first key asks at its sequence's distance; those after it are more to learn from. Keys of
    a sequence's pairs differ; values are drawn by themselves. A pair is one token, so that to
    answer is one look back: with two, small Transformers take ten times as long to learn it.

    Source: associative recall, Graves et al. 2014, arXiv:1410.5401, section 4.3; several queries:
        Arora et al. 2023, arXiv:2312.04927.
    """
    n_batch = len(distance_B)
    keys_BN = _distinct(n_batch, N_PAIRS, N_KEYS, generator)
    values_BN = torch.randint(N_VALUES, (n_batch, N_PAIRS), generator=generator)
    # Drawn one by one: were each key asked for once, it would help to know what was said already.
    order_BN = torch.randint(N_PAIRS, (n_batch, N_ASKED), generator=generator)
    query = int(distance_B.max()) + N_PAIRS
    tokens_BT = _fillers(n_batch, query + 2 * N_ASKED, generator)
    source_B = query - distance_B
    first_B = source_B - order_BN[:, 0]
    pairs_BN = N_VALUES * keys_BN + values_BN
    tokens_BT.scatter_(1, first_B[:, None] + torch.arange(N_PAIRS), pairs_BN)
    asked_BN = FIRST_KEY + keys_BN.gather(1, order_BN)
    due_BN = FIRST_VALUE + values_BN.gather(1, order_BN)
    tokens_BT[:, query:] = torch.stack((asked_BN, due_BN), dim=2).flatten(1)
    targets_BT = torch.full_like(tokens_BT, -100)
    targets_BT[:, query::2] = due_BN
    other_B = torch.where(order_BN[:, 0] == 0, source_B + 1, source_B - 1)
    return Batch(tokens_BT, targets_BT, torch.full_like(source_B, query), source_B, other_B)


def copy(distance_B: Tensor, generator: torch.Generator) -> Batch:
    """Draw a string; then a mark, after which the string is to be said again.

    Each symbol is as far from its source as the first. Those of a string differ.

    Source: Graves et al. 2014, arXiv:1410.5401, section 4.1, with a delay.
    """
    n_batch = len(distance_B)
    string_BN = FIRST_VALUE + _distinct(n_batch, N_COPIED, N_VALUES, generator)
    query = int(distance_B.max()) + N_COPIED
    tokens_BT = _fillers(n_batch, query + N_COPIED, generator)
    source_B = query - distance_B
    tokens_BT.scatter_(1, source_B[:, None] + torch.arange(N_COPIED), string_BN)
    tokens_BT[:, query] = _MARK
    tokens_BT[:, query + 1 :] = string_BN[:, :-1]
    targets_BT = torch.full_like(tokens_BT, -100)
    targets_BT[:, query:] = string_BN
    return Batch(tokens_BT, targets_BT, torch.full_like(source_B, query), source_B, source_B + 1)


RECALL = Task(
    "recall",
    recall,
    least_distance=8,
    n_asked=2 * N_ASKED,
    n_exact=1,
    chance=1 / N_VALUES,
    informed_chance=1 / N_PAIRS,
)
COPY = Task(
    "copy",
    copy,
    least_distance=N_COPIED,
    n_asked=N_COPIED,
    n_exact=N_COPIED,
    chance=1 / N_VALUES,
    informed_chance=1 / N_COPIED,
)
TASKS: Mapping[str, Task] = {task.name: task for task in (RECALL, COPY)}
MOST_ASKED = max(task.n_asked for task in TASKS.values())
"""Sequences are at most twice as many positions longer than their greatest distance."""


def _distinct(n_batch: int, n: int, n_choices: int, generator: torch.Generator) -> Tensor:
    """Return n different numbers below n_choices for each sequence, in any order."""
    return torch.rand(n_batch, n_choices, generator=generator).argsort(dim=1)[:, :n]


def _fillers(n_batch: int, length: int, generator: torch.Generator) -> Tensor:
    return _FIRST_FILLER + torch.randint(N_FILLERS, (n_batch, length), generator=generator)
