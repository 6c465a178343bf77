"""Convert a model's weights between Hugging Face's tensor names and ours."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minigpt.checkpoint.families import TensorName, family_of
from minigpt.checkpoint.model_folder import placed
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError


def tensor_names(config: ModelConfig) -> Iterator[TensorName]:
    """Yield the names of all tensors of a Hugging Face model, with prefix and block number."""
    # Largest first: each tensor is briefly in memory twice, which costs least before the others.
    family = family_of(config.model_type)
    if not config.tie_embeddings:
        yield TensorName(family.head, ("unembedding.weight",))
    for name in family.tensors(config):
        for i in range(config.n_layer if "{i}" in name.theirs else 1):
            ours = tuple(part.format(i=i) for part in name.ours)
            yield replace(name, theirs=family.prefix + name.theirs.format(i=i), ours=ours)


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, concatenate and transpose a state_dict to Hugging Face's tensors."""
    renamed = {}
    for name in tensor_names(config):
        parts = [tensors[part].unflatten(0, (name.n_groups, -1)) for part in name.ours]
        tensor = torch.cat(parts, dim=1).flatten(0, 1) if len(parts) > 1 else tensors[name.ours[0]]
        renamed[name.theirs] = (tensor.t() if name.is_transposed else tensor).contiguous()
    return renamed


def shapes_to_hf(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that ``tensors_to_hf`` returns."""
    renamed = {}
    for name in tensor_names(config):
        parts = [shapes[part] for part in name.ours]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        renamed[name.theirs] = shape[::-1] if name.is_transposed else shape
    return renamed


def tensors_from_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    place: Callable[[str, Tensor], Tensor] = lambda name, tensor: placed(tensor),
) -> dict[str, Tensor]:
    """Rename, transpose and split Hugging Face's tensors to a state_dict.

    Each is released before the next is requested, so if ``tensors`` reads them lazily, only one is
    in memory twice.

    Args: place, a function of our name and a tensor or view that returns the tensor to keep.
    Raises: CheckpointError if tied embeddings are stored as two different tensors; KeyError if a
        name is missing.
    """
    renamed: dict[str, Tensor] = {}
    for name in tensor_names(config):
        tensor = tensors[name.theirs]
        groups = (tensor.t() if name.is_transposed else tensor).unflatten(0, (name.n_groups, -1))
        shares = name.shares or (1,) * len(name.ours)
        sizes = [groups.shape[1] // sum(shares) * share for share in shares]
        parts = zip(name.ours, groups.split(sizes, dim=1), strict=True)
        renamed |= {ours: place(ours, part.flatten(0, 1)) for ours, part in parts}
        del tensor, groups, parts
    check_tied(config, tensors)
    return renamed


def tied_head(config: ModelConfig) -> str:
    """Return the name under which some files repeat a tied embedding; "" if it is not tied."""
    return family_of(config.model_type).head if config.tie_embeddings else ""


def check_tied(config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if tied embeddings are stored as two different tensors."""
    if (head := tied_head(config)) in tensors:
        embedding = next(tensor_names(config)).theirs
        if not torch.equal(tensors[head], tensors[embedding]):
            raise CheckpointError(
                f"config.json: tie_word_embeddings is true, but {head} differs from the embedding. "
                "Set it to false there."
            )
