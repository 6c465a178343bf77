"""Linear layers for the tokens of a prompt, where MKL is slow for a few dozen rows.

Shapes: I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt.generation.fast.matvec import has_slow_matvec


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Return ``F.linear``, with oneDNN where MKL is slow: 32 rows of GPT-2 take 39 ms, not 53."""
    onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    is_supported = x.dtype == weight_OI.dtype == torch.float32 and weight_OI.is_contiguous()
    is_supported = is_supported and not x.requires_grad  # oneDNN's product has no gradient
    if not is_supported or onednn_linear is None or not has_slow_matvec(x.device):
        return F.linear(x, weight_OI, bias_O)
    product: Tensor = onednn_linear(x, weight_OI, bias_O, "none", [], "")
    return product


class PromptLinear(nn.Linear):
    """The linear layer for a prompt's tokens in a model that decodes with a compiled graph."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def use_prompt_linears(model: nn.Module) -> None:
    """Turn the linear layers of a model into PromptLinear layers with the same weights."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = PromptLinear
