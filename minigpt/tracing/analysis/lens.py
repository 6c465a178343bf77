"""The logit lens: the model's prediction if it stopped after a given layer.

The residual stream after each layer goes through the final norm and the unembedding, which were
trained for the last layer only. A tuned lens trains a translator for each layer instead.

Sources: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023,
arXiv:2303.08112 (tuned lens).

Shapes: L layers, N = 2 L + 1 states of the residual stream, C model dim, V vocabulary.
"""

import torch
from torch import Tensor

from minigpt.model.device import widest_float
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import Tokenizer
from minigpt.tracing.findings import Candidate, Lens

_N_TOP = 3


@torch.inference_mode()
def read_lens(model: LanguageModel, residual_NC: Tensor, target: int, tokenizer: Tokenizer) -> Lens:
    """Return the probability of a token and the most probable tokens after each layer.

    Args: residual_NC, the residual stream of the query that predicted ``target``.
    """
    log_p_LV = model.logits(residual_NC[None, 2::2], 0)[0].float().log_softmax(dim=-1)
    values_LK, ids_LK = log_p_LV.topk(min(_N_TOP, log_p_LV.shape[1]))
    columns = (log_p_LV[:, target, None], values_LK, ids_LK)
    dtype = widest_float(log_p_LV.device)  # holds any id exactly
    packed = torch.cat([column.to(dtype) for column in columns], dim=1).tolist()
    n_top = values_LK.shape[1]
    top = tuple(
        tuple(
            Candidate(int(id_), tokenizer.token_bytes(int(id_)), log_p)
            for log_p, id_ in zip(row[1 : n_top + 1], row[n_top + 1 :], strict=True)
        )
        for row in packed
    )
    layer = len(top)
    while layer and top[layer - 1][0].id == target:
        layer -= 1
    return Lens(
        layer=layer if layer < len(top) else None,
        log_probabilities=tuple(row[0] for row in packed),
        top=top,
    )
