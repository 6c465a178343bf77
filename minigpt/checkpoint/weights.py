"""The weights of a model folder: what safetensors headers say of them, and reading them."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt.checkpoint.families import OWN_TYPE
from minigpt.checkpoint.tensor_names import canonical_names, tensors_to_hf
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError
from minigpt.files import read_json, resource_errors
from minigpt.model.registry import model_class

WEIGHTS = "model.safetensors"

_HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Of one value of each dtype that is read."""
_BLOCK_BYTES = 2**20
_LARGEST_WIDTH = 2**28
_LARGEST_CONTEXT = 2**20  # rotary tables of all positions are made


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies, and what its header says."""

    path: Path
    """Its file."""
    name: str
    """As it is there."""
    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it, such as BF16."""

    @property
    def n_bytes(self) -> int:
        """Bytes that its values take."""
        return math.prod(self.shape) * _BYTES[self.dtype]


class Weights(Mapping[str, Tensor]):
    """Tensors by canonical name, each read when it is asked for."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        with _opened(stored.path) as file:
            tensor: Tensor = file.get_tensor(stored.name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # Read, not mapped: a file that shrinks under a mapping kills the process (SIGBUS).
        with resource_errors(path), safe_open(path, framework="pt", backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no whole safetensors file ({str(error)[:120]!r}). "
            "Write or download it again."
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / _INDEX).exists():
        shards = read_json(folder / _INDEX).get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        # Nothing outside the folder is opened, whatever the index says.
        if names and all(isinstance(n, str) and re.fullmatch(r"[\w.-]+", n) for n in names):
            return [folder / name for name in sorted(set(names))]
        raise CheckpointError(
            f"{str(folder / _INDEX)!r} does not map tensors to files of its folder. "
            "Download it again."
        )
    pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
        path.name for path in folder.glob("*.pt*")
    )
    if pickled:
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {pickled[0]!r}, a pickle, which can run any code "
            f"and is never opened. Save the model as {WEIGHTS}."
        )
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}. Write or download it again.")


def stored_tensors(config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    """Compare names, shapes and dtypes with what the config asks for, from the headers alone.

    Returns: the tensors by the names that ``tensors_from_hf`` takes, in the model's order.
    Raises: CheckpointError naming the file or tensor, what is wrong with it and the remedy.
    """
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        with _opened(path) as file:
            for name, stored in canonical_names(config, file.keys()).items():
                header = file.get_slice(stored)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if found.setdefault(name, StoredTensor(path, stored, shape, dtype)).path != path:
                    raise CheckpointError(
                        f"the tensor {name!r} is there twice, in {str(found[name].path)!r} and in "
                        f"{path.name!r}. Download the model again."
                    )
    _check_size(config, len(found))
    expected = _expected_shapes(config, has_head=_HEAD in found)
    if problem := _first_problem(expected, found):
        raise CheckpointError(
            f"the weights in {str(folder)!r} do not fit config.json: {problem}. "
            "Take both from the same place."
        )
    return {name: found[name] for name in expected}


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a folder's weights, of several files one after the other.

    Raises: CheckpointError if there are none; ResourceError if they may not be read.
    """
    digest = hashlib.sha256()
    for path in _weight_files(folder):
        with resource_errors(path), path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def _check_size(config: ModelConfig, n_tensors: int) -> None:
    """Refuse sizes that no model has, before anything is made of them."""
    sizes = {
        "vocabulary": (config.vocab_size, _LARGEST_WIDTH),
        "width": (config.d_model, _LARGEST_WIDTH),
        "width of the MLP": (config.d_mlp, _LARGEST_WIDTH),
        "width of all heads": (config.n_head * config.d_head, _LARGEST_WIDTH),
        "context": (config.context_length, _LARGEST_CONTEXT),
        "number of layers": (config.n_layer, n_tensors),
    }
    for what, (size, largest) in sizes.items():
        if size > largest:
            raise CheckpointError(
                f"config.json asks for a {what} of {size}, and at most {largest} is possible here. "
                "Download it again."
            )


def _expected_shapes(config: ModelConfig, *, has_head: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        tensors = tensors_to_hf(config, model_class(config).without_weights(config).state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    # Some files hold the tied one twice; ours never do.
    if config.tie_embeddings and has_head and config.model_type != OWN_TYPE:
        shapes[_HEAD] = next(iter(shapes.values()))
    return shapes


def _first_problem(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor]
) -> str | None:
    if missing := [name for name in expected if name not in found]:
        return f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
    if extra := [name for name in found if name not in expected]:
        return f"{extra[0]!r} has no place in the model ({len(extra)} have none)"
    for name, stored in found.items():
        if stored.shape != expected[name]:
            return f"{name!r} has shape {list(stored.shape)}, not {list(expected[name])}"
        if stored.dtype not in _BYTES:
            readable = ", ".join(sorted(_BYTES))
            return f"{name!r} is stored as {stored.dtype}, and only {readable} are read"
    return None
