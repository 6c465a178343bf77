"""Queries, keys and values of chosen heads, to show how their weights are computed.

Shapes: B batch, T positions, H query heads, G key/value heads, D head dim.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.findings import HeadWorking
from minigpt.tracing.head_lists import HeadSelection, select_heads
from minigpt.tracing.recorder import RowRecorder


def explained_heads(model: LanguageModel, heads: str) -> HeadSelection:
    """Parse the heads to explain, such as ``4.2,5.*``.

    Raises: ConfigError for heads that do not exist, or a score that is not a dot product.
    """
    score = model.attentions[0].score
    if not score.is_dot_product:
        raise ConfigError(
            "--explain requires a scaled dot-product score: this model's is "
            f"{type(score).__name__}. Leave it out."
        )
    shape = model.config
    return select_heads(
        shape.n_attention_layer, shape.n_head, heads=heads, options=("--layers", "--explain")
    )


@torch.inference_mode()
def head_workings(
    model: LanguageModel, tokens: Sequence[int], selection: HeadSelection
) -> tuple[HeadWorking, ...]:
    """Return the workings of the chosen heads, from one forward pass over a text.

    Args: tokens, those of the text. If the last one is past the end of the context, it is dropped:
        no row belongs to its query.
    """
    tokens = tokens[: model.config.context_length]
    if len(tokens) < 2:
        return ()
    recorder = RowRecorder(model)
    recorder.needs_queries = True
    model(torch.tensor([list(tokens)], device=model.device), recorder=recorder, logits_to_keep=1)
    attention = recorder.attention
    assert attention.queries is not None
    assert attention.keys is not None
    workings = []
    for layer, heads in enumerate(selection.heads_by_layer):
        q_HTD, k_GTD = attention.queries[layer][0], attention.keys[layer][0]
        v_GTD = attention.values_LBGSD[layer, 0]
        n_shared = len(q_HTD) // len(k_GTD)
        for head in heads:
            group = head // n_shared
            workings.append(
                HeadWorking(
                    layer,
                    head,
                    scale=q_HTD.shape[-1] ** -0.5,
                    window=model.attentions[layer].score.window,
                    queries_TD=_numbers(q_HTD[head]),
                    keys_TD=_numbers(k_GTD[group]),
                    values_TD=_numbers(v_GTD[group]),
                )
            )
    return tuple(workings)


def _numbers(x_TD: Tensor) -> NDArray[np.float32]:
    return x_TD.float().cpu().numpy().copy()
