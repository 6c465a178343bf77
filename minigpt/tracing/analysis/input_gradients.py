"""Forward passes from given embeddings, and the gradient of a token's logit with respect to them.

Shapes: B sequences, S positions, C model dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.measures import Prediction
from minigpt.tracing.shallow_copies import shallow_copy


def embeddings(model: LanguageModel, tokens: Sequence[int]) -> Tensor:
    """Return the tokens' rows of the embedding matrix (S, C), before any scaling by the model."""
    with torch.inference_mode(False), torch.no_grad():
        rows: Tensor = model.embedding(torch.tensor(tokens, device=model.device))
        return rows.detach()


def logit_at(model: LanguageModel, x_BSC: Tensor, prediction: Prediction) -> Tensor:
    """Return the logit of the predicted token (B,), float32, given the embeddings of all tokens.

    The logit of the alternative, if any, is subtracted.
    """
    tokens_BS = torch.zeros(x_BSC.shape[:2], dtype=torch.long, device=model.device)  # replaced
    changed = shallow_copy(model)
    changed.embedding.register_forward_hook(lambda *call: x_BSC)
    logits_BV = changed(tokens_BS, logits_to_keep=1)[:, -1].float()
    logit_B: Tensor = logits_BV[:, prediction.target]
    if prediction.against is not None:
        logit_B = logit_B - logits_BV[:, prediction.against]
    return logit_B


def gradients(model: LanguageModel, x_BSC: Tensor, prediction: Prediction) -> Tensor:
    """Return the gradient of ``logit_at`` with respect to the embeddings (B, S, C)."""
    with torch.inference_mode(False), torch.enable_grad():
        leaf_BSC = x_BSC.clone().requires_grad_()
        logit = logit_at(model, leaf_BSC, prediction).sum()
        return torch.autograd.grad(logit, leaf_BSC)[0]
