"""Inspect one model folder: facts about its model, and whether it is damaged."""

from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.checkpoint.model_folder import read_config, read_vocabulary
from minigpt.checkpoint.stored_tensors import StoredTensor, stored_tensors
from minigpt.config import ModelConfig
from minigpt.errors import MinigptError
from minigpt.files import resource_errors
from minigpt.model import cost
from minigpt.model.cache import cache_bytes_per_token
from minigpt.model_config import OWN_TYPE


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model from its config.json and the headers of its weights."""

    folder: Path
    config: ModelConfig
    n_parameters: int
    """Number of parameters, each counted once."""
    n_bytes: int
    """Bytes of the stored weights."""
    forward_flops_per_token: int
    """FLOPs of a forward pass over one token of a full context: a third of training's."""
    training_flops_per_token: int
    """FLOPs of a forward and backward pass over one token of a full context."""
    float32_cache_bytes_per_token: int
    """Bytes of one position of one sequence in a float32 KV cache."""
    bfloat16_cache_bytes_per_token: int
    """Bytes of one position of one sequence in a bfloat16 KV cache."""
    tensors: tuple[StoredTensor, ...]
    """Tensors in the order of the model, from the embedding to the output projection."""


def describe(folder: Path) -> ModelFacts:
    """Return the facts of a model; no weight is read.

    Raises: CheckpointError if config and weights do not match, or we cannot compute the model.
    """
    config = read_config(folder)
    tensors = list(stored_tensors(config, folder).values())
    if config.model_type != OWN_TYPE and not config.tie_embeddings:
        tensors.append(tensors.pop(0))  # the output projection is stored first, but listed last
    training_flops = cost.training_flops_per_token(config)
    return ModelFacts(
        folder,
        config,
        n_parameters=cost.parameter_count(config),
        n_bytes=sum(tensor.n_bytes for tensor in tensors),
        forward_flops_per_token=training_flops // 3,
        training_flops_per_token=training_flops,
        float32_cache_bytes_per_token=cache_bytes_per_token(config, 4),
        bfloat16_cache_bytes_per_token=cache_bytes_per_token(config, 2),
        tensors=tuple(tensors),
    )


@dataclass(frozen=True)
class Check:
    """Result of checking a model folder."""

    folder: Path
    has_manifest: bool
    """Whether files were compared with a manifest; if not, only headers with config.json."""
    problem: str | None
    """Description of the damage; None if there is none."""


def check(folder: Path, *, is_step: bool) -> Check:
    """Compare a checkpoint with its manifest.

    Without one, compare its weight headers with its config, and its tokenizer with its embedding.

    Args: is_step, whether it is a step of a run, which must have a manifest.
    """
    has_manifest = is_step or (folder / MANIFEST).is_file()
    problem = None
    try:
        with resource_errors(folder):
            if has_manifest:
                verify(folder, hashes=True)
            else:
                read_vocabulary(folder, describe(folder).config.vocab_size)  # it may warn
    except MinigptError as error:
        problem = str(error).removeprefix(f"the checkpoint {str(folder)!r} is damaged: ")
    return Check(folder, has_manifest, problem)
