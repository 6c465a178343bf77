"""Check the headers of weight files, then read the tensors one at a time."""

import errno
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt.checkpoint.model_folder import WEIGHTS
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, cut
from minigpt.files import open_regular, resource_errors
from minigpt.model.language_model import model_class
from minigpt.model_config import OWN_TYPE
from minigpt.rings import find_ring, ring

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Supported dtypes by their names in safetensors."""
_LARGEST_HEADER = 2**22  # bytes for 40,000 tensors; parsing takes up to 40 times the memory


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as its header describes it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors, such as BF16."""

    @property
    def n_bytes(self) -> int:
        """Size of its values in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read its values."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by canonical name, each read from its file on access."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        # Read, not memory-mapped: if a mapped file shrinks, SIGBUS kills the process.
        with resource_errors(path):
            check_header(path)
            with safe_open(path, framework="pt", backend="pread") as file:
                yield file
    except (SafetensorError, OSError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CheckpointError(
            f"{str(path)!r} is not a complete safetensors file ({reason[:120]!r}). "
            "Write or download it again."
        ) from None


def check_header(path: Path) -> None:
    """Raise OSError for an irregular or unreadable file, or a header that would fill memory."""
    with open_regular(path) as file:
        n_bytes = int.from_bytes(file.read(8), "little")
        if _LARGEST_HEADER < n_bytes < os.fstat(file.fileno()).st_size:
            reason = f"its header has {n_bytes:,} bytes, and at most {_LARGEST_HEADER:,} are read"
            raise OSError(errno.EINVAL, reason, str(path))


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder's weights; raise CheckpointError if there are none."""
    if os.path.lexists(folder / WEIGHTS):
        return [folder / WEIGHTS]
    if files := find_ring("checkpoint.tools.weight_files"):
        return [folder / name for name in files.shards_in(folder)]
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}. Write or download it again.")


def stored_tensors(config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    """Check names, shapes and dtypes in the headers against the config; no weight is read.

    Returns: the tensors by the names that ``tensors_from_hf`` expects, in the model's order.
    Raises: CheckpointError naming the file or tensor, what is wrong with it and the remedy.
    """
    found = _headers(config, folder)
    if others := find_ring("checkpoint.tools.other_folders"):
        others.check_adapter(folder, [tensor.name for tensor in found.values()])
    if published := find_ring("checkpoint.published_models"):
        published.check_size(config, len(found), folder)
    for tensor in found.values():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{str(tensor.path)!r} cannot be used: {cut(tensor.name)} is stored as "
                f"{tensor.dtype}, but only {', '.join(sorted(DTYPES))} are supported. Use the "
                "model from before it was quantized, or transformers."
            )
    expected = _expected_shapes(config, found)
    if problem := _first_problem(expected, found):
        raise CheckpointError(_misfit(config, folder, problem))
    return {name: found[name] for name in expected}


def _headers(config: ModelConfig, folder: Path) -> dict[str, StoredTensor]:
    """Return the tensors that the headers of a folder's weight files describe."""
    found: dict[str, StoredTensor] = {}
    published = find_ring("checkpoint.published_models")
    for path in weight_files(folder):
        with _opened(path) as file:
            names = file.keys()
            canonical = published.canonical_names(config, names) if published else {}
            for name, stored in (canonical or dict(zip(names, names, strict=True))).items():
                header = file.get_slice(stored)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if found.setdefault(name, StoredTensor(path, stored, shape, dtype)).path != path:
                    raise CheckpointError(
                        f"the tensor {cut(name)} is in {str(found[name].path)!r} and in "
                        f"{path.name!r}. Download the model again."
                    )
    return found


def _expected_shapes(
    config: ModelConfig, found: Mapping[str, StoredTensor]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of a model, and of a repeated tied embedding if found."""
    # Not with meta tensors: torch.cat of meta tensors imports the compiler, 80 MB of memory.
    state = model_class(config).without_weights(config).state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.model_type != OWN_TYPE:
        weights = ring("checkpoint.weights")
        expected = weights.shapes_to_hf(config, expected)
        if (head := weights.tied_head(config)) in found:
            expected[head] = next(iter(expected.values()))
    return expected


def _misfit(config: ModelConfig, folder: Path, problem: str) -> str:
    """Return the error for weights that do not fit config.json, with what they are if known."""
    published = find_ring("checkpoint.published_models")
    if published and (what := published.other_class(config, folder)):
        return f"{what}: {problem}. Use the model that it was taken or trained from."
    return (
        f"the weights in {str(folder)!r} do not fit config.json: {problem}. Take both from the "
        "same place."
    )


def _first_problem(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor]
) -> str | None:
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} are)")
    if extra := [stored.name for name, stored in found.items() if name not in expected]:
        n_extra = f"{len(extra)} of {len(found)} are not"
        problems.append(f"{cut(extra[0])} is not in the model ({n_extra})")
    if problems:
        return " and ".join(problems)
    for name, stored in found.items():
        if stored.shape != expected[name]:
            return f"{stored.name!r} has shape {list(stored.shape)}, not {list(expected[name])}"
    return None
