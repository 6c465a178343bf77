"""Write a model in another dtype, or with the files of its base model's folder."""

from pathlib import Path

import torch
from torch import Tensor

from minigpt.checkpoint.carried import Carried
from minigpt.checkpoint.config_json import config_json
from minigpt.checkpoint.model_folder import (
    TOKEN_IDS,
    TOKENIZER,
    name_of,
    new_files,
    weights_to_hf,
    write_parts,
)
from minigpt.checkpoint.tokenizer_json import tokenizer_files
from minigpt.model.language_model import LanguageModel
from minigpt.run_config import SaveDtype
from minigpt.text.tokenizer import Tokenizer


def write_as(
    folder: Path,
    model: LanguageModel,
    tokenizer: Tokenizer | None,
    carried: Carried | None,
    save_dtype: SaveDtype,
) -> bool:
    """Write a model folder like ``write_model``, with a base model's files or in another dtype.

    Args: carried, contents of the base model's folder to write again; save_dtype, of the stored
        weights, auto for the dtypes in ``carried``, else the model's. A tensor that overflows
        float16 keeps its own dtype.
    Returns: whether any weight was rounded.
    Raises: ResourceError as ``write_model``.
    """
    dtype = None if save_dtype == "auto" else getattr(torch, save_dtype)
    if carried is None:
        config, files = new_files(model, tokenizer)
        config["torch_dtype"] = name_of(dtype or model.embedding.weight.dtype)
    else:
        ours = config_json(model.config, tokenizer)
        config, files = carried.config_with(ours, model.config, dtype), dict(carried.files)
        has_vocabulary = TOKENIZER in files or {"vocab.json", "merges.txt"} <= files.keys()
        if tokenizer is not None and not has_vocabulary:
            files = tokenizer_files(tokenizer, model.config, is_new=False) | files
            config |= {name: ours[name] for name in TOKEN_IDS if config.get(name) is None}
    dtypes = carried.dtypes if carried else {}
    tensors = weights_to_hf(model)
    stored = {n: _rounded(t, dtype or dtypes.get(n, t.dtype)) for n, t in tensors.items()}
    write_parts(folder, config, files, stored)
    return any(
        stored[name].dtype.itemsize < tensor.dtype.itemsize for name, tensor in tensors.items()
    )


def _rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = tensor.to(dtype)
    is_overflow = dtype == torch.float16 and not torch.equal(rounded.isinf(), tensor.isinf())
    return tensor if is_overflow else rounded
