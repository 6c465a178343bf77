"""The products of a decode step: a few rows times a weight matrix, bound by reading the matrix.

Shapes: B rows, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from minigpt.model.quantized import Int8Linear
from minigpt.model.tables import FEW_ROWS, Table, has_tables


class Product(Protocol):
    """Several linear layers of the same inputs, their outputs side by side."""

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Write the layers' outputs."""

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Add the layers' outputs."""


def make_product(layers: Sequence[nn.Module]) -> Product:
    """Return the product of these layers that this CPU computes fastest for a few rows.

    The rule asks the hardware and nothing else: a choice by the clock would let the same seed draw
    other tokens on a busy day.

    Args: layers, all nn.Linear or all Int8Linear; or one nn.Embedding, to be multiplied by from the
        other side.
    """
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if not linears:
        quantized = [layer for layer in layers if isinstance(layer, Int8Linear)]
        return Int8Product(quantized) if quantized else _unembedding(layers[0].weight)
    weights = [linear.weight for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    bias = torch.cat(biases) if biases else None
    if _wants_table(weights[0]):
        return TableProduct(weights, bias)
    return MatrixProduct(side_by_side(weights), bias)


def _unembedding(weight: Tensor | nn.Module) -> Product:
    assert isinstance(weight, Tensor)
    # Its rows are looked up, too: they stay as they are.
    return TableProduct([weight]) if _wants_table(weight) else MatrixProduct(weight.detach().t())


def _wants_table(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and has_tables(weight.device)


class MatrixProduct:
    """A matmul with a weight laid out as (I, O).

    At batch 1, MKL reads it a tenth (GPT-2's) to a quarter (384 x 384) faster like this than as the
    (O, I) that nn.Linear has.
    """

    def __init__(self, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        self.weight_IO, self.bias_O = weight_IO, bias_O

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if self.bias_O is None:
            torch.mm(x_BI, self.weight_IO, out=out_BO)
        else:
            torch.addmm(self.bias_O, x_BI, self.weight_IO, out=out_BO)

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        out_BO.addmm_(x_BI, self.weight_IO)
        if self.bias_O is not None:
            out_BO.add_(self.bias_O)


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """Return (I, O): the transposed weights (O_i, I) next to each other.

    Weights that are not trained become views of it, so that there are not two of them; those that
    may be are copied, for how they lie in memory must not change what training computes.
    """
    joined = _as_they_lie(weights)
    if joined is not None:
        return joined
    sizes = [len(weight) for weight in weights]
    joined = weights[0].new_empty(weights[0].shape[1], sum(sizes))
    for weight, part in zip(weights, joined.split(sizes, dim=1), strict=True):
        part.copy_(weight.detach().t())
        if not weight.requires_grad:
            weight.data = part.t()
    return joined


def _as_they_lie(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the (I, O) that weights are views of; None if they are not."""
    first, n_inputs = weights[0], weights[0].shape[1]
    n_outputs = sum(len(weight) for weight in weights)
    at = first.storage_offset()
    for weight in weights:
        is_next = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not is_next or weight.storage_offset() != at or weight.stride() != (1, n_outputs):
            return None
        at += len(weight)
    return first.detach().as_strided((n_inputs, n_outputs), (n_outputs, 1))


class TableProduct:
    """A bfloat16 table, for CPUs that have instructions for bfloat16 and those that have none.

    It is a second copy of the weights, for the matmul of many rows needs the first: together as
    much memory as float32 takes.
    """

    def __init__(self, weights: Sequence[Tensor], bias_O: Tensor | None = None) -> None:
        self.weights, self.bias_O = [weight.detach() for weight in weights], bias_O
        self.table = Table(torch.cat(self.weights))

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if self.bias_O is None:
            out_BO.copy_(self._product(x_BI))
        else:
            torch.add(self._product(x_BI), self.bias_O, out=out_BO)

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        out_BO.add_(self._product(x_BI))
        if self.bias_O is not None:
            out_BO.add_(self.bias_O)

    def _product(self, x_BI: Tensor) -> Tensor:
        if len(x_BI) <= FEW_ROWS:
            return self.table.product(x_BI)
        return torch.cat([x_BI @ weight.t() for weight in self.weights], dim=1)


class Int8Product:
    """Int8 layers, each a table of its own where there are tables: there is no second copy."""

    def __init__(self, layers: Sequence[Int8Linear]) -> None:
        self.layers = layers
        self.sizes = [layer.out_features for layer in layers]
        for layer in layers:
            if has_tables(layer.scale.device):
                layer.use_table()

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if len(self.layers) == 1:
            out_BO.copy_(self.layers[0](x_BI))
            return
        for layer, part in zip(self.layers, out_BO.split(self.sizes, dim=1), strict=True):
            part.copy_(layer(x_BI))

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        for layer, part in zip(self.layers, out_BO.split(self.sizes, dim=1), strict=True):
            part.add_(layer(x_BI))
