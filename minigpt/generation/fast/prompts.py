"""Linear layers for the tokens of a prompt, where MKL multiplies a few dozen rows slowly.

Shapes: I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.generation.fast.matvec import has_slow_matvec


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``F.linear``, by oneDNN where MKL is slow: 32 rows of GPT-2 take 39 ms, not 53."""
    by_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    is_served = x.dtype == weight_OI.dtype == torch.float32 and weight_OI.is_contiguous()
    # oneDNN's product has no gradient.
    if not is_served or x.requires_grad or by_onednn is None or not has_slow_matvec(x.device):
        return F.linear(x, weight_OI, bias_O)
    product: Tensor = by_onednn(x, weight_OI, bias_O, "none", [], "")
    return product


class PromptLinear(nn.Linear):
    """A linear layer of a model that decodes through a compiled graph, for the prompt's tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_prompt_linears(model: nn.Module) -> None:
    """Make the linear layers of a model PromptLinear ones, with their weights as they are."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PromptLinear
