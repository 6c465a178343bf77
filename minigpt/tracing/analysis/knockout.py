"""Knockout: hide earlier positions from the newest query, and measure the effect on its token.

Shapes: L layers, B rows, G key/value heads, S positions in view, T new positions, D head dim.
"""

from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.config import Knockout
from minigpt.tracing.events import CauseCheck, Effect, Row, Source, Token

_MAX_CACHE_BYTES = 2**28  # of all rows of a batch


def require_knockout(model: LanguageModel, knockout: Knockout) -> None:
    """Raise ConfigError if this kind of knockout is not possible with a model."""
    if knockout == "value" and not isinstance(model, GPT):
        raise ConfigError(
            f"--knockout value is not possible with an {model.config.arch}: its states are keys "
            "and values together, and later states depend on them. Use --knockout key."
        )


def source_effects(
    model: LanguageModel,
    cache: KVCache,
    tokens: Sequence[Token],
    row: Row,
    target: int,
    *,
    sink: int,
    n_sources: int,
    knockout: Knockout = "key",
) -> tuple[Effect, ...]:
    """Knock out the strongest sources of a row, and for each a control.

    Args: cache and tokens, what was in view when the token ``target`` was drawn; the query is at
        the last of these positions. sink, a position that is never a source or a control.
    Returns: the effects of the sources, largest weight first, then those of the controls.
    """
    weights_S = row.weights_S
    order = np.argsort(-weights_S, kind="stable").tolist()
    sources = [position for position in order if position != sink][:n_sources]
    controls = choose_controls(weights_S, sources, sink=sink)
    chosen: list[tuple[int, int | None]] = [(position, None) for position in sources]
    chosen += [(position, i) for i, position in enumerate(controls) if position is not None]
    positions = [position for position, _ in chosen]
    changes = knock_out(model, cache, tokens[-1].id, target, positions, knockout)
    return tuple(
        Effect(Source(tokens[position], float(weights_S[position])), change, control_of)
        for (position, control_of), change in zip(chosen, changes, strict=True)
    )


def choose_controls(
    weights_S: NDArray[np.float32], sources: Sequence[int], *, sink: int
) -> list[int | None]:
    """Return for each source its control: the nearest position with a smaller weight.

    Sources, the sink and controls of other sources are not eligible. Of two positions at the same
    distance, the earlier one is chosen. None if no position is left.
    """
    taken: set[int | None] = {sink, *sources}
    controls: list[int | None] = []
    for source in sources:
        smaller = np.flatnonzero(weights_S < weights_S[source]).tolist()
        nearest = sorted(smaller, key=lambda position: abs(position - source))
        control = next((position for position in nearest if position not in taken), None)
        controls.append(control)
        taken.add(control)
    return controls


@torch.inference_mode()
def knock_out(
    model: LanguageModel,
    cache: KVCache,
    query: int,
    target: int,
    positions: Sequence[int],
    knockout: Knockout = "key",
) -> list[float]:
    """Return for each position the change of ln p(target) if the newest query lacks it.

    The newest token, ``query``, is computed again in one batch: a row without a knockout, so that
    all rows are computed by the same kernels, and a row for each position. Earlier queries are left
    as they were. A key is hidden from the query in all layers, so the other weights grow to sum to
    1. A value is set to zero in all layers, and the weights stay.

    Args: cache, of one sequence, which is not changed; positions, all in view.
    Source: Geva et al. 2023, arXiv:2304.14767 (attention knockout, of keys).
    """
    per_batch = max(1, _MAX_CACHE_BYTES * cache.capacity // (cache.n_bytes * cache.length))
    changes: list[float] = []
    for first in range(0, len(positions), per_batch):
        places = torch.tensor(positions[first : first + per_batch], device=model.device)
        n_rows = len(places) + 1
        rows = torch.arange(1, n_rows, device=model.device)
        visible_BS = None
        if knockout == "key":
            visible_BS = places.new_ones(n_rows, cache.length, dtype=torch.bool)
            visible_BS[rows, places] = False
        if isinstance(model, GPT):
            zeroed = (rows, places) if knockout == "value" else None
            prefix: KVCache = _SharedPrefix(cache, zeroed)
        else:  # an LSTM reads earlier states from the cache itself
            prefix = copy(cache)
            prefix.truncate(cache.length - 1)
            prefix.select([0] * n_rows)
        tokens = torch.full((n_rows, 1), query, device=model.device)
        logits = model(tokens, prefix, visible_BS=visible_BS)[:, -1]
        log_p = logits.float().log_softmax(dim=-1)[:, target]
        changes += (log_p[1:] - log_p[0]).tolist()
    return changes


class _SharedPrefix(KVCache):
    """All positions of a cache except the newest, shared by rows that each write their own newest.

    The rows of a layer are only materialised while that layer is computed.
    """

    def __init__(self, cache: KVCache, zeroed: tuple[Tensor, Tensor] | None) -> None:
        """Args: zeroed, rows and for each of them the position whose value is set to zero."""
        self.capacity, self.length = cache.length, cache.length - 1
        self.keys_LBGSD = cache.keys_LBGSD[:, :1, :, : self.length]
        self.values_LBGSD = cache.values_LBGSD[:, :1, :, : self.length]
        self._zeroed = zeroed

    def write(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's shared keys and values, followed by those of each row."""
        shape = (len(k_BGTD), -1, -1, -1)
        keys_BGSD = torch.cat((self.keys_LBGSD[layer].expand(shape), k_BGTD), dim=2)
        values_BGSD = torch.cat((self.values_LBGSD[layer].expand(shape), v_BGTD), dim=2)
        if self._zeroed is not None:
            rows, places = self._zeroed
            values_BGSD[rows, :, places] = 0
        return keys_BGSD, values_BGSD


def check_cause(effects: Sequence[Effect]) -> CauseCheck | None:
    """Return whether larger weights came with larger effects; None if nothing was knocked out."""
    if not effects:
        return None
    sources = [abs(effect.change) for effect in effects if effect.control_of is None]
    controls = [abs(effect.change) for effect in effects if effect.control_of is not None]
    return CauseCheck(
        n_sources=len(sources),
        n_controls=len(controls),
        mean_effect=float(np.mean(sources)),
        mean_control_effect=float(np.mean(controls)) if controls else 0.0,
        rank_correlation=rank_correlation(
            [effect.source.weight for effect in effects],
            [abs(effect.change) for effect in effects],
        ),
    )


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's rank correlation; equal values share the mean of their ranks.

    None for fewer than three pairs, or if all values of x or of y are equal.
    """
    ranks_x, ranks_y = _centred_ranks(x), _centred_ranks(y)
    scale = float(np.sqrt((ranks_x @ ranks_x) * (ranks_y @ ranks_y)))
    if len(ranks_x) < 3 or scale == 0:  # two pairs always correlate by 1 or -1
        return None
    return float(ranks_x @ ranks_y) / scale


def _centred_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return the ranks minus their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + len(place)) / 2)[place]
