"""A weight matrix laid out for few rows: their product is a weighted sum of a table's rows.

y = sum_i x_i W_i, where W_i is what input i adds to every output. torch has this sum as
embedding_bag, whose kernels on x86 (FBGEMM) convert bfloat16 and 8 bits as they read, prefetch, and
keep the sums in float32: measured, they read at the speed of memory where a matmul of one row
reaches a half.

Shapes: B rows, I inputs, O outputs; N blocks of W outputs each.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FEW_ROWS = 16
"""Up to so many rows, each of which reads the table, this is no slower than converting it for a
matmul, or than a matmul of bfloat16 without instructions for it (measured: 1, 2, 4, 16)."""

_WIDTH = 256  # a block's sums stay in a core's registers; 768 reads GPT-2 a third slower
_LEAST_WIDTH = 64
_ZERO = 128  # int8 is stored as uint8, which the kernel reads as a row's scale * value + offset


def has_tables(device: torch.device) -> bool:
    """Tell whether embedding_bag's fast kernels are there."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


class Table:
    """A float32, bfloat16 or int8 matrix (O, I) as rows of N blocks, each a bag of its own.

    Threads share the blocks. A block's sum is one in the order of the inputs, so that neither the
    number of threads nor of rows changes a bit of it.
    """

    def __init__(self, weight_OI: Tensor) -> None:
        self.n_outputs, self.n_inputs = weight_OI.shape
        self.dtype = weight_OI.dtype
        self._n_blocks, self._width = blocks(self.n_outputs, torch.get_num_threads())
        self._is_padded = self._n_blocks * self._width > self.n_outputs
        if self._is_padded:
            padding = self._n_blocks * self._width - self.n_outputs
            weight_OI = F.pad(weight_OI, (0, 0, 0, padding))
        table_NIW = weight_OI.unflatten(0, (self._n_blocks, self._width)).mT
        if self.dtype == torch.int8:
            tail = torch.tensor([1.0, -_ZERO]).view(torch.uint8)
            tail = tail.expand(self._n_blocks, self.n_inputs, -1)
            # + 128 in two's complement is the highest bit turned over.
            table_NIW = torch.cat((table_NIW.view(torch.uint8) ^ _ZERO, tail), dim=2)
        self._table = table_NIW.reshape(self._n_blocks * self.n_inputs, -1)
        self._bags: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def weight(self, start: int = 0, end: int | None = None) -> Tensor:
        """Return the matrix again, or its rows from start to end: (O, I), a copy."""
        end = self.n_outputs if end is None else end
        first = start // self._width
        stored_NIW = self._blocks()[first : -(-end // self._width)]
        stored_OI = stored_NIW.mT.reshape(-1, self.n_inputs)
        return self._as_given(stored_OI[start - first * self._width :][: end - start])

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the matrix's rows of these outputs: (..., I)."""
        block, place = outputs // self._width, outputs % self._width
        return self._as_given(self._blocks()[block, :, place])

    def _blocks(self) -> Tensor:
        return self._table.unflatten(0, (self._n_blocks, -1))[..., : self._width]  # (N, I, W)

    def _as_given(self, stored: Tensor) -> Tensor:
        return (stored ^ _ZERO).view(torch.int8) if self.dtype == torch.int8 else stored

    def matmul(self, x_BI: Tensor, start: int, end: int) -> Tensor:
        """Return x W^T, (B, end - start), of the outputs from start to end, for many rows."""
        first, last = start // self._width, -(-end // self._width)
        rows = self._table[first * self.n_inputs : last * self.n_inputs]
        if self.dtype == torch.int8:
            rows = torch.ops.quantized.embedding_bag_byte_unpack.default(rows)
        table_NIW = rows.to(x_BI.dtype).unflatten(0, (-1, self.n_inputs))
        product_NBW = torch.matmul(x_BI, table_NIW)
        product = product_NBW.transpose(0, 1).flatten(1)
        return product[:, start - first * self._width :][:, : end - start]

    def product(self, x_BI: Tensor) -> Tensor:
        """Return x W^T, (B, O), for few rows: of int8 float32, else as the table is."""
        n_rows = len(x_BI)
        if n_rows not in self._bags:
            self._bags[n_rows] = self._make_bags(n_rows)
        places, starts, factors_NBI, factors = self._bags[n_rows]
        factors_NBI.copy_(x_BI)
        if self.dtype == torch.int8:
            sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default(
                self._table, places, starts, False, 0, False, factors
            )
        else:
            sums = torch.embedding_bag(self._table, places, starts, False, 0, False, factors)[0]
        if n_rows > 1:  # (N B, W)
            sums = sums.unflatten(0, (-1, n_rows)).transpose(0, 1)
        sums = sums.reshape(n_rows, -1)
        return sums[:, : self.n_outputs] if self._is_padded else sums

    def _make_bags(self, n_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each bag's rows, where each bag starts, and a buffer for the factors, twice."""
        places = torch.arange(len(self._table), dtype=torch.int32).view(-1, 1, self.n_inputs)
        starts = torch.arange(self._n_blocks * n_rows, dtype=torch.int32) * self.n_inputs
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        factors_NBI = torch.empty(self._n_blocks, n_rows, self.n_inputs, dtype=dtype)
        return places.expand(-1, n_rows, -1).flatten(), starts, factors_NBI, factors_NBI.view(-1)


def blocks(n_outputs: int, n_threads: int) -> tuple[int, int]:
    """Return the number of blocks that outputs are cut into, and their width.

    A multiple of the threads, so that none waits; of these, the one that pads least.
    """
    least = -(-n_outputs // _WIDTH)
    most = max(least, n_outputs // _LEAST_WIDTH)
    multiples = [n for n in range(least, most + 1) if n % n_threads == 0] or [least]
    widths = [(-(-n_outputs // n // 16) * 16, n) for n in multiples]
    width, n_blocks = min(widths, key=lambda pair: (pair[0] * pair[1], pair[1]))
    return n_blocks, width
