"""Checkpoint averaging: the mean of the weights of several checkpoints of one run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from minigpt.checkpoint.model_folder import LoadedModel, read_model
from minigpt.errors import CheckpointError


@torch.no_grad()
def average(folders: Sequence[Path]) -> LoadedModel:
    """Average the weights of checkpoints in float32.

    Args: folders, at least one; two models are in memory at a time.
    Returns: the averaged model, with the tokenizer of the first checkpoint.
    Raises: CheckpointError if one is damaged, or its config differs from the first one's.
    Source: Polyak and Juditsky 1992, doi:10.1137/0330046; Vaswani et al. 2017, arXiv:1706.03762,
        section 6.1; Izmailov et al. 2018, arXiv:1803.05407.
    """
    loaded = read_model(folders[0], dtype=torch.float32, is_exact=True)
    means = loaded.model.state_dict()  # not copies: updating them in place updates the model
    for n_models, folder in enumerate(folders[1:], start=2):
        model = read_model(folder, dtype=torch.float32, is_exact=True).model
        if replace(model.config, dropout=loaded.model.config.dropout) != loaded.model.config:
            raise CheckpointError(
                f"{str(folder)!r} has a different config from {str(folders[0])!r}. Average "
                "checkpoints of one run."
            )
        for name, tensor in model.state_dict().items():
            means[name].lerp_(tensor, 1 / n_models)
    return loaded
