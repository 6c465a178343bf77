"""Models whose weights are laid out in memory as those of a loaded model."""

import torch

from minigpt.generation.fast.reading import Model, prepare_for_decoding


def in_int8(model: Model) -> Model:
    """Return a model with weights quantized to int8."""
    return prepare_for_decoding(model, quantizes=True, joins=False)


def in_bfloat16(model: Model) -> Model:
    """Return a model with bfloat16 weights and float32 activations, as on most CPUs."""
    kinds = {"dtype": torch.bfloat16, "activations": torch.float32}
    return prepare_for_decoding(model, joins=False, **kinds)
