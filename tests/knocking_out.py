"""Knockout effects of single positions, and their oracle: a forward pass without the positions."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.knockout import Knockouts, Query
from minigpt.tracing.analysis.tally import CauseTally
from minigpt.tracing.analysis_config import Knockout
from minigpt.tracing.events import Token
from minigpt.tracing.findings import CauseCheck, Effect, TraceStep
from minigpt.tracing.head_lists import HeadSelection


def knock_out(
    model: LanguageModel,
    cache: KVCache,
    query: int,
    target: int,
    positions: Sequence[int],
    knockout: Knockout = "key",
    selection: HeadSelection | None = None,
) -> list[float]:
    """Return the change of ln p(target) for each position hidden from the newest query.

    Args: cache, one sequence that ends with ``query``, left unchanged; positions, visible to the
        query; selection, the heads in which a position is hidden, None for all.
    """
    hidden = [(position,) for position in positions]
    knockouts = Knockouts(model, knockout, selection)
    [changes] = knockouts.changes(cache, [Query(cache.length - 1, query, target, hidden)])
    return [float(change) for change in changes[:, 0]]


@contextmanager
def last_query_without(
    hidden: int | Sequence[int], kind: Knockout, heads: Sequence[Sequence[int]] | None = None
) -> Iterator[None]:
    """Replace attention by a plain one that hides positions from the last query (the oracle).

    Args: heads, for each layer the heads that hide the positions; None for all.
    """
    positions = [hidden] if isinstance(hidden, int) else list(hidden)
    calls = itertools.count()

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        n_shared = q.shape[1] // k.shape[1]
        k = k.float().repeat_interleave(n_shared, dim=1)
        v = v.float().repeat_interleave(n_shared, dim=1)
        n = q.shape[2]
        score = q.float() @ k.mT / math.sqrt(q.shape[3])
        score[..., torch.ones(n, n).triu(1).bool()] = -math.inf
        layer = next(calls)
        chosen = range(q.shape[1]) if heads is None else heads[layer]
        for head, position in itertools.product(chosen, positions):
            if kind == "key":
                score[:, head, n - 1, position] = -math.inf
        weight = score.softmax(dim=-1)
        for head, position in itertools.product(chosen, positions):
            if kind == "value":
                weight[:, head, n - 1, position] = 0  # the other weights are not renormalized
        return (weight @ v).to(q.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


def check_cause(effects: Sequence[Effect]) -> CauseCheck | None:
    """Return the cause check in the footer of a trace with these effects."""
    tally = CauseTally()
    tally.add(TraceStep(0, Token(9, 9, b"b"), -1.0, (), "", None, effects=tuple(effects)))
    return tally.check()
