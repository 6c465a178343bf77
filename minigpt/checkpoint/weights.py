"""The weights of a model folder: Hugging Face's names and ours, checks of headers, reading."""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt.checkpoint.families import OWN_TYPE, TensorName, family_of
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, cut
from minigpt.files import open_regular, resource_errors
from minigpt.model.language_model import model_class
from minigpt.rings import find_ring

WEIGHTS = "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that are read, by their names in a file."""
_PUBLISHED = "checkpoint.published_models"
_LARGEST_HEADER = 2**22  # room for 40,000 tensors; reading it takes up to forty times the memory


def tensor_names(config: ModelConfig) -> Iterator[TensorName]:
    """Yield the names of all tensors of a Hugging Face model, with prefix and block number."""
    # The largest first: while few others are loaded, there is memory for a second copy of it.
    family = family_of(config.model_type)
    if not config.tie_embeddings:
        yield TensorName(family.head, ("unembedding.weight",))
    for name in family.tensors(config):
        for i in range(config.n_layer if "{i}" in name.theirs else 1):
            ours = tuple(part.format(i=i) for part in name.ours)
            yield replace(name, theirs=family.prefix + name.theirs.format(i=i), ours=ours)


def _shapes_in_hf(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what ``tensors_to_hf`` returns."""
    # Not from tensors on the meta device: torch.cat of some imports the compiler, 80 MB of memory.
    state = model_class(config).without_weights(config).state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.model_type == OWN_TYPE:
        return shapes
    renamed = {}
    for name in tensor_names(config):
        parts = [shapes[part] for part in name.ours]
        shape = (sum(part[0] for part in parts), *parts[0][1:])
        renamed[name.theirs] = shape[::-1] if name.is_transposed else shape
    return renamed


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, concatenate and transpose a state_dict to Hugging Face's, except for OWN_TYPE."""
    if config.model_type == OWN_TYPE:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    renamed = {}
    for name in tensor_names(config):
        parts = [tensors[part].unflatten(0, (name.n_groups, -1)) for part in name.ours]
        tensor = torch.cat(parts, dim=1).flatten(0, 1) if len(parts) > 1 else tensors[name.ours[0]]
        renamed[name.theirs] = (tensor.t() if name.is_transposed else tensor).contiguous()
    return renamed


def tensors_from_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    place: Callable[[str, Tensor], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Rename, transpose and split Hugging Face's tensors to a state_dict.

    Each is released before the next one is asked for, so that with ``LazyTensors`` only one is in
    memory twice.

    Args: device and dtype, of the result, None to keep them; place, which takes our name and a
        tensor or view and returns what is kept, instead of these.
    Raises: CheckpointError if tied embeddings are stored as two different tensors; KeyError if a
        name is missing.
    """
    place = place or (lambda _, tensor: placed(tensor, device, dtype))
    if config.model_type == OWN_TYPE:
        return {name: place(name, tensors[name]) for name in tensors}
    renamed: dict[str, Tensor] = {}
    for name in tensor_names(config):
        tensor = tensors[name.theirs]
        groups = (tensor.t() if name.is_transposed else tensor).unflatten(0, (name.n_groups, -1))
        shares = name.shares or (1,) * len(name.ours)
        sizes = [groups.shape[1] // sum(shares) * share for share in shares]
        parts = zip(name.ours, groups.split(sizes, dim=1), strict=True)
        renamed |= {ours: place(ours, part.flatten(0, 1)) for ours, part in parts}
        del tensor, groups, parts
    if published := find_ring(_PUBLISHED):
        published.check_tied(config, tensors)
    return renamed


def placed(part: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor of this device and dtype that shares no memory with others."""
    if part.is_contiguous() and part.nbytes == part.untyped_storage().nbytes():
        return part.to(device, dtype)
    place = torch.empty(part.shape, device=device or part.device, dtype=dtype or part.dtype)
    return place.copy_(part)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as its header describes it."""

    path: Path
    """File that holds it."""
    name: str
    """Name in the file."""
    shape: tuple[int, ...]
    dtype: str
    """Dtype in the words of safetensors, such as BF16."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> Tensor:
        """Read its values."""
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(self.name)
        return tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by canonical name, each read from its file when it is asked for."""

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
        # Read, not mapped: a file that shrinks under a mapping kills the process (SIGBUS).
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
    """Refuse what is not a regular file, or may not be read, or has a header that fills memory."""
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

    Returns: the tensors by the names that ``tensors_from_hf`` takes, in the model's order.
    Raises: CheckpointError naming the file or tensor, what is wrong with it and the remedy.
    """
    found: dict[str, StoredTensor] = {}
    published = find_ring(_PUBLISHED)
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
    if published:
        published.check_size(config, len(found))
    expected = _shapes_in_hf(config)
    if published and (head := published.tied_head(config)) in found:
        expected[head] = next(iter(expected.values()))
    if problem := _first_problem(expected, found):
        raise CheckpointError(
            f"the weights in {str(folder)!r} do not fit config.json: {problem}. "
            "Take both from the same place."
        )
    return {name: found[name] for name in expected}


def _first_problem(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, StoredTensor]
) -> str | None:
    if missing := [name for name in expected if name not in found]:
        return f"{missing[0]!r} is missing ({len(missing)} of {len(expected)} are)"
    if extra := [name for name in found if name not in expected]:
        return f"{cut(extra[0])} is not in the model ({len(extra)} are not)"
    for name, stored in found.items():
        if stored.shape != expected[name]:
            return f"{name!r} has shape {list(stored.shape)}, not {list(expected[name])}"
        if stored.dtype not in DTYPES:
            readable = ", ".join(sorted(DTYPES))
            return f"{name!r} is stored as {stored.dtype}, and only {readable} are read"
    return None
