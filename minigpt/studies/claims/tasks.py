"""Synthetic tasks whose answers have a source at a known distance: associative recall and copying.

A sequence is fillers, then the content to remember, then fillers, then the query. Symbols, fillers
and places are random, so only the source predicts the answer. A distance is counted from the source
to the position that answers. Sequences of a batch may have different distances, so the length of a
sequence does not reveal where its source is.

Shapes: B sequences, T positions, N items to remember.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

N_KEYS = 8
N_VALUES = 16
N_FILLERS = 4
N_PAIRS = 4
"""Pairs in a recall sequence."""
N_COPIED = 8
"""Symbols in a copied string."""
N_ASKED = 16
"""Keys that a recall asks for; only the first has its source at the given distance."""
FIRST_KEY = N_KEYS * N_VALUES
"""First token id of the keys. Smaller ids are pairs, N_VALUES * key + value."""
FIRST_VALUE = FIRST_KEY + N_KEYS
"""First token id of the values."""
_FIRST_FILLER = FIRST_VALUE + N_VALUES
_MARK = _FIRST_FILLER + N_FILLERS
VOCAB_SIZE = _MARK + 1


@dataclass(frozen=True)
class TaskBatch:
    """Sequences of a task and their answers."""

    tokens_BT: Tensor
    targets_BT: Tensor
    """Token to predict at each position; -100 where there is no answer."""
    query_B: Tensor
    """First position that answers."""
    source_B: Tensor
    """Position of the source of that answer."""
    other_B: Tensor
    """Position next to the source with another item of the same kind."""


@dataclass(frozen=True)
class Task:
    """A task and its chance level."""

    name: str
    draw: Callable[[Tensor, torch.Generator], TaskBatch]
    """Draws a sequence for each distance (B,), on the CPU; the largest distance sets the length."""
    min_distance: int
    n_asked: int
    """Number of positions from the query to the end."""
    n_exact: int
    """Number of positions, from the query on, whose source is at exactly the given distance."""
    chance: float
    """Chance level among all possible answers."""
    informed_chance: float
    """Chance level among the answers that occur in the sequence."""

    def batches(
        self, distance: int, n_sequences: int, generator: torch.Generator, *, batch_tokens: int
    ) -> Iterator[TaskBatch]:
        """Draw sequences of one distance, in batches of about ``batch_tokens`` tokens."""
        n_at_once = max(1, batch_tokens // (distance + 2 * self.n_asked))
        for first in range(0, n_sequences, n_at_once):
            n_batch = min(n_at_once, n_sequences - first)
            yield self.draw(torch.full((n_batch,), distance), generator)


def recall(distance_B: Tensor, generator: torch.Generator) -> TaskBatch:
    """Draw pairs of a key and a value, then keys whose values are the answers.

    The first key has the given distance; the later ones are additional training signal. The keys
    of a sequence's pairs differ; values may repeat. A pair is one token, so that one attention step
    can answer: with two tokens, small Transformers take ten times as long to learn the task.

    Source: associative recall, Graves et al. 2014, arXiv:1410.5401, section 4.3; several queries:
        Arora et al. 2023, arXiv:2312.04927.
    """
    n_batch = len(distance_B)
    keys_BN = _distinct(n_batch, N_PAIRS, N_KEYS, generator)
    values_BN = torch.randint(N_VALUES, (n_batch, N_PAIRS), generator=generator)
    # Independent draws: if each key were asked once, earlier answers would help to guess.
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
    return TaskBatch(tokens_BT, targets_BT, torch.full_like(source_B, query), source_B, other_B)


def copy(distance_B: Tensor, generator: torch.Generator) -> TaskBatch:
    """Draw a string of distinct symbols, then a mark, after which the string is repeated.

    Every symbol has the same distance to its source.

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
    return TaskBatch(
        tokens_BT, targets_BT, torch.full_like(source_B, query), source_B, source_B + 1
    )


RECALL = Task(
    "recall",
    recall,
    min_distance=8,
    n_asked=2 * N_ASKED,
    n_exact=1,
    chance=1 / N_VALUES,
    informed_chance=1 / N_PAIRS,
)
COPY = Task(
    "copy",
    copy,
    min_distance=N_COPIED,
    n_asked=N_COPIED,
    n_exact=N_COPIED,
    chance=1 / N_VALUES,
    informed_chance=1 / N_COPIED,
)
TASKS: Mapping[str, Task] = {task.name: task for task in (RECALL, COPY)}
MAX_ASKED = max(task.n_asked for task in TASKS.values())
"""A sequence is longer than its largest distance by at most twice this many positions."""


def _distinct(n_batch: int, n: int, n_choices: int, generator: torch.Generator) -> Tensor:
    """Return n distinct numbers below n_choices for each sequence, in random order."""
    return torch.rand(n_batch, n_choices, generator=generator).argsort(dim=1)[:, :n]


def _fillers(n_batch: int, length: int, generator: torch.Generator) -> Tensor:
    return _FIRST_FILLER + torch.randint(N_FILLERS, (n_batch, length), generator=generator)
