"""Weights in 8 bits: a quarter of float32's memory, and of what a decode step reads.

Only weights are rounded, never activations (LLM.int8 and others round both, and lose more).

Shapes: I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.model.tables import FEW_ROWS, Table

_LARGEST = 127  # and -127: symmetric, zero is exact


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 times a scale per output: (..., I) -> (..., O)."""

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        """Args: weight (O, I), int8; scale (O,), in the dtype of the activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.table: Table | None = None
        """The weight as ``use_table`` has laid it out."""
        self._weight: Tensor | None
        self.scale: Tensor
        self.register_buffer("_weight", weight)
        self.register_buffer("scale", scale)
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(O, I), int8."""
        if self.table is not None:
            return self.table.weight()
        assert self._weight is not None
        return self._weight

    def use_table(self) -> Table:
        """Lay the weight out for few rows, instead of as it was: there are never two of it."""
        if self.table is None:
            self.table = Table(self.weight)
            self._weight = None
        return self.table

    def forward(self, x: Tensor) -> Tensor:
        if self.table is not None and x[..., 0].numel() <= FEW_ROWS:
            product = self.table.product(x.flatten(0, -2)).unflatten(0, x.shape[:-1]).to(x.dtype)
        else:
            product = F.linear(x, self.weight.to(x.dtype))  # exact: bfloat16 has 8 bits, too
        product = product * self.scale
        return product if self.bias is None else product + self.bias


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
        table = self.linear.table
        rows = self.linear.weight[tokens] if table is None else table.rows(tokens)
        return rows.to(self.scale.dtype) * self.scale[tokens].unsqueeze(-1)


@torch.no_grad()
def quantize_int8(model: GPT) -> None:
    """Round the weights of every product, the embedding's among them, to 8 bits, in place.

    Each output has a scale of its own, by which its largest weight is 127 or -127. Norms, biases
    and learned positions stay as they are. The model can then decode and be evaluated; it can be
    neither trained nor saved.
    Raises: ConfigError on a device that has no such products.
    """
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
