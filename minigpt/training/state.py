"""Everything beside the weights that a resumed run needs, as safetensors and JSON.

There is little of it: the order of the data and the dropout masks are pure functions of the seed
and the step, so no generator's state is kept.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.checkpoint.model_folder import save_tensors
from minigpt.errors import CheckpointError, ConfigError
from minigpt.settings import build
from minigpt.training.distributed import World, parted_like
from minigpt.training.optim import Muon

STATE_FOLDER = "training_state"
_OPTIMIZER_FILE = "optimizer.safetensors"
_PROGRESS_FILE = "progress.json"
_KEPT: dict[type[Optimizer], set[str]] = {
    Muon: {"momentum_buffer"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done."""
    elapsed_s: float = 0.0
    """Seconds of training steps; evaluation and saving are left out."""
    n_skipped: int = 0
    """Steps whose update was left out, as ``on_nan`` says."""
    corpus: str = ""
    """Fingerprint of the tokens that it is trained on."""
    computed_on: str = ""
    """What decides the last bits of a step beside the config, as ``computed_on`` says it."""


def computed_on(world: World, dtype: torch.dtype) -> str:
    """Name all that decides the last bits of a step beside the config: only there is resume exact.

    Other kernels, or other parts of a sum added up first, round elsewhere.
    """
    ranks = f"{world.size} ranks of " if world.size > 1 else ""
    shards = "in shards, " if world.is_sharded else ""
    name = world.device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(world.device)
    elif name == "cpu":
        threads = f"threads: {torch.get_num_threads()}"
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads})"
    return f"{ranks}{name}, {shards}{str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def _moments(
    model: nn.Module, optimizers: list[Optimizer]
) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    """Yield each parameter with its name and the optimizer that serves it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], optimizer, parameter


def optimizer_tensors(
    model: nn.Module, optimizers: list[Optimizer]
) -> Iterator[tuple[str, Tensor]]:
    """Yield what the optimizers keep, each tensor with the names of its weight and of itself."""
    for name, optimizer, parameter in _moments(model, optimizers):
        for key, tensor in optimizer.state[parameter].items():
            yield f"{name}/{key}", tensor


def write_state(folder: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write ``folder``/training_state: ``optimizer_tensors``, whole; the weights are elsewhere.

    Raises: ResourceError if the disk is full or the folder is not ours to write.
    """
    folder = folder / STATE_FOLDER
    folder.mkdir()
    save_tensors(folder / _OPTIMIZER_FILE, tensors)
    (folder / _PROGRESS_FILE).write_text(json.dumps(asdict(progress), indent=2) + "\n")


def read_progress(folder: Path) -> Progress:
    """Return how far the run of the checkpoint in ``folder`` had come.

    Raises: CheckpointError if that is missing or damaged.
    """
    path = folder / STATE_FOLDER
    try:
        values: Any = json.loads((path / _PROGRESS_FILE).read_text())
        return build(Progress, values)
    except (OSError, ValueError, ConfigError, AttributeError) as error:
        raise _not_resumable(path, error) from None


def _not_resumable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{str(path)!r} cannot be resumed from: {error}. Resume from an older step, or start "
        "a new run."
    )


def read_state(folder: Path, model: nn.Module, optimizers: list[Optimizer]) -> Progress:
    """Fill the optimizers from ``folder``/training_state and return how far the run had come.

    Raises: CheckpointError if it is missing, damaged, or of other optimizers or another model.
    """
    path, progress = folder / STATE_FOLDER, read_progress(folder)
    try:
        tensors = load_file(path / _OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise _not_resumable(path, error) from None
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        found.setdefault(name, {})[key] = tensor
    for name, optimizer, parameter in _moments(model, optimizers):
        state = found.pop(name, {})
        if progress.step and state.keys() != _KEPT[type(optimizer)]:
            raise CheckpointError(
                f"{str(path)!r} has not what {type(optimizer).__name__} keeps of {name}. "
                "Resume with the run's own settings."
            )
        for key, tensor in state.items():
            if key != "step" and tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"{str(path)!r}: {name}/{key} has shape {tuple(tensor.shape)}, the weight "
                    f"{tuple(parameter.shape)}. The state belongs to another model."
                )
            optimizer.state[parameter][key] = parted_like(tensor, parameter)
    if found:
        raise CheckpointError(
            f"{str(path)!r} has state for {min(found)!r}, which the model lacks. "
            "The state belongs to another model."
        )
    return progress
