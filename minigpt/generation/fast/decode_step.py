"""One decode step of a GPT: the logits after one new token in each row.

``GPT.forward`` is the definition. This is the same computation for one query per row, with its
parts taken from a set of kernels: eager ones, made for few calls, or those of a compiled graph.

Shapes: B rows, C model dim, V vocabulary, L layers, H query heads, D head dim, S positions in view.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import MLP, GatedMLP

Function = Callable[[Tensor], Tensor]


class Attend(Protocol):
    """Attention of one layer, with its query, key and value projections."""

    def __call__(
        self, normed_BC: Tensor, position: Any, rotary: Any, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Write key and value into the cache; return context (B, H D) and weights (B, H, S)."""


class Add(Protocol):
    """A linear layer that ends a residual branch."""

    def __call__(self, x_BC: Tensor, branch: Tensor) -> Tensor:
        """Return x plus the layer's output, perhaps in-place."""


class Kernels(Protocol):
    """The parts of a decode step. What ``position``, ``rotary`` and ``cache`` are is up to them."""

    def embed(self, tokens: Tensor, position: Any) -> Tensor:
        """Return the residual stream (B, C) of tokens (B,)."""

    def rotary(self, position: Any) -> Sequence[Any]:
        """Return the rotation of queries and keys for each layer."""

    def norm(self, module: nn.Module) -> Function:
        """Return a norm of the residual stream."""

    def attention(self, layer: int, module: Attention) -> Attend:
        """Return the attention of a layer."""

    def hidden(self, module: MLP | GatedMLP) -> Function:
        """Return an MLP up to its activated hidden values."""

    def add(self, module: nn.Module) -> Add:
        """Return a linear layer that adds its output to the residual stream."""

    def unembed(self, module: nn.Module) -> Function:
        """Return the output projection; an embedding is used transposed."""

    def store(self, x: Tensor) -> Tensor:
        """Return x, materialized if a compiler could compute it again instead."""


@dataclass(frozen=True)
class _Layer:
    attention_norm: Function
    attend: Attend
    output: Add
    mlp_norm: Function
    hidden: Function
    down: Add


class DecodeStep:
    """The logits after one more token in every row, as GPT.forward computes them."""

    def __init__(self, model: GPT, kernels: Kernels) -> None:
        self._kernels = kernels
        self._layers = []
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            layer = _Layer(
                kernels.norm(block.attention_norm),
                kernels.attention(i, block.attention),
                kernels.add(block.attention.output),
                kernels.norm(block.mlp_norm),
                kernels.hidden(block.mlp),
                kernels.add(block.mlp.down),
            )
            self._layers.append(layer)
        self._final_norm = kernels.norm(model.final_norm)
        self._unembed = kernels.unembed(model.unembedding or model.embedding)

    def __call__(
        self, tokens: Tensor, position: Any, caches: Sequence[Any]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Write the new keys and values into the caches, and attend to all positions up to them.

        Args: tokens (B,); position, the index of the new tokens; caches, one for each layer.
        Returns: logits (B, V); of each layer the weights (B, H, S) and the contexts (B, H D).
        """
        kernels = self._kernels
        x = kernels.embed(tokens, position)
        weights, contexts = [], []
        for layer, rotary, cache in zip(
            self._layers, kernels.rotary(position), caches, strict=True
        ):
            context_BX, weights_BHS = layer.attend(layer.attention_norm(x), position, rotary, cache)
            weights.append(weights_BHS)
            contexts.append(context_BX)
            x = layer.output(x, context_BX)
            x = kernels.store(layer.down(x, layer.hidden(layer.mlp_norm(x))))
        return self._unembed(self._final_norm(x)), weights, contexts
