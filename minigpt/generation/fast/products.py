"""Matrix products of a decode step: a few rows times a weight, bound by memory bandwidth.

Shapes: B rows, I inputs, O outputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from minigpt.generation.fast.matvec import (
    MatvecTable,
    has_matvec_kernels,
    has_slow_matvec,
    max_rows,
)
from minigpt.generation.fast.prompts import linear
from minigpt.generation.fast.quantize import WeightOnlyLinear
from minigpt.model.device import has_fast_bfloat16

_MAX_ROWS_OF_FAST_MATMUL = 4  # of a table, where a matmul is slow only for very few rows


class Product:
    """Linear layers of the same input, applied one by one, with concatenated outputs."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = layers

    def write(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Write the outputs to ``out_BO``."""
        torch.cat([self.apply(layer, x_BI) for layer in self._layers], dim=1, out=out_BO)

    def add(self, x_BI: Tensor, out_BO: Tensor) -> None:
        """Add the outputs to ``out_BO``."""
        for layer in self._layers:
            out_BO.add_(self.apply(layer, x_BI))

    @staticmethod
    def apply(layer: nn.Module, x_BI: Tensor) -> Tensor:
        """Return the output of a layer."""
        if isinstance(layer, nn.Linear | nn.Embedding):
            return linear(x_BI, layer.weight, getattr(layer, "bias", None))
        product: Tensor = layer(x_BI)
        return product


def make_product(layers: Sequence[nn.Module], *, copies: bool = True) -> Product:
    """Return the fastest product of these layers for a few rows on this CPU.

    Where embedding_bag has fast kernels (x86), this is a table for int8, bfloat16, and float32 if
    MKL is slow; otherwise it is a matmul. The choice depends on the hardware alone: with a choice
    by measured time, the same seed could sample different tokens on a busy machine.

    Args: layers, all nn.Linear or all WeightOnlyLinear; or one nn.Embedding, which is transposed
        (tied embeddings); copies, whether to copy weights that were not laid out by
        ``join_weights``.
    """
    bias_O = _concatenated([getattr(layer, "bias", None) for layer in layers])
    quantized = [layer for layer in layers if isinstance(layer, WeightOnlyLinear)]
    if quantized:
        table = quantized[0].table
        if table is None:
            if not copies or not has_matvec_kernels(quantized[0].weight.device):
                return Product(quantized)
            table = MatvecTable(*[layer.weight for layer in quantized])
        scale_O = _concatenated([layer.scale for layer in quantized])
        is_as_wide = table.dtype == quantized[0].dtype
        n_rows = max_table_rows(table.dtype) if is_as_wide else max_rows()
        return TableProduct(table, n_rows, scale_O, bias_O)
    weights = _weights(layers)
    n_rows = max_table_rows(weights[0].dtype)
    if n_rows and copies:
        return TableProduct(MatvecTable(*weights), n_rows, bias_O=bias_O)
    weight_IO = _transposed_view(weights)
    if weight_IO is None:
        if not copies:
            return Product(layers)
        weight_IO = torch.cat([weight.detach().t() for weight in weights], dim=1)
    return MatrixProduct(weight_IO, bias_O)


def join_weights(weights: Sequence[Tensor | WeightOnlyLinear]) -> None:
    """Lay out weights of the same input as ``make_product`` reads them, to avoid a copy there.

    Layers move into one table; tensors become views of one. Their values do not change.
    """
    layers = [weight for weight in weights if isinstance(weight, WeightOnlyLinear)]
    if layers:
        table, start = MatvecTable(*[layer.weight for layer in layers]), 0
        for layer in layers:
            layer.move_into(table, start)
            start += layer.out_features
        return
    tensors = [weight for weight in weights if isinstance(weight, Tensor)]
    sizes = [len(tensor) for tensor in tensors]
    joined_IO = tensors[0].new_empty(tensors[0].shape[1], sum(sizes))
    for tensor, part in zip(tensors, joined_IO.split(sizes, dim=1), strict=True):
        part.copy_(tensor.t())
        tensor.data = part.t()  # releases its memory before the next is copied


def _weights(layers: Sequence[nn.Module]) -> list[Tensor]:
    return [layer.weight for layer in layers if isinstance(layer.weight, Tensor)]


def max_table_rows(dtype: torch.dtype) -> int:
    """Return the number of rows up to which a table beats a matmul on this CPU; 0 for none.

    Args: dtype, of the weight and the activations.
    """
    device = torch.device("cpu")
    if not has_matvec_kernels(device):
        return 0
    if dtype == torch.bfloat16:
        return _MAX_ROWS_OF_FAST_MATMUL if has_fast_bfloat16(device) else max_rows()
    return _MAX_ROWS_OF_FAST_MATMUL if has_slow_matvec(device) else 0


def _concatenated(tensors: Sequence[Tensor | None]) -> Tensor | None:
    present = [tensor.detach() for tensor in tensors if tensor is not None]
    return torch.cat(present) if present else None


def _transposed_view(weights: Sequence[Tensor]) -> Tensor | None:
    """Return the (I, O) tensor that these weights are adjacent views of, or None."""
    first, n_inputs = weights[0], weights[0].shape[1]
    n_outputs = sum(len(weight) for weight in weights)
    offset = first.storage_offset()
    for weight in weights:
        is_shared = weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        is_adjacent = weight.storage_offset() == offset and weight.stride() == (1, n_outputs)
        if not (is_shared and is_adjacent):
            return None
        offset += len(weight)
    return first.detach().as_strided((n_inputs, n_outputs), (n_outputs, 1), first.storage_offset())


class MatrixProduct(Product):
    """A matmul with a weight stored as (I, O).

    For one row, MKL reads it 10% (GPT-2) to 25% (384 x 384) faster than the (O, I) weight of
    nn.Linear.
    """

    def __init__(self, weight_IO: Tensor, bias_O: Tensor | None = None) -> None:
        self.weight_IO, self.bias_O = weight_IO, bias_O

    def write(self, x_BI: Tensor, out_BO: Tensor) -> None:
        if self.bias_O is None:
            torch.mm(x_BI, self.weight_IO, out=out_BO)
        else:
            torch.addmm(self.bias_O, x_BI, self.weight_IO, out=out_BO)

    def add(self, x_BI: Tensor, out_BO: Tensor) -> None:
        out_BO.addmm_(x_BI, self.weight_IO)
        if self.bias_O is not None:
            out_BO.add_(self.bias_O)


class TableProduct(Product):
    """A product with a table, read once per row for few rows, and multiplied in blocks for many."""

    def __init__(
        self,
        table: MatvecTable,
        max_rows: int,
        scale_O: Tensor | None = None,
        bias_O: Tensor | None = None,
    ) -> None:
        """Args: max_rows, the number of rows up to which the table is read once per row."""
        self.table, self.max_rows = table, max_rows
        # Always bias + sums * scale in one call, in which two scalars would be slow.
        no_scale = torch.ones(table.n_outputs, dtype=table.dtype)
        self._scale_O = no_scale if scale_O is None else scale_O
        self._bias_O = torch.zeros_like(self._scale_O) if bias_O is None else bias_O
        self._has_bias = bias_O is not None

    def write(self, x_BI: Tensor, out_BO: Tensor) -> None:
        bias, sums, scale, out = self._terms(x_BI, out_BO)
        torch.addcmul(bias, sums, scale, out=out)

    def add(self, x_BI: Tensor, out_BO: Tensor) -> None:
        _, sums, scale, out = self._terms(x_BI, out_BO)
        out.addcmul_(sums, scale)
        if self._has_bias:
            out_BO.add_(self._bias_O)

    def _terms(self, x_BI: Tensor, out_BO: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return bias, sums, scale and a view of the outputs, in shapes that broadcast."""
        if len(x_BI) <= self.max_rows:
            return self._bias_O, self.table.product(x_BI), self._scale_O, out_BO
        sums = self.table.blocks(x_BI)
        shape = sums.shape[1:]
        bias, scale = self._bias_O.view(shape), self._scale_O.view(shape)
        return bias, sums, scale, out_BO.unflatten(1, shape)
