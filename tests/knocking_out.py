"""The effects of single positions, for tests."""

from collections.abc import Sequence

from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.knockout import Knockouts, Query
from minigpt.tracing.analysis_config import Knockout
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
    """Return for each position the change of ln p(target) if the newest query lacks it.

    Args: cache, of one sequence, which is not changed and ends with ``query``; positions, all in
        view; selection, the heads in which a position is hidden, None for all.
    """
    hidden = [(position,) for position in positions]
    knockouts = Knockouts(model, knockout, selection)
    [changes] = knockouts.changes(cache, [Query(cache.length - 1, query, target, hidden)])
    return [float(change) for change in changes[:, 0]]
