"""The products of a decode step: a few rows times a weight matrix, bound by reading the matrix.

Shapes: B rows, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.generation.fast.matvec import FEW_ROWS, Table, has_tables
from minigpt.generation.fast.quantize import NarrowLinear, joint_table
from minigpt.model.device import has_fast_bfloat16, has_slow_matvec

_FEW_ROWS_OF_FAST_MATMUL = 4  # where it is slow at one row only


class Product(Protocol):
    """Several linear layers of the same inputs, their outputs side by side."""

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Write the layers' outputs."""

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Add the layers' outputs."""


def make_product(layers: Sequence[nn.Module]) -> Product:
    """Return the product of these layers that this CPU computes fastest for a few rows.

    Where embedding_bag has fast kernels (x86): a table for int8, for bfloat16 whether or not there
    are instructions for it, and for float32 where MKL is slow. Else a matmul.
    The rule asks the hardware and nothing else: a choice by the clock would let the same seed draw
    other tokens on a busy day.

    Args: layers, all nn.Linear or all NarrowLinear; or one nn.Embedding, whose rows are outputs
        where embeddings are tied.
    """
    bias = _joined([getattr(layer, "bias", None) for layer in layers])
    narrow = [layer for layer in layers if isinstance(layer, NarrowLinear)]
    if narrow:
        if not has_tables(narrow[0].weight.device):
            return ModuleProduct(narrow)
        scale = _joined([layer.scale for layer in narrow])
        return TableProduct(joint_table(narrow), narrow, scale, bias)
    weights = [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]
    if has_tables(weights[0].device):
        few_rows = _few_rows(weights[0])
        if few_rows:
            return TableProduct(Table(torch.cat(weights)), layers, bias_O=bias, few_rows=few_rows)
    return MatrixProduct(side_by_side(weights), bias)


def _few_rows(weight: Tensor) -> int:
    """Return up to how many rows a table of this weight beats a matmul on this CPU."""
    if weight.dtype == torch.bfloat16:
        return _FEW_ROWS_OF_FAST_MATMUL if has_fast_bfloat16(weight.device) else FEW_ROWS
    return _FEW_ROWS_OF_FAST_MATMUL if has_slow_matvec(weight.device) else 0


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    there = [part.detach() for part in parts if part is not None]
    return torch.cat(there) if there else None


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
    """A table for few rows, and the layers themselves for many.

    Narrow layers have moved into theirs. Another table is a second copy of the weights, for the
    layers need the first: a bfloat16 model then takes as much memory as one in float32.
    """

    def __init__(
        self,
        table: Table,
        layers: Sequence[nn.Module],
        scale_O: Tensor | None = None,
        bias_O: Tensor | None = None,
        few_rows: int = FEW_ROWS,
    ) -> None:
        self.table, self.scale_O, self.bias_O = table, scale_O, bias_O
        self.few_rows = few_rows
        self._many_rows = ModuleProduct(layers)

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if len(x_BI) > self.few_rows:
            self._many_rows.into(x_BI, out_BO)
            return
        product = self.table.product(x_BI)
        if self.scale_O is not None and self.bias_O is not None:
            torch.addcmul(self.bias_O, product, self.scale_O, out=out_BO)
        elif self.scale_O is not None:
            torch.mul(product, self.scale_O, out=out_BO)
        elif self.bias_O is not None:
            torch.add(product, self.bias_O, out=out_BO)
        else:
            out_BO.copy_(product)

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if len(x_BI) > self.few_rows:
            self._many_rows.onto(x_BI, out_BO)
            return
        product = self.table.product(x_BI)
        if self.scale_O is not None:
            out_BO.addcmul_(product, self.scale_O)
        else:
            out_BO.add_(product)
        if self.bias_O is not None:
            out_BO.add_(self.bias_O)


class ModuleProduct:
    """What the layers themselves compute."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers

    def into(self, x_BI: Tensor, out_BO: Tensor) -> None:
        torch.cat([_applied(layer, x_BI) for layer in self._layers], dim=1, out=out_BO)

    def onto(self, x_BI: Tensor, out_BO: Tensor) -> None:
        for layer in self._layers:  # there is one
            out_BO.add_(_applied(layer, x_BI))


def _applied(layer: nn.Module, x_BI: Tensor) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return F.linear(x_BI, layer.weight)
    product: Tensor = layer(x_BI)
    return product
