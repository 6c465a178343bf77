"""Models with bfloat16 weights and float32 activations, as a CPU without bfloat16 reads them."""

import torch

from minigpt.generation.fast.quantize import WeightOnlyLinear, use_weight_only_layers
from minigpt.model.language_model import LanguageModel


@torch.no_grad()
def use_float32_activations(model: LanguageModel) -> None:
    """Make a bfloat16 model compute in float32, with bfloat16 weights, in-place."""
    use_weight_only_layers(model)
    for module in model.modules():
        if isinstance(module, WeightOnlyLinear):
            module.dtype = torch.float32
    for tensor in (*model.parameters(), *model.buffers(recurse=False)):
        tensor.data = tensor.data.float()
