"""Read a model's weights into the layout for decoding, without a second copy of them.

Each weight is converted when it is read from its file, and joined with those of the same input as
soon as the last of them is read: only one group is in memory twice at any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from minigpt.checkpoint.model_folder import placed
from minigpt.config import ModelConfig
from minigpt.generation.fast import is_compiled
from minigpt.generation.fast.idle import allow_idle_steps
from minigpt.generation.fast.matvec import has_matvec_kernels
from minigpt.generation.fast.products import join_weights, max_table_rows
from minigpt.generation.fast.prompts import use_prompt_linears
from minigpt.generation.fast.quantize import (
    WeightOnlyLinear,
    put_embedding,
    require_int8,
    to_int8,
)
from minigpt.model.device import keep_freed_memory, return_freed_memory
from minigpt.model.gpt import GPT, Block
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.model.layers import GatedMLP

Model = TypeVar("Model", bound=LanguageModel)


class WeightReader:
    """Converts the weights of linear layers and the embedding as they are read from files."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        activations: torch.dtype,
        quantizes: bool = False,
        joins: bool = False,
        is_compiled: bool = False,
    ) -> None:
        """Args: dtype, of the weights; quantizes, whether to quantize them to int8; joins, whether
        to lay them out for the eager decode step of a GPT on a CPU; is_compiled, whether it
        will be decoded through a compiled graph.

        Raises: ConfigError if int8 is not available.
        """
        if quantizes:
            require_int8(config, device)
        model = model_class(config).without_weights(config)
        self._device, self._dtype, self._activations = device, dtype, activations
        self._quantizes, self._is_compiled = quantizes, is_compiled
        # Whether linear layers are replaced by WeightOnlyLinear.
        self._wraps = quantizes or dtype != activations or (joins and max_table_rows(dtype) > 0)
        self._joins = joins and (has_matvec_kernels(device) or not self._wraps)
        self._groups: dict[str, list[str]] = {}
        if self._wraps or self._joins:
            for group in _groups(model, joins=self._joins):
                self._groups |= dict.fromkeys(group, group)
        if self._wraps and not config.tie_embeddings:
            self._groups["embedding"] = []  # only looked up
        self._weights: dict[str, Tensor | WeightOnlyLinear] = {}
        self._last = ""  # layer whose weight was read last
        return_freed_memory()

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """Return the tensor for the model: a placeholder without memory if ``finish`` sets it."""
        self._join()
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self._groups:
            return placed(tensor, self._device, self._activations)
        if self._quantizes:
            self._weights[layer] = to_int8(tensor, device=self._device, dtype=self._dtype)
        else:
            place = Tensor.to if self._joins else placed  # joining copies it anyway
            weight = place(tensor, self._device, self._dtype)
            wrapped = WeightOnlyLinear(weight, dtype=self._activations) if self._wraps else weight
            self._weights[layer] = wrapped
        self._last = layer
        placeholder = torch.empty(1, device=self._device, dtype=self._activations)
        return placeholder.expand(tensor.shape)

    def _join(self) -> None:
        """Join a complete group of layers, after the tensor read last has been released."""
        group = self._groups.get(self._last, []) if self._joins else []
        if group and all(layer in self._weights for layer in group):
            join_weights([self._weights[layer] for layer in group])
        self._last = ""

    def finish(self, model: LanguageModel) -> None:
        """Put the weights into the model."""
        self._join()
        keep_freed_memory()
        if self._is_compiled:
            use_prompt_linears(model)
        for name, weight in self._weights.items():
            layer = model.get_submodule(name)
            if isinstance(weight, Tensor):
                layer.weight = nn.Parameter(weight, requires_grad=False)
            elif name == "embedding":
                put_embedding(model, weight)
            else:
                weight.bias = getattr(layer, "bias", None)
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, weight)
        if self._joins or self._is_compiled:
            allow_idle_steps(model)


def make_reader(
    config: ModelConfig,
    *,
    device: torch.device,
    for_decoding: bool,
    compile: bool | None,
    n_rows: int,
    **options: Any,
) -> WeightReader:
    """Return the reader of a model.

    Args: for_decoding, whether to lay out the weights for the eager decode step, unless the model
        will be decoded with a compiled graph; compile and n_rows, as for ``fast.is_compiled``;
        options, dtype, activations and quantizes, as for ``WeightReader``.
    """
    for_decoding = for_decoding and device.type == "cpu" and model_class(config) is GPT
    compiled = False
    if for_decoding:
        meta_model = model_of_zeros(config, device=torch.device("meta"), **options)
        compiled = is_compiled(meta_model, compile, n_rows)
    joins = for_decoding and not compiled
    return WeightReader(config, device=device, joins=joins, is_compiled=compiled, **options)


def model_of_zeros(config: ModelConfig, *, device: torch.device, **options: Any) -> LanguageModel:
    """Return a model with zero weights; the arguments are those of ``build_model``.

    On the meta device, it uses no memory.
    """
    shapes = model_class(config).without_weights(config).state_dict()
    zeros = {name: torch.zeros(shape.shape, device=device) for name, shape in shapes.items()}
    return build_model(config, zeros, device=device, **options)


def build_model(
    config: ModelConfig, tensors: Mapping[str, Tensor], **options: Any
) -> LanguageModel:
    """Return a model for inference with these weights, laid out as when they are read from files.

    Args: options, as for ``WeightReader``.
    """
    reader = WeightReader(config, **options)
    read = {name: reader(name, tensor) for name, tensor in tensors.items()}
    model = model_class(config).from_tensors(config, read).eval().requires_grad_(False)
    reader.finish(model)
    return model


def prepare_for_decoding(model: Model, *, joins: bool = True, **options: Any) -> Model:
    """Return a copy of a model for inference, laid out as the eager decode step reads it.

    A step of a model that was not prepared copies its weights into this layout.

    Args: joins and options, as for ``WeightReader``; device and dtypes are the model's by default.
    """
    options = {"device": model.device, "dtype": model.dtype, "activations": model.dtype} | options
    prepared = build_model(model.config, model.state_dict(), joins=joins, **options)
    assert type(prepared) is type(model)
    return prepared


def _groups(model: LanguageModel, *, joins: bool) -> Iterator[list[str]]:
    """Yield the names of the layers whose weights are laid out together."""
    names = {module: name for name, module in model.named_modules()}
    if joins:
        assert isinstance(model, GPT)
        for layers in _joined_layers(model):
            yield [names[layer] for layer in layers]
    else:
        yield from ([n] for m, n in names.items() if isinstance(m, nn.Linear) or n == "embedding")


def _joined_layers(model: LanguageModel) -> Iterator[Sequence[nn.Module]]:
    """Yield the layers of each matrix product of a decode step: those that share an input."""
    # The largest first, while there is still memory for a second copy of it.
    yield [model.unembedding or model.embedding]
    for block in model.blocks:
        assert isinstance(block, Block)
        attention, mlp = block.attention, block.mlp
        up = [mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) else [mlp.up]
        yield [attention.query, attention.key, attention.value]
        yield [attention.output]
        yield up
        yield [mlp.down]
