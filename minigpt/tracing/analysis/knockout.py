"""Did what was attended to matter? Take it away, and see what becomes of the drawn token.

Shapes: L layers, B rows, G key/value heads, S positions in view, T new positions, D head dim.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.events import CauseCheck, Effect, Knockout, Row, Source, Token

_LEAST_TO_RANK = 3  # two are always in perfect order, or in perfect disorder
_CACHE_BYTES_AT_ONCE = 2**28


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
    """Knock out a row's strongest sources but the sink, and a control for each that has one.

    Args: cache, tokens, what was in view when the token ``target`` was drawn; the query is the
        newest of them.
    Returns: the effects of the sources, most weight first, and then of the controls.
    """
    weights_S = row.weights_S
    order = np.argsort(-weights_S, kind="stable").tolist()
    sources = [position for position in order if position != sink][:n_sources]
    controls = choose_controls(weights_S, sources, sink=sink)
    chosen: list[tuple[int, int | None]] = [(position, None) for position in sources]
    chosen += [(position, of) for of, position in enumerate(controls) if position is not None]
    positions = [position for position, _ in chosen]
    changes = knock_out(model, cache, tokens[-1].id, target, positions, knockout)
    return tuple(
        Effect(Source(tokens[position], float(weights_S[position])), change, control_of)
        for (position, control_of), change in zip(chosen, changes, strict=True)
    )


def require_knockout(model: LanguageModel, knockout: Knockout) -> None:
    """Raise ConfigError if a source of this model cannot be robbed of that."""
    if knockout == "value" and not isinstance(model, GPT):
        raise ConfigError(
            f"a state of an {model.config.arch} is key and value in one, and hands on what it "
            "holds: its value alone cannot be knocked out. Use --knockout key."
        )


def choose_controls(
    weights_S: NDArray[np.float32], sources: Sequence[int], *, sink: int
) -> list[int | None]:
    """Return for each source a position nearby that had less weight; None where there is none.

    It is the nearest that is no source, no sink and no other's control, the earlier of two.
    """
    taken = {sink, *sources}
    controls: list[int | None] = []
    for source in sources:
        free = [
            position
            for position in range(len(weights_S))
            if position not in taken and weights_S[position] < weights_S[source]
        ]
        control = min(free, key=lambda position: (abs(position - source), position), default=None)
        controls.append(control)
        if control is not None:
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
    """Return for each position by how much ln p(target) changes if the newest query lacks it.

    The newest position's token, ``query``, is computed again in one batch: a row as it was, so that
    all are compared that went through the same kernels, and a row for each position. Earlier
    queries have seen it, as ever. key: no layer's newest query may look at it, and the softmax
    shares its weight among the others. value: its weight stays, and brings nothing.

    Args: cache, of one sequence, which is not changed; positions, in view.
    Source: Geva et al. 2023, arXiv:2304.14767 (attention knockout: key).
    """
    n_at_once = max(1, _CACHE_BYTES_AT_ONCE * cache.capacity // (cache.n_bytes * cache.length))
    changes: list[float] = []
    for first in range(0, len(positions), n_at_once):
        places = torch.tensor(positions[first : first + n_at_once], device=model.device)
        rows = torch.arange(1, len(places) + 1, device=model.device)
        visible_BS = None
        if knockout == "key":
            visible_BS = places.new_ones(len(places) + 1, cache.length, dtype=torch.bool)
            visible_BS[rows, places] = False
        without_value = (rows, places) if knockout == "value" else None
        shared = _prefix(model, cache, len(places) + 1, without_value)
        tokens = torch.full((len(places) + 1, 1), query, device=model.device)
        logits = model(tokens, shared, visible_BS=visible_BS)[:, -1]
        log_p = logits.float().log_softmax(dim=-1)[:, target]
        changes += (log_p[1:] - log_p[0]).tolist()
    return changes


def _prefix(
    model: LanguageModel, cache: KVCache, n_rows: int, without_value: tuple[Tensor, Tensor] | None
) -> KVCache:
    """Return a cache of all positions but the newest, for so many rows."""
    if isinstance(model, GPT):
        return _SharedPrefix(cache, without_value)
    # Its layers read their earlier states from the cache itself.
    rows = KVCache(
        model.config,
        batch_size=n_rows,
        capacity=cache.length,
        device=model.device,
        dtype=model.dtype,
    )
    rows.length = cache.length - 1
    rows.keys_LBGSD[:, :, :, : rows.length] = cache.keys_LBGSD[:, :1, :, : rows.length]
    rows.values_LBGSD[:, :, :, : rows.length] = cache.values_LBGSD[:, :1, :, : rows.length]
    return rows


class _SharedPrefix(KVCache):
    """All but the newest position of a cache, before which each row writes one of its own.

    The rows are made for one layer at a time, and the cache is only read.
    """

    def __init__(self, cache: KVCache, without_value: tuple[Tensor, Tensor] | None) -> None:
        """Args: without_value, rows and, for each, the position whose value is to be zero."""
        self.capacity, self.length = cache.length, cache.length - 1
        self.keys_LBGSD = cache.keys_LBGSD[:, :1, :, : self.length]
        self.values_LBGSD = cache.values_LBGSD[:, :1, :, : self.length]
        self._without_value = without_value

    def write(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shared keys and values of a layer with each row's own behind them."""
        shape = (len(k_BGTD), -1, -1, -1)
        keys_BGSD = torch.cat((self.keys_LBGSD[layer].expand(shape), k_BGTD), dim=2)
        values_BGSD = torch.cat((self.values_LBGSD[layer].expand(shape), v_BGTD), dim=2)
        if self._without_value is not None:
            rows, places = self._without_value
            values_BGSD[rows, :, places] = 0
        return keys_BGSD, values_BGSD


def check_cause(effects: Sequence[Effect]) -> CauseCheck | None:
    """Return whether more weight went with more effect; None if nothing was knocked out."""
    if not effects:
        return None
    of_sources = [abs(effect.change) for effect in effects if effect.control_of is None]
    of_controls = [abs(effect.change) for effect in effects if effect.control_of is not None]
    return CauseCheck(
        n_sources=len(of_sources),
        n_controls=len(of_controls),
        mean_effect=float(np.mean(of_sources)),
        mean_control_effect=float(np.mean(of_controls)) if of_controls else 0.0,
        rank_correlation=rank_correlation(
            [effect.source.weight for effect in effects],
            [abs(effect.change) for effect in effects],
        ),
    )


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float | None:
    """Return Spearman's rank correlation, equal values sharing the mean of their ranks.

    None if there are fewer than three pairs, or all of x or all of y are equal.
    """
    ranks_x, ranks_y = _centred_ranks(x), _centred_ranks(y)
    scale = float(np.sqrt((ranks_x @ ranks_x) * (ranks_y @ ranks_y)))
    if len(ranks_x) < _LEAST_TO_RANK or scale == 0:
        return None
    return float(ranks_x @ ranks_y) / scale


def _centred_ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return ranks less their mean."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + len(place)) / 2)[place]


@contextmanager
def without_heads(model: LanguageModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Let heads, each (layer, head), add nothing to the stream in GPT.forward meanwhile.

    What they bring is zeroed before W_O, which is as if their columns of W_O were.
    """
    heads_by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        heads_by_layer[layer].append(head)
    with ExitStack() as stack:
        for layer, chosen in heads_by_layer.items():
            output = model.attentions[layer].output
            stack.callback(output.register_forward_pre_hook(_Zeroed(model, chosen)).remove)
        yield


class _Zeroed:
    def __init__(self, model: LanguageModel, heads: Sequence[int]) -> None:
        self._n_head, self._heads = model.config.n_head, list(heads)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x_BTHD = inputs[0].unflatten(-1, (self._n_head, -1)).clone()
        x_BTHD[:, :, self._heads] = 0
        return x_BTHD.flatten(2)
