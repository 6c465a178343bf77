"""Knockout: hide earlier positions from the newest query, and measure the effect on its token.

Shapes: L layers, B rows, H query heads, G key/value heads, S positions in view, T new positions,
D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.generation.forward import FAST
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.tracing.analysis_config import Knockout
from minigpt.tracing.head_lists import HeadSelection
from minigpt.tracing.shallow_copies import shallow_copy

_MAX_CACHE_BYTES = 2**28  # of a batch, if each row needs a copy of the cache
_MAX_BYTES = 2**27  # of a batch's logits and weights of one layer, if rows share the cache
_MAX_ROWS = 128


@dataclass(frozen=True)
class Query:
    """The query that predicted a token, and the sets of positions to hide from it."""

    position: int
    token: int
    """Token at that position."""
    target: int
    """Predicted token."""
    hidden: Sequence[Sequence[int]]
    """Positions to hide, for each row."""


class Knockouts:
    """Recomputes predictions with positions hidden from the query.

    Each row recomputes the newest query; earlier queries are unchanged. A batch also has a row
    without a knockout for each of its queries, so that the same kernels compute both. A hidden key
    is masked, so the other weights grow to sum to 1. A hidden value is set to zero, and the weights
    are unchanged.

    Source: Geva et al. 2023, arXiv:2304.14767 (attention knockout, of keys).
    """

    def __init__(
        self,
        model: LanguageModel,
        knockout: Knockout = "key",
        selection: HeadSelection | None = None,
    ) -> None:
        """Args: selection, the heads in which positions are hidden; None for all.

        Raises: ConfigError if the model does not support this kind of knockout.
        """
        if knockout == "value" and not isinstance(model, GPT):
            raise ConfigError(
                f"--knockout value is not possible with an {model.config.arch}: its states are "
                "keys and values together, and later states depend on them. Use --knockout key."
            )
        self._model, self._is_value = model, knockout == "value"
        self._heads_LH: Tensor | None = None
        if selection is not None and not selection.is_all:
            heads = range(selection.n_head)
            mask = [[head in chosen for head in heads] for chosen in selection.heads_by_layer]
            self._heads_LH = torch.tensor(mask, device=model.device)
        self._fast = None
        is_fast = (fast := find_ring(FAST)) and fast.supports(model)
        if is_fast and model.attentions[0].score.is_dot_product:
            self._fast = ring(f"{FAST}.queries")
            self._step = self._fast.QueryStep(model)

    @property
    def batch_rows(self) -> int:
        """Number of rows to collect for a batch, or 1 if queries are not batched."""
        return _MAX_ROWS if self._fast else 1

    @torch.inference_mode()
    def changes(self, cache: KVCache, queries: Sequence[Query]) -> list[NDArray[np.float32]]:
        """Return for each query the changes of ln p(target) and of its logit, (rows, 2).

        Args: cache, of one sequence, with at least the queries' positions; it is not modified.
        """
        found: list[list[Tensor]] = [[] for _ in queries]
        for batch in self._batches(cache, queries):
            rows = self._fast_rows if self._fast else self._plain_rows
            scores_B2 = rows(cache, [query for _, query in batch]).cpu()
            sizes = [len(query.hidden) for _, query in batch]
            for (number, _), part in zip(batch, scores_B2.split(sizes), strict=True):
                found[number].append(part[1:] - part[0])
        return [torch.cat((torch.empty(0, 2), *parts)).numpy() for parts in found]

    def _batches(
        self, cache: KVCache, queries: Sequence[Query]
    ) -> Iterator[list[tuple[int, Query]]]:
        """Split queries into batches, where each query starts with a row that hides nothing.

        To limit memory, a query with many rows is split over several batches.
        """
        batch: list[tuple[int, Query]] = []
        n_rows = 0
        for number, query in enumerate(queries):
            limit = self._max_rows(cache, query.position + 1)
            for first in range(0, len(query.hidden), limit - 1):
                hidden = [(), *query.hidden[first : first + limit - 1]]
                if batch and (n_rows + len(hidden) > limit or not self._fast):
                    yield batch
                    batch, n_rows = [], 0
                batch.append((number, replace(query, hidden=hidden)))
                n_rows += len(hidden)
        if batch:
            yield batch

    def _max_rows(self, cache: KVCache, n_view: int) -> int:
        """Return the maximum number of rows in a batch, at least 2."""
        if self._fast:
            config = self._model.config
            row_bytes = 4 * (3 * config.n_head * n_view + 3 * config.vocab_size)
            return min(_MAX_ROWS, max(2, _MAX_BYTES // row_bytes))
        return 1 + max(1, _MAX_CACHE_BYTES * cache.capacity // (cache.n_bytes * n_view))

    def _fast_rows(self, cache: KVCache, queries: Sequence[Query]) -> Tensor:
        """Return ln p and the logit of each row's target, (B, 2), with a shared cache."""
        assert self._fast is not None
        # Pad, because products of few rows round differently, and their number depends on timing.
        n_rows, last = sum(len(query.hidden) for query in queries), queries[-1]
        filling = [()] * (self._fast.MIN_ROWS - n_rows)
        queries = [*queries[:-1], replace(last, hidden=[*last.hidden, *filling])]
        counts = torch.tensor([len(query.hidden) for query in queries])

        def repeated(name: str) -> Tensor:
            return torch.tensor([getattr(q, name) for q in queries]).repeat_interleave(counts)

        hidden_BS = _mask(queries, max(query.position for query in queries) + 1)
        heads_LGR = self._heads_LH
        if heads_LGR is not None:
            heads_LGR = heads_LGR.unflatten(1, (self._model.config.n_kv_head, -1))
        hidden = self._fast.Hidden(repeated("position"), hidden_BS, heads_LGR, self._is_value)
        logits = self._step(repeated("token"), hidden, cache)
        return _scores(logits, repeated("target"))[:n_rows]

    def _plain_rows(self, cache: KVCache, queries: Sequence[Query]) -> Tensor:
        """Return the same as ``_fast_rows``, computed by the model's own forward."""
        [query] = queries
        model, n_rows, end = self._model, len(query.hidden), query.position + 1
        hidden_BS = _mask(queries, end).to(model.device)
        if isinstance(model, GPT):
            if cache.tokens_BS is not None:
                cache = ring("checkpoint.long_rope").cache_of(model, cache, end)
            prefix: KVCache = _SharedPrefix(
                cache, end, hidden_BS if self._is_value else None, self._heads_LH
            )
        else:  # an LSTM reads earlier states directly from the cache
            prefix = copy(cache)
            prefix.truncate(end - 1)
            prefix.select([0] * n_rows)
        tokens = torch.full((n_rows, 1), query.token, device=model.device)
        if self._is_value:
            logits = model(tokens, prefix)
        elif self._heads_LH is None:
            logits = model(tokens, prefix, visible_BS=~hidden_BS)
        else:
            logits = _hiding(model, hidden_BS, self._heads_LH)(tokens, prefix)
        targets_B = torch.full((n_rows,), query.target, device=model.device)
        return _scores(logits[:, -1].float(), targets_B)


def _mask(queries: Sequence[Query], n_view: int) -> Tensor:
    """Return a mask of the positions hidden in each row of the queries, (B, S)."""
    rows = [hidden for query in queries for hidden in query.hidden]
    hidden_BS = np.zeros((len(rows), n_view), np.bool_)
    for row_S, hidden in zip(hidden_BS, rows, strict=True):
        row_S[list(hidden)] = True
    return torch.from_numpy(hidden_BS)


def _scores(logits: Tensor, targets_B: Tensor) -> Tensor:
    """Return ln p and the logit of each row's target, (B, 2)."""
    logit_B = logits.gather(1, targets_B[:, None])[:, 0]
    return torch.stack((logit_B - logits.logsumexp(dim=1), logit_B), dim=1)


def _hiding(model: LanguageModel, hidden_BS: Tensor, heads_LH: Tensor) -> LanguageModel:
    """Return a copy of a model in which keys are hidden from some heads of each layer."""

    def hide(heads_H: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        visible_BH1S = ~(hidden_BS[:, None, None] & heads_H[None, :, None, None])
        return lambda _, inputs: (*inputs[:-1], visible_BH1S)

    changed = shallow_copy(model)
    for layer, heads_H in zip(changed.attentions, heads_LH, strict=True):
        assert isinstance(layer, nn.Module)
        layer.register_forward_pre_hook(hide(heads_H))
    return changed


class _SharedPrefix(KVCache):
    """A cache whose earlier positions are shared by all rows; each row adds its newest position.

    The rows of a layer are only materialized while that layer is computed.
    """

    def __init__(
        self, cache: KVCache, end: int, zeroed_BS: Tensor | None, heads_LH: Tensor | None
    ) -> None:
        """Args: zeroed_BS, True for values to set to zero, in the chosen heads or in all."""
        self.capacity, self.length = end, end - 1
        self.keys_LBGSD = cache.keys_LBGSD[:, :1, :, : self.length]
        self.values_LBGSD = cache.values_LBGSD[:, :1, :, : self.length]
        self.tokens_BS, self.is_long = None, cache.is_long
        self._zeroed_BS, self._heads_LH = zeroed_BS, heads_LH

    def write(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's shared keys and values, followed by each row's own."""
        shape = (len(k_BGTD), -1, -1, -1)
        keys_BGSD = torch.cat((self.keys_LBGSD[layer].expand(shape), k_BGTD), dim=2)
        values_BGSD = torch.cat((self.values_LBGSD[layer].expand(shape), v_BGTD), dim=2)
        if self._zeroed_BS is None:
            return keys_BGSD, values_BGSD
        zeroed_B1S1 = self._zeroed_BS[:, None, :, None]
        if self._heads_LH is not None:  # heads of a group no longer have the same values
            n_shared = self._heads_LH.shape[1] // keys_BGSD.shape[1]
            keys_BGSD = keys_BGSD.repeat_interleave(n_shared, dim=1)
            values_BGSD = values_BGSD.repeat_interleave(n_shared, dim=1)
            zeroed_B1S1 = zeroed_B1S1 & self._heads_LH[layer, None, :, None, None]
        return keys_BGSD, values_BGSD.masked_fill(zeroed_B1S1, 0)
