"""The decode step as one compiled graph: ``--compile``.

Shapes: B rows, T new tokens, V vocabulary, S positions in view.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.config import round_up
from minigpt.generation.fast.compiling import load_step
from minigpt.generation.fast.decode_step import DecodeStep
from minigpt.generation.forward import EagerForward
from minigpt.model.attention import AttentionPass, Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT

_CPU_VIEW = 16  # positions: what is in view grows by whole vectors
_CUDA_VIEW = 256  # by doubling from here, as each number of them has a CUDA graph of its own


class CompiledForward:
    """Decodes one token a row through a compiled graph; more through EagerForward.

    A prompt is one pass over the weights for all its tokens, which libraries are made for: what
    could be won there is not worth a second graph, whose compiling would be waited for.
    Both write into one cache, of which the graph reads what is filled: its shape is free in the
    positions. The graph of several rows is free in the rows, too, but needs two of them.
    """

    def __init__(
        self,
        model: GPT,
        *,
        capacity: int,
        n_rows: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        """Load the graph, compiling it if no earlier process has.

        Args: capacity, the positions that the cache has room for; n_rows, the most rows that
            ``repeat`` will be asked for.
        Raises: ConfigError if there is no C++ compiler; ResourceError if the cache folder
            cannot be written.
        """
        for weight in model.parameters():
            # The graph is of rows that lie in memory one after another; what was read from a
            # GPT-2 folder, or laid out for another way to decode, may lie the other way round.
            weight.data = weight.data.contiguous()
        self._recorder = recorder
        self._least_rows = 2 if n_rows > 1 else 1
        self._eager = EagerForward(model, capacity=round_up(capacity, _CPU_VIEW), recorder=recorder)
        self.config, self.device = model.config, self.cache.keys_LBGSD.device
        # What is not filled is multiplied by weights of 0, which nan and inf would survive.
        self.cache.keys_LBGSD.zero_()
        self.cache.values_LBGSD.zero_()
        self._run = load_step(
            DecodeStep(model, shows_rows=recorder is not None),
            cache_dtype=self.cache.keys_LBGSD.dtype,
            is_batch=n_rows > 1,
        )
        self._bind()

    @property
    def cache(self) -> KVCache:
        """The keys and values of every position so far."""
        return self._eager.cache

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        n_rows, n_tokens = tokens.shape
        if n_tokens > 1:
            return self._eager.feed(self._padded(tokens))[:n_rows]
        length = self.cache.length
        if length == self.config.context_length:
            raise ValueError(f"the model sees {length} positions; {length + 1} were given")
        if length == self.cache.capacity:
            raise ValueError(f"the cache holds {length} positions; {length + 1} were asked for")
        if len(self._tokens) < self._least_rows:
            self.keep([0])
        self._tokens.copy_(self._padded(tokens)[:, 0])
        self._position.fill_(length)
        logits, *rows = self._decode(self._in_view(length + 1))
        if self._recorder is not None:
            weights_LBHS, context_LBHD = rows
            self._recorder.record(
                AttentionPass(
                    weights_LBHS[:, :n_rows, :, : length + 1],
                    context_LBHD[:, :n_rows],
                    self.cache.values_LBGSD[:, :n_rows, :, : length + 1],
                    n_new=1,
                )
            )
        self.cache.advance(1)
        return logits[:n_rows]

    def repeat(self, n_rows: int) -> None:
        self.keep([0] * n_rows)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.select([*rows, *[rows[-1]] * (self._least_rows - len(rows))])
        self._bind()

    def truncate(self, length: int) -> None:
        self.cache.truncate(length)

    def _padded(self, tokens: Tensor) -> Tensor:
        """Return a row for each of the cache's, which are more where the graph needs two."""
        n_rows = len(self._tokens)
        return tokens if len(tokens) == n_rows else tokens[-1:].expand(n_rows, -1)

    def _bind(self) -> None:
        """Name the tensors that the graph reads and writes, for the rows that there are now."""
        keys, values = self.cache.keys_LBGSD, self.cache.values_LBGSD
        self._tokens = torch.zeros(keys.shape[1], dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._view = torch.empty(self.cache.capacity, device=self.device)
        self._caches = [*keys.unbind(), *values.unbind()]
        self._replays: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def _in_view(self, n_filled: int) -> int:
        """Return how many positions to look at, so that few numbers of them come up."""
        if self.device.type == "cuda":
            n_view = max(_CUDA_VIEW, 1 << (n_filled - 1).bit_length())
        else:
            n_view = round_up(n_filled, _CPU_VIEW)
        return min(n_view, self.cache.capacity)

    def _decode(self, n_view: int) -> list[Tensor]:
        inputs = [self._tokens, self._position, self._view[:n_view], *self._caches]
        if self.device.type != "cuda":
            return self._run(inputs)
        if n_view not in self._replays:
            self._replays[n_view] = self._record(inputs)
        graph, outputs = self._replays[n_view]
        graph.replay()
        return outputs

    def _record(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Record the graph's kernels as a CUDA graph: one launch a token, whatever the CPU does."""
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            self._run(inputs)  # what is set up at a first call must not be recorded
        torch.cuda.current_stream(self.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._run(inputs)
        return graph, outputs
