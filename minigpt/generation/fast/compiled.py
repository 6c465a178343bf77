"""Decoding by a compiled graph of the decode step: ``--compile``.

Shapes: B rows, S positions in view.
"""

import torch
from torch import Tensor

from minigpt.config import round_up
from minigpt.generation.fast.compiling import load_step
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.fast.step_forward import StepForward, StepOutput
from minigpt.model.attention import Recorder
from minigpt.model.gpt import GPT

_CPU_VIEW = 16  # positions in view are rounded up to whole vectors
_CUDA_VIEW = 256  # and here to a power of two from this on, as each needs its own CUDA graph


class CompiledForward(StepForward):
    """Decodes one token per row by a compiled graph, whose shape is free in the positions.

    The graph of several rows is free in the rows too, but needs at least two of them.
    """

    def __init__(
        self, model: GPT, *, capacity: int, n_rows: int = 1, recorder: Recorder | None = None
    ) -> None:
        """Load the graph, compiling it if no earlier process has.

        Args: capacity, the number of positions that the cache has room for; n_rows, the most rows
            that ``repeat`` will be asked for.
        Raises: ConfigError if there is no C++ compiler; ResourceError if the cache folder cannot
            be written.
        """
        super().__init__(model, capacity=round_up(capacity, _CPU_VIEW), recorder=recorder)
        self.min_rows = 2 if n_rows > 1 else 1
        # Positions that are not filled have weight 0, which NaN and inf would survive.
        self.cache.keys_LBGSD.zero_()
        self.cache.values_LBGSD.zero_()
        self._run = load_step(
            GraphStep(model, shows_attention=recorder is not None),
            cache_dtype=self.cache.keys_LBGSD.dtype,
            is_batch=n_rows > 1,
        )
        self._bind()

    def _bind(self) -> None:
        keys, values = self.cache.keys_LBGSD, self.cache.values_LBGSD
        self._tokens = torch.zeros(self.cache.n_rows, dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._view = torch.empty(self.cache.capacity, device=self.device)
        self._caches = [*keys.unbind(), *values.unbind()]
        self._replays: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def _decode(self, tokens: Tensor, position: int) -> StepOutput:
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        n_view = self._n_view(position + 1)
        inputs = [self._tokens, self._position, self._view[:n_view], *self._caches]
        if self.device.type != "cuda":
            return StepOutput(*self._run(inputs))
        if n_view not in self._replays:
            self._replays[n_view] = self._capture(inputs)
        graph, outputs = self._replays[n_view]
        graph.replay()
        return StepOutput(*outputs)

    def _n_view(self, n_filled: int) -> int:
        """Return how many positions to read, rounded up so that few different numbers occur."""
        if self.device.type == "cuda":
            n_view = max(_CUDA_VIEW, 1 << (n_filled - 1).bit_length())
        else:
            n_view = round_up(n_filled, _CPU_VIEW)
        return min(n_view, self.cache.capacity)

    def _capture(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Capture the kernels as a CUDA graph: one launch per token."""
        warm_up = torch.cuda.Stream(self.device)
        warm_up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warm_up):
            self._run(inputs)  # the first call's initialization must not be captured
        torch.cuda.current_stream(self.device).wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._run(inputs)
        return graph, outputs
