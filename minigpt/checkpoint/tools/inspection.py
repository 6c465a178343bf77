"""Looking at one model folder: what it says of its model, and whether it is whole."""

from dataclasses import dataclass
from pathlib import Path

from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.checkpoint.model_folder import read_config
from minigpt.checkpoint.weights import StoredTensor, stored_tensors
from minigpt.config import ModelConfig
from minigpt.errors import MinigptError
from minigpt.files import resource_errors
from minigpt.model import cost


@dataclass(frozen=True)
class ModelFacts:
    """A model as its config.json and the headers of its weights describe it."""

    folder: Path
    config: ModelConfig
    tensors: tuple[StoredTensor, ...]
    """In the model's order, from the embedding to the output projection."""

    @property
    def n_parameters(self) -> int:
        """Weights, each counted once."""
        return cost.parameter_count(self.config)

    @property
    def n_bytes(self) -> int:
        """Bytes that the stored weights take."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def training_flops_per_token(self) -> int:
        """FLOPs of a forward and backward pass over one token of a full context."""
        return cost.training_flops_per_token(self.config)

    @property
    def forward_flops_per_token(self) -> int:
        """FLOPs of a forward pass over one token of a full context: a backward one takes twice."""
        return self.training_flops_per_token // 3

    def cache_bytes_per_token(self, bytes_per_value: int) -> int:
        """Return the KV cache bytes that one position of one sequence takes."""
        return cost.cache_bytes_per_token(self.config, bytes_per_value)


def describe(folder: Path) -> ModelFacts:
    """Describe a model by its config.json and the headers of its weights; no weight is read.

    Raises: CheckpointError if the two do not fit, or the model is none that ours can compute.
    """
    config = read_config(folder)
    tensors = stored_tensors(config, folder).values()
    head_last = sorted(tensors, key=lambda tensor: tensor.name == "lm_head.weight")
    return ModelFacts(folder, config, tuple(head_last))


@dataclass(frozen=True)
class Verdict:
    """What a check of a model folder came to."""

    folder: Path
    has_manifest: bool
    """Whether each byte was compared with the manifest; else names and shapes with config.json."""
    problem: str | None
    """None if there is none."""


def check(folder: Path, *, is_step: bool) -> Verdict:
    """Compare a checkpoint with its manifest, or, if it has none, its headers with its config.

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
    return Verdict(folder, has_manifest, problem)
