"""Decoding a GPT with a step that computes the logits after one new token in each row.

``GPT.forward`` is the definition. ``DecodeStep`` is the same computation for one query per row,
built from a set of kernels: eager ones, which need few calls, or those of a compiled graph.

Shapes: B rows, C model dim, V vocabulary, L layers, N = 2 L + 1 states of the residual stream, H
query heads, D head dim, S positions in view, X concatenated values of all heads.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from minigpt.generation.forward import PlainForward
from minigpt.model.attention import Attention, AttentionPass, Recorder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import MLP, GatedMLP

Function = Callable[[Tensor], Tensor]
Shown = Literal["nothing", "attention", "residual"]
"""Outputs of a step in addition to the logits; residual: attention and the residual stream."""
Add = Callable[[Tensor, Tensor], Tensor]
"""Residual stream and branch -> the stream plus a linear layer of the branch, perhaps in-place."""
Attend = Callable[[Tensor, Any, Any, Any], tuple[Tensor, Tensor]]
"""Normed stream, position, rotary, cache -> context (B, X) and weights (B, H, S)."""


class Kernels(Protocol):
    """The parts of a decode step, which define the types of position, rotary and cache."""

    def embed(self, tokens: Tensor, position: Any) -> Tensor:
        """Return the residual stream (B, C) of tokens (B,)."""

    def rotary(self, position: Any) -> Iterable[Any]:
        """Return the rotation of queries and keys for each layer."""

    def norm(self, module: nn.Module) -> Function:
        """Return a norm of the residual stream."""

    def attention(self, module: Attention) -> Attend:
        """Return the attention of a layer, which writes its key and value into the cache."""

    def hidden(self, module: MLP | GatedMLP) -> Function:
        """Return an MLP up to its activated hidden values."""

    def add(self, module: nn.Module) -> Add:
        """Return a linear layer that adds its output to the residual stream."""

    def unembed(self, module: nn.Module) -> Function:
        """Return the output projection; an embedding is used transposed."""


def shown_to(recorder: Recorder | None) -> Shown:
    """Return the outputs that a recorder needs from a step."""
    if recorder is None:
        return "nothing"
    return "residual" if recorder.needs_residual else "attention"


class DecodeStep:
    """Computes the logits after one more token in every row, as GPT.forward does."""

    def __init__(self, model: GPT, kernels: Kernels, shown: Shown) -> None:
        self._kernels, self._shown = kernels, shown
        self._d_head = model.config.d_head
        self._layers = [
            (
                kernels.norm(block.attention_norm),
                kernels.attention(block.attention),
                kernels.add(block.attention.output),
                kernels.norm(block.mlp_norm),
                kernels.hidden(block.mlp),
                kernels.add(block.mlp.down),
            )
            for block in model.blocks
            if isinstance(block, Block)
        ]
        self._final_norm = kernels.norm(model.final_norm)
        self._unembed = kernels.unembed(model.unembedding or model.embedding)

    def __call__(
        self,
        tokens: Tensor,
        position: Any,
        caches: Sequence[Any],
        keep: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, ...]:
        """Write the new keys and values into the caches, and attend to all positions up to them.

        Args: tokens (B,); position, the index of the new tokens; caches, one for each layer; keep,
            called with each state of the residual stream; if given, only logits are returned.
        Returns: logits (B, V); if ``shown`` is attention or residual, also the weights
            (L, B, H, S) and heads' outputs (L, B, H, D); if residual, also its states (N, B, C).
        """
        x = self._kernels.embed(tokens, position)
        weights, contexts, residual = [], [], []
        shown: Shown = "nothing" if keep else self._shown

        def keep_copy(x: Tensor) -> None:
            if shown == "residual":
                residual.append(x.clone())  # kernels may change x in-place

        keep = keep or keep_copy
        keep(x)
        for layer, rotary, cache in zip(
            self._layers, self._kernels.rotary(position), caches, strict=True
        ):
            attention_norm, attend, output, mlp_norm, hidden, down = layer
            context_BX, weights_BHS = attend(attention_norm(x), position, rotary, cache)
            if shown != "nothing":
                weights.append(weights_BHS)
                contexts.append(context_BX)
            x = output(x, context_BX)
            keep(x)
            x = down(x, hidden(mlp_norm(x)))
            keep(x)
        logits = self._unembed(self._final_norm(x))
        if shown == "nothing":
            return (logits,)
        context_LBHD = torch.stack(contexts).unflatten(2, (-1, self._d_head))
        results = logits, torch.stack(weights), context_LBHD
        return results if shown == "attention" else (*results, torch.stack(residual))


class StepForward(PlainForward):
    """Runs ``_decode`` for one new token per row, else ``_prompt`` for one row or GPT.forward."""

    min_rows = 1
    """Minimum number of rows of a step; the last row is repeated to reach it."""
    _prompt: Callable[[Tensor, KVCache, Recorder | None], Tensor] | None = None
    """Appends tokens (T,) to the cache and returns the logits (1, V). None for GPT.forward."""

    @property
    def keeps_passes(self) -> bool:  # type: ignore[override]
        return self.device.type == "cpu"  # a CUDA graph overwrites its outputs

    def _bind(self) -> None:
        """Allocate buffers for the number of rows that the cache now has."""
        raise NotImplementedError

    def _decode(self, tokens: Tensor, position: int) -> Sequence[Tensor]:
        """Run the step for tokens (B,) at a position; return the outputs of DecodeStep."""
        raise NotImplementedError

    @torch.inference_mode()
    def feed(self, tokens: Tensor) -> Tensor:
        n_rows, n_new = tokens.shape
        if n_new == 1 and self.cache.n_rows < self.min_rows:
            self.keep([0])
        if n_rows < self.cache.n_rows:  # the cache repeats the last row
            tokens = torch.cat((tokens, tokens[-1:].expand(self.cache.n_rows - n_rows, -1)))
        start, end = self.model.positions_of(tokens, self.cache)
        if n_new > 1:
            if self._prompt is None or self.cache.n_rows > 1:
                return super().feed(tokens)[:n_rows]
            return self._prompt(tokens[0], self.cache, self.recorder).float()
        self.cache.require_room(end)
        logits, *attention = self._decode(tokens[:, 0], start)
        self.cache.advance(1)
        if self.recorder is not None:
            weights_LBHS, context_LBHD, *residual = attention
            has_residual = bool(residual) and self.recorder.needs_residual
            self.recorder.record(
                AttentionPass(
                    weights_LBHS[:, :n_rows, :, :end],
                    context_LBHD[:, :n_rows],
                    self.cache.values_LBGSD[:, :n_rows, :, :end],
                    n_new=1,
                    residual_NBC=residual[0][:, :n_rows] if has_residual else None,
                )
            )
        return logits[:n_rows].float()

    def keep(self, rows: Sequence[int]) -> None:
        super().keep([*rows, *[rows[-1]] * (self.min_rows - len(rows))])
        self._bind()
