"""Weights in 8 bits: a quarter of float32's memory, and of what a decode step reads.

Only weights are rounded, never activations (LLM.int8 and others round both, and lose more).

Shapes: I inputs, O outputs.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.language_model import LanguageModel
from minigpt.model.tables import FEW_ROWS, Table

_LARGEST = 127  # and -127: symmetric, zero is exact


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 times a scale per output: (..., I) -> (..., O)."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Args: weight (O, I), int8; scale (O,), in the dtype of the activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight: Tensor | None
        self.scale: Tensor
        self.register_buffer("_weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias
        self._table: Table | None = None
        self._start = 0

    @property
    def weight(self) -> Tensor:
        """(O, I), int8; a copy after ``move_into``."""
        if self._table is not None:
            return self._table.weight(self._start, self._start + self.out_features)
        assert self._weight is not None
        return self._weight

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weight's rows of these outputs, scaled: (..., I)."""
        if self._table is None:
            rows = self.weight[outputs]
        else:
            rows = self._table.rows(self._start + outputs)
        return rows.to(self.scale.dtype) * self.scale[outputs].unsqueeze(-1)

    def move_into(self, table: Table, start: int) -> None:
        """Let go of the weight, which is in a table from this output on."""
        self._table, self._start, self._weight = table, start, None

    def forward(self, x: Tensor) -> Tensor:
        if self._table is None:
            # bfloat16 has the 8 bits, too: the conversion is exact.
            product = F.linear(x, self.weight.to(x.dtype))
        else:
            product = self._from_table(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        product = product * self.scale
        return product if self.bias is None else product + self.bias

    def _from_table(self, x_BI: Tensor) -> Tensor:
        assert self._table is not None
        if len(x_BI) <= FEW_ROWS and self.out_features == self._table.n_outputs:
            return self._table.product(x_BI).to(x_BI.dtype)
        return self._table.matmul(x_BI, self._start, self._start + self.out_features)


def joint_table(layers: Sequence[Int8Linear]) -> Table:
    """Move layers of the same inputs into one table, if they are in none, and return it."""
    table = layers[0]._table
    if table is None:
        table = Table(torch.cat([layer.weight for layer in layers]))
        start = 0
        for layer in layers:
            layer.move_into(table, start)
            start += layer.out_features
    return table


class Int8Embedding(nn.Module):
    """An embedding whose rows are an Int8Linear's outputs: tokens (...) -> (..., I)."""

    def __init__(self, linear: Int8Linear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """(V, I), int8."""
        return self.linear.weight

    @property
    def scale(self) -> Tensor:
        """(V,): of each token's row."""
        return self.linear.scale

    def forward(self, tokens: Tensor) -> Tensor:
        return self.linear.rows(tokens)


@torch.no_grad()
def quantize_int8(model: LanguageModel) -> None:
    """Round the weights of every product, the embedding's among them, to 8 bits, in place.

    Each output has a scale of its own, by which its largest weight is 127 or -127. Norms, biases
    and learned positions stay as they are. The model can then decode and be evaluated; it can be
    neither trained nor saved.
    Raises: ConfigError on a device that has no such products, or for an LSTM.
    """
    if model.config.arch != "gpt":
        raise ConfigError(
            f"quantize int8 is for arch gpt: nothing of {model.config.arch} would be smaller but "
            "its embeddings. Leave it out."
        )
    if model.device.type == "mps":
        raise ConfigError(
            "quantize int8 is not available on mps. Use --device cpu, or leave it out."
        )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, _quantized(child.weight, child.bias))
    embedding = _quantized(model.embedding.weight)
    if model.config.tie_embeddings:
        model.unembedding = embedding
    setattr(model, "embedding", Int8Embedding(embedding))  # noqa: B010  typed as what it was


def _quantized(weight: Tensor, bias: Tensor | None = None) -> Int8Linear:
    largest = weight.abs().amax(dim=1).float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = (largest / _LARGEST).to(weight.dtype)  # the weights are rounded with what is stored
    steps = (weight.float() / scale.float()[:, None]).round().clamp(-_LARGEST, _LARGEST)
    return Int8Linear(steps.to(torch.int8), scale, bias)
