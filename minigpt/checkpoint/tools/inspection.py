"""Inspect one model folder: facts about its model, and whether it is damaged."""

from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.checkpoint.model_folder import read_config
from minigpt.checkpoint.weights import StoredTensor, stored_tensors
from minigpt.config import ModelConfig
from minigpt.errors import MinigptError
from minigpt.files import resource_errors
from minigpt.model import cache, cost


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model from its config.json and the headers of its weights."""

    folder: Path
    config: ModelConfig
    tensors: tuple[StoredTensor, ...]
    """Tensors in the order of the model, from the embedding to the output projection."""

    @property
    def n_parameters(self) -> int:
        """Number of parameters, each counted once."""
        return cost.parameter_count(self.config)

    @property
    def n_bytes(self) -> int:
        """Bytes of the stored weights."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def training_flops_per_token(self) -> int:
        """FLOPs of a forward and backward pass over one token of a full context."""
        return cost.training_flops_per_token(self.config)

    @property
    def forward_flops_per_token(self) -> int:
        """FLOPs of a forward pass over one token of a full context: a third of training's."""
        return self.training_flops_per_token // 3

    def cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Return the KV cache bytes of one position of one sequence."""
        return cache.cache_bytes_per_token(self.config, bytes_per_value)


def describe(folder: Path) -> ModelFacts:
    """Return the facts of a model; no weight is read.

    Raises: CheckpointError if config and weights do not fit, or we cannot compute the model.
    """
    config = read_config(folder)
    tensors = stored_tensors(config, folder).values()
    head_last = sorted(tensors, key=lambda tensor: tensor.name == "lm_head.weight")
    return ModelFacts(folder, config, tuple(head_last))


@dataclass(frozen=True)
class Check:
    """Result of checking a model folder."""

    folder: Path
    has_manifest: bool
    """Whether bytes were compared with the manifest; else names and shapes with config.json."""
    problem: str | None
    """What is wrong; None if nothing is."""


def check(folder: Path, *, is_step: bool) -> Check:
    """Compare a checkpoint with its manifest, or without one, its headers with its config.

    Args: is_step, whether it is a step of a run, which must have a manifest.
    """
    has_manifest = is_step or (folder / MANIFEST).is_file()
    problem = None
    try:
        with resource_errors(folder):
            if has_manifest:
                verify(folder, hashes=True)
            else:
                describe(folder)
    except MinigptError as error:
        problem = str(error).removeprefix(f"the checkpoint {str(folder)!r} is damaged: ")
    return Check(folder, has_manifest, problem)
