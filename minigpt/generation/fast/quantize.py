"""Weights stored narrower than a model computes, as a decode step is bound by reading them.

8 bits are a quarter of float32's memory, bfloat16 is half of it. Only weights are rounded, never
activations (LLM.int8 and others round both, and lose more).

Shapes: I inputs, O outputs.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.generation.fast.matvec import FEW_ROWS, Table
from minigpt.model.language_model import LanguageModel

_LARGEST = 127  # and -127: symmetric, zero is exact


class NarrowLinear(nn.Module):
    """A linear layer whose weight is bfloat16, or int8 times a scale: (..., I) -> (..., O)."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None
    ) -> None:
        """Args: weight (O, I); scale (O,), of each output, in the dtype of the activations."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._weight: Tensor | None
        self.scale: Tensor | None
        self.register_buffer("_weight", weight.detach())
        self.register_buffer("scale", scale)
        self.bias = bias
        self._table: Table | None = None
        self._start = 0

    @property
    def weight(self) -> Tensor:
        """(O, I), as it is stored; a copy after ``move_into``."""
        if self._table is not None:
            return self._table.weight(self._start, self._start + self.out_features)
        assert self._weight is not None
        return self._weight

    def dense_weight(self) -> Tensor:
        """Return the dequantized weight: (O, I), float32."""
        wide = self.weight.float()
        return wide if self.scale is None else wide * self.scale.float()[:, None]

    def rows(self, outputs: Tensor) -> Tensor:
        """Return the weight's rows of these outputs, scaled: (..., I)."""
        if self._table is None:
            rows = self.weight[outputs]
        else:
            rows = self._table.rows(self._start + outputs)
        if self.scale is None:
            return rows.float()
        return rows.to(self.scale.dtype) * self.scale[outputs].unsqueeze(-1)

    def move_into(self, table: Table, start: int) -> None:
        """Let go of the weight, which is in a table from this output on."""
        self._table, self._start, self._weight = table, start, None

    def forward(self, x: Tensor) -> Tensor:
        if self._table is None:
            # 8 bits fit into bfloat16, and those into float32: the conversion is exact.
            product = F.linear(x, self.weight.to(x.dtype))
        else:
            product = self._from_table(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        product = product if self.scale is None else product * self.scale
        return product if self.bias is None else product + self.bias

    def _from_table(self, x_BI: Tensor) -> Tensor:
        assert self._table is not None
        if len(x_BI) <= FEW_ROWS and self.out_features == self._table.n_outputs:
            return self._table.product(x_BI).to(x_BI.dtype)
        return self._table.matmul(x_BI, self._start, self._start + self.out_features)


def joint_table(layers: Sequence[NarrowLinear]) -> Table:
    """Move layers of the same inputs into one table, if they are in none, and return it."""
    table = layers[0]._table
    if table is None:
        weights = [layer.weight for layer in layers]
        table = Table(torch.cat(weights) if len(weights) > 1 else weights[0])
        start = 0
        for layer in layers:
            layer.move_into(table, start)
            start += layer.out_features
    return table


class NarrowEmbedding(nn.Module):
    """An embedding whose rows are a NarrowLinear's outputs: tokens (...) -> (..., I)."""

    def __init__(self, linear: NarrowLinear) -> None:
        super().__init__()
        self.linear = linear

    @property
    def weight(self) -> Tensor:
        """(V, I), as it is stored."""
        return self.linear.weight

    @property
    def scale(self) -> Tensor | None:
        """(V,), of each token's row."""
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
    _replace_products(model, _in_8_bits)


@torch.no_grad()
def widen_activations(model: LanguageModel) -> None:
    """Let a bfloat16 model compute in float32, the weights of its products staying bfloat16.

    For a CPU without bfloat16 instructions: it converts numbers as fast as it reads them, and
    computes with them several times slower than with float32. As with ``quantize_int8``, the model
    can then decode and be evaluated only.
    """
    _replace_products(model, NarrowLinear)
    for tensor in (*model.parameters(), *model.buffers(recurse=False)):  # no weight is among them
        tensor.data = tensor.data.float()


def _replace_products(
    model: LanguageModel, narrowed: Callable[[Tensor, Tensor | None], NarrowLinear]
) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, narrowed(child.weight, child.bias))
    embedding = narrowed(model.embedding.weight, None)
    if model.config.tie_embeddings:
        model.unembedding = embedding
    setattr(model, "embedding", NarrowEmbedding(embedding))  # noqa: B010  typed as what it was


def _in_8_bits(weight: Tensor, bias: Tensor | None) -> NarrowLinear:
    # In few passes and one copy: of an embedding, another copy would be the most memory ever taken.
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1, dtype=torch.float32)
    largest.clamp_(min=torch.finfo(torch.float32).tiny)
    scale = (largest / _LARGEST).to(weight.dtype)  # the weights are rounded with what is stored
    steps = (weight / scale.float()[:, None]).round_().clamp_(-_LARGEST, _LARGEST)
    return NarrowLinear(steps.to(torch.int8), bias, scale)
