"""The KV cache: the keys and values of every position so far, preallocated.

Shapes: L layers, B batch, G key/value heads, S positions, D head dim, T new positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.config import ModelConfig


class KVCache:
    """One tensor pair for the whole model, whose first ``length`` positions are filled.

    In each forward pass, every layer calls ``write``, and then the model calls ``advance``.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        batch_size: int = 1,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate for ``capacity`` positions (default: the model's context_length)."""
        self.capacity = capacity or config.context_length
        self.length = 0  # a Python int: slicing by it never waits for the device
        self.tokens_BS: Tensor | None = None  # the cached tokens, for models with LongRoPE,
        self.is_long = False  # and whether their long frequencies are in use
        shape = (config.n_layer, batch_size, config.n_kv_head, self.capacity, config.d_head)
        self.keys_LBGSD = torch.empty(shape, device=device, dtype=dtype)
        self.values_LBGSD = torch.empty(shape, device=device, dtype=dtype)

    def write(self, layer: int, k_BGTD: Tensor, v_BGTD: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values of a layer; return views of all its filled positions.

        Returns: keys and values, each (B, G, length + T, D).
        Raises: ValueError if they do not fit.
        """
        end = self.length + k_BGTD.shape[2]
        self.require_room(end)
        keys_BGSD, values_BGSD = self.keys_LBGSD[layer], self.values_LBGSD[layer]
        keys_BGSD[:, :, self.length : end] = k_BGTD
        values_BGSD[:, :, self.length : end] = v_BGTD
        return keys_BGSD[:, :, :end], values_BGSD[:, :, :end]

    def require_room(self, end: int) -> None:
        """Raise ValueError if the cache has no room for ``end`` positions."""
        if end > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {end} were asked for")

    def advance(self, n_positions: int) -> None:
        """Count new positions, which every layer has written."""
        self.length += n_positions

    def truncate(self, length: int) -> None:
        """Remove all positions from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate a cache of {self.length} positions to {length}")
        self.length = length

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of the batch, in this order; repeats are allowed."""
        index = torch.tensor(rows, device=self.keys_LBGSD.device)
        self.keys_LBGSD = self.keys_LBGSD.index_select(1, index)
        self.values_LBGSD = self.values_LBGSD.index_select(1, index)
        self.tokens_BS = None if self.tokens_BS is None else self.tokens_BS[index]

    @property
    def n_rows(self) -> int:
        """Number of sequences in the batch."""
        return self.keys_LBGSD.shape[1]

    @property
    def n_bytes(self) -> int:
        """Bytes allocated."""
        return self.keys_LBGSD.nbytes + self.values_LBGSD.nbytes


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 4) -> int:
    """Return the cache bytes of one position of one sequence.

    An LSTM stores its hidden and cell states as keys and values.
    """
    return 2 * config.n_layer * config.n_kv_head * config.d_head * bytes_per_value
