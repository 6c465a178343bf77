"""Weight-only quantization: weights in int8 or bfloat16, activations in a wider type.

A decode step is bound by reading the weights: int8 takes a quarter of float32's memory, bfloat16
half. Activations are not quantized (LLM.int8 and others quantize both, and lose more accuracy).

Shapes: I inputs, O outputs, V vocabulary.
"""

import torch
from torch import Tensor, nn

from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.generation.fast.matvec import MAX_ROWS, MatvecTable, max_rows
from minigpt.generation.fast.prompts import linear
from minigpt.model.language_model import LanguageModel

_MAX_INT8 = 127  # symmetric, so that zero is exact
_ROWS_AT_ONCE = 4096
_VALUES_AT_ONCE = 2**20  # to round: a copy of a large embedding would set the peak memory
_CACHED_ROWS = 512
"""Rows converted together of a large weight: their float32 copy fits a CPU's cache. GPT-2's logits
take a quarter of the time of converting all rows, and two to three times as long with 128."""


class WeightOnlyLinear(nn.Module):
    """A linear layer with a weight in bfloat16, or in int8 with a scale: (..., I) -> (..., O)."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Args: weight (O, I); scale (O,), of each output; dtype, of the activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight: Tensor | None
        self.scale: Tensor | None
        self.register_buffer("_weight", weight.detach())
        self.register_buffer("scale", scale)
        self.bias: Tensor | None = None
        self.dtype = dtype
        self.table: MatvecTable | None = None
        """Table that contains the weight after ``move_into``."""
        self._start = 0

    @property
    def weight(self) -> Tensor:
        """Stored weight (O, I), without the scale; a copy after ``move_into``."""
        if self.table is not None:
            return self.table.weight(self._start, self._start + self.out_features)
        assert self._weight is not None
        return self._weight

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the stored weight."""
        return self.weight.dtype if self.table is None else self.table.dtype

    def dense_weight(self) -> Tensor:
        """Return the dequantized weight: (O, I), float32."""
        weight = self.weight.float()
        return weight if self.scale is None else weight * self.scale.float()[:, None]

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the dequantized rows of these outputs: (..., I)."""
        if self.table is None:
            rows = self.weight[outputs]
        else:
            rows = self.table.rows(self._start + outputs)
        rows = rows.to(self.dtype)
        return rows if self.scale is None else rows * self.scale[outputs].unsqueeze(-1)

    def move_into(self, table: MatvecTable, start: int) -> None:
        """Release the weight, which the table contains from output ``start`` on."""
        self.table, self._start, self._weight = table, start, None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cuda" and self.scale is not None and _is_few(x, MAX_ROWS):
            # The kernel reads the weight once for each row, and converts it in registers. It
            # assumes that float32 rows are contiguous, without checking the strides.
            x_BI = x.flatten(0, -2).contiguous()
            product = torch._weight_int8pack_mm(x_BI, self.weight, self.scale)
            product = product.unflatten(0, x.shape[:-1])
            return product if self.bias is None else product + self.bias
        if self.table is None:
            # int8 fits into bfloat16, and bfloat16 into float32: the conversion is exact. Large
            # weights are converted in parts, which lowers the peak memory and takes less time.
            is_large = len(self.weight) > _ROWS_AT_ONCE
            parts = self.weight.split(_CACHED_ROWS if is_large else _ROWS_AT_ONCE)
            product = torch.cat([linear(x, part.to(x.dtype)) for part in parts], dim=-1)
        else:
            product = self._from_table(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        if self.scale is not None:
            # In-place where the dtype allows: a copy of the logits would set the peak memory.
            is_same = self.scale.dtype == product.dtype
            product = product.mul_(self.scale) if is_same else product * self.scale
        return product if self.bias is None else product + self.bias

    def _from_table(self, x_BI: Tensor) -> Tensor:
        assert self.table is not None
        if _is_few(x_BI, max_rows()) and self.out_features == self.table.n_outputs:
            return self.table.product(x_BI).to(x_BI.dtype)
        return self.table.matmul(x_BI, self._start, self._start + self.out_features)


def _is_few(x: Tensor, n_rows: int) -> bool:
    """Return whether x (..., I) can use kernels for up to n rows, which have no gradient."""
    return x.numel() <= n_rows * x.shape[-1] and not x.requires_grad


class WeightOnlyEmbedding(nn.Module):
    """An embedding whose rows are those of a WeightOnlyLinear: tokens (...) -> (..., I)."""

    def __init__(self, linear: WeightOnlyLinear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """Stored weight (V, I), without the scale."""
        return self.linear.weight

    @property
    def scale(self) -> Tensor | None:
        """Scale of each token's row (V,)."""
        return self.linear.scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear.rows(tokens)


def require_int8(config: ModelConfig, device: torch.device) -> None:
    """Raise ConfigError for a device without int8 products, or for an LSTM."""
    if config.arch != "gpt":
        raise ConfigError(
            f"quantize int8 needs arch gpt: with arch {config.arch}, it would only shrink the "
            "embeddings. Leave it out."
        )
    if device.type == "mps":
        raise ConfigError(
            "quantize int8 is not available on mps. Use --device cpu, or leave it out."
        )


def put_embedding(model: LanguageModel, embedding: WeightOnlyLinear) -> None:
    """Use a weight as the embedding of a model and, if tied, as its output projection."""
    if model.config.tie_embeddings:
        model.unembedding = embedding
    setattr(model, "embedding", WeightOnlyEmbedding(embedding))  # noqa: B010  another type


def to_int8(weight: Tensor, *, device: torch.device, dtype: torch.dtype) -> WeightOnlyLinear:
    """Return a layer with a weight (O, I) in int8; its bias is set later.

    Each output has a scale, by which its largest weight is 127 or -127.

    Args: device and dtype, to which the weight is moved before rounding.
    """
    steps = torch.empty(weight.shape, dtype=torch.int8, device=device)
    scale = torch.empty(len(weight), dtype=dtype, device=device)
    if weight.is_meta:  # on meta, a maximum would import the compiler: 80 MB of memory
        return WeightOnlyLinear(steps, scale, dtype=dtype)
    n_rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
    parts = (tensor.split(n_rows) for tensor in (weight, steps, scale))
    for rows, rounded, unit in zip(*parts, strict=True):
        exact = rows.to(device, dtype)
        largest = exact.abs().amax(1).float()  # a norm of inf takes 15 times as long
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        unit.copy_(largest / _MAX_INT8)  # round with the scale as it is stored
        exact = exact / unit.float()[:, None]
        rounded.copy_(exact.round_().clamp_(-_MAX_INT8, _MAX_INT8))
    return WeightOnlyLinear(steps, scale, dtype=dtype)
