"""Models whose weights are laid out in memory as those of a loaded model."""

from typing import Any, TypeVar

import torch

from minigpt.generation.fast.reading import build_model
from minigpt.model.language_model import LanguageModel

Model = TypeVar("Model", bound=LanguageModel)


def laid_out(model: Model, **options: Any) -> Model:
    """Return a copy of a model, for inference. Args: options, as for ``WeightReader``."""
    kinds = {"device": model.device, "dtype": model.dtype, "activations": model.dtype}
    read = build_model(model.config, model.state_dict(), **kinds | options)
    assert type(read) is type(model)
    return read


def in_int8(model: Model) -> Model:
    """Return a model with weights quantized to int8."""
    return laid_out(model, quantizes=True)


def in_bfloat16(model: Model) -> Model:
    """Return a model with bfloat16 weights and float32 activations, as on most CPUs."""
    return laid_out(model, dtype=torch.bfloat16, activations=torch.float32)
