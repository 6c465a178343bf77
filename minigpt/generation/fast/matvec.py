"""Matrix-vector products with embedding_bag, for a few rows at a time.

y = sum_i x_i W[:, i] is a weighted sum of the rows of a table. torch's embedding_bag kernels on x86
(FBGEMM) convert bfloat16 and int8 as they read, prefetch, and sum in float32: they use the full
memory bandwidth, while a matmul of one row reaches half of it.

Shapes: B rows, I inputs, O outputs; N blocks of W outputs each.
"""

from functools import cache
from threading import get_ident

import torch
from torch import Tensor

MAX_ROWS, _MAX_ROWS_OF_AVX2 = 16, 10
"""Number of rows up to which a table, read once per row, is no slower than converting it for a
matmul, or than a bfloat16 matmul without bfloat16 instructions. Measured: 1, 2, 4 and 16 with
AVX512; 2 to 16 with AVX2, where 12 rows take 1.1 and 16 rows 1.3 to 1.6 times as long."""
_MAX_WIDTH, _MAX_WIDTH_OF_AVX2 = 256, 112
"""Widest block whose sums stay in registers, of AVX512 and of AVX2. With wider ones, GPT-2 is read
a third slower; with 256 on AVX2, it takes 1.1 (float32) to 1.5 times as long (int8)."""
_MIN_WIDTH = 64
_ZERO = 128  # int8 is stored as uint8; the kernel computes scale * value + offset per row


def has_matvec_kernels(device: torch.device) -> bool:
    """Return whether embedding_bag has fast kernels on this device."""
    return device.type == "cpu" and "fbgemm" in torch.backends.quantized.supported_engines


@cache
def max_rows() -> int:
    """Return the number of rows up to which a table is the fastest product on this CPU."""
    return MAX_ROWS if _has_avx512() else _MAX_ROWS_OF_AVX2


def _has_avx512() -> bool:
    return bool(torch.cpu.get_capabilities().get("avx512_f", False))


def has_slow_matvec(device: torch.device) -> bool:
    """Return whether float32 products of few rows are slow: those of MKL on CPUs not from Intel.

    Measured with GPT-2's matrices: one row reaches a third of the memory bandwidth on an AMD CPU
    with AVX512, 90% on Intel.
    """
    if device.type != "cpu" or not torch.backends.mkl.is_available():
        return False
    return "Intel" not in str(torch.cpu.get_capabilities().get("cpu_name", ""))


class MatvecTable:
    """A float32, bfloat16 or int8 matrix (O, I), transposed and cut into N blocks of outputs.

    Each block is one bag. The blocks are divided among threads, and each sum is in the order of the
    inputs, so the result does not depend on the number of threads or rows.
    """

    def __init__(self, *weights_OI: Tensor) -> None:
        """Args: weights_OI, of one dtype, whose outputs are concatenated.

        Blocks are copied one by one, so that no other copy of a large matrix is made.
        """
        self.n_outputs, self.n_inputs = sum(map(len, weights_OI)), weights_OI[0].shape[1]
        self.dtype = weights_OI[0].dtype
        self._n_blocks, self._width = split_into_blocks(self.n_outputs, torch.get_num_threads())
        self._is_padded = self._n_blocks * self._width > self.n_outputs
        is_int8 = self.dtype == torch.int8
        tail = torch.tensor([1.0, -_ZERO] if is_int8 else []).view(torch.uint8)
        self._table = torch.empty(
            self._n_blocks * self.n_inputs,
            self._width + len(tail),
            dtype=torch.uint8 if is_int8 else self.dtype,
        )
        self._table[:, self._width :] = tail
        blocks_NIW, start = self._blocks(), 0
        blocks_NIW[self.n_outputs // self._width :] = _ZERO if is_int8 else 0  # padding
        for weight_OI in weights_OI:
            for part in weight_OI.split_with_sizes(self._pieces(start, len(weight_OI))):
                # Adding 128 in two's complement flips the highest bit.
                stored = part.view(torch.uint8) ^ _ZERO if is_int8 else part
                block, place = divmod(start, self._width)
                blocks_NIW[block, :, place : place + len(part)] = stored.t()
                start += len(part)
        self._bags: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def weight(self, start: int = 0, end: int | None = None) -> Tensor:
        """Return a copy of the matrix, or of its rows from start to end: (O, I)."""
        end = self.n_outputs if end is None else end
        first = start // self._width
        stored_NIW = self._blocks()[first : -(-end // self._width)]
        stored_OI = stored_NIW.mT.reshape(-1, self.n_inputs)
        return self._as_stored(stored_OI[start - first * self._width :][: end - start])

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the rows of the matrix for these outputs: (..., I)."""
        block, place = outputs // self._width, outputs % self._width
        return self._as_stored(self._blocks()[block, :, place])

    def _pieces(self, start: int, n_outputs: int) -> list[int]:
        """Split the outputs from ``start`` on at the borders of blocks; return the sizes."""
        first = min(n_outputs, -start % self._width)
        n_whole, last = divmod(n_outputs - first, self._width)
        return [n for n in (first, *[self._width] * n_whole, last) if n]

    def _blocks(self) -> Tensor:
        return self._table.unflatten(0, (self._n_blocks, -1))[..., : self._width]  # (N, I, W)

    def _as_stored(self, stored: Tensor) -> Tensor:
        return (stored ^ _ZERO).view(torch.int8) if self.dtype == torch.int8 else stored

    def matmul(self, x_BI: Tensor, start: int, end: int) -> Tensor:
        """Return x W^T for the outputs from start to end, (B, end - start), for many rows."""
        first, last = start // self._width, -(-end // self._width)
        product = self._products(x_BI, first, last).flatten(1)
        return product[:, start - first * self._width :][:, : end - start]

    def blocks(self, x_BI: Tensor) -> Tensor:
        """Return x W^T for many rows as a view (B, N, W), or (B, 1, O) if blocks are padded."""
        product_BNW = self._products(x_BI, 0, self._n_blocks)
        if self._is_padded:
            return product_BNW.flatten(1)[:, None, : self.n_outputs]
        return product_BNW

    def _products(self, x_BI: Tensor, first: int, last: int) -> Tensor:
        rows = self._table[first * self.n_inputs : last * self.n_inputs]
        if self.dtype == torch.int8:
            rows = torch.ops.quantized.embedding_bag_byte_unpack.default(rows)
        table_NIW = rows.to(x_BI.dtype).unflatten(0, (-1, self.n_inputs))
        return torch.matmul(x_BI, table_NIW).transpose(0, 1)

    def product(self, x_BI: Tensor) -> Tensor:
        """Return x W^T, (B, O), for few rows, in the dtype of the table; float32 for int8."""
        n_rows = len(x_BI)
        key = n_rows, get_ident()  # the buffer of one thread is not for another
        if key not in self._bags:
            with torch.inference_mode(False):  # tensors of inference mode cannot change outside it
                self._bags[key] = self._make_bags(n_rows)
        places, starts, factors_NBI, factors = self._bags[key]
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
        """Return the rows and the start of each bag, and two views of a buffer for the factors."""
        places = torch.arange(len(self._table), dtype=torch.int32).view(-1, 1, self.n_inputs)
        starts = torch.arange(self._n_blocks * n_rows, dtype=torch.int32) * self.n_inputs
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        factors_NBI = torch.empty(self._n_blocks, n_rows, self.n_inputs, dtype=dtype)
        return places.expand(-1, n_rows, -1).flatten(), starts, factors_NBI, factors_NBI.view(-1)


def split_into_blocks(n_outputs: int, n_threads: int) -> tuple[int, int]:
    """Return the number of blocks of outputs, and their width.

    If possible, the number of blocks is a multiple of the threads, with the least padding.
    """
    least = -(-n_outputs // (_MAX_WIDTH if _has_avx512() else _MAX_WIDTH_OF_AVX2))
    most = max(least, n_outputs // _MIN_WIDTH)
    multiples = [n for n in range(least, most + 1) if n % n_threads == 0] or [least]
    widths = [(-(-n_outputs // n // 16) * 16, n) for n in multiples]
    width, n_blocks = min(widths, key=lambda pair: (pair[0] * pair[1], pair[1]))
    return n_blocks, width
