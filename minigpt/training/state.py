"""What a resumed run needs besides the weights, as safetensors and JSON.

The order of the data and the dropout masks are pure functions of seed and step, so no RNG state is
saved.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minigpt.checkpoint.model_folder import STATE_FOLDER, save_tensors
from minigpt.errors import CheckpointError, ConfigError
from minigpt.files import open_regular, read_bytes
from minigpt.settings import build
from minigpt.training.optim import Muon
from minigpt.training.schedule import Seam
from minigpt.training.selection import Lowest, WeightAverage
from minigpt.training.world import ALONE, World

_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "progress.json"
_STEP_KEY, _AVERAGE_KEY = "step_weight", "average"
_STATE_KEYS: dict[type[Optimizer], set[str]] = {
    Muon: {"momentum_buffer"},
    AdamW: {"step", "exp_avg", "exp_avg_sq"},
}


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Counters of a run at a checkpoint."""

    step: int = 0
    """Number of optimizer steps taken."""
    elapsed_s: float = 0.0
    """Seconds of training, without evaluation and saving."""
    n_skipped: int = 0
    """Number of steps skipped because of NaN or inf."""
    corpus: str = ""
    """Fingerprint of the tokenized corpus."""
    computed_on: str = ""
    """Hardware, dtype and torch version, from ``computed_on``."""
    lr_scale: float | None = None
    """Learning rate of the last step as a fraction of the peak. None before the first step."""
    next_lr_scale: float | None = None
    """Learning rate of the next step as a fraction of the peak, if the schedule stays the same."""
    is_warm: bool = False
    """Whether the context warm-up is over."""
    lowest: Lowest = field(default_factory=Lowest)
    """Lowest validation loss of the evaluations that were due."""
    seam: Seam | None = None
    """Where a change of the schedule was last smoothed."""


def computed_on(world: World, dtype: torch.dtype) -> str:
    """Describe everything besides the config that affects rounding: resume is exact if it is equal.

    Other kernels, or sums in another order, round differently.
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


def optimizer_tensors(
    model: nn.Module,
    optimizers: list[Optimizer],
    average: WeightAverage | None = None,
    *,
    is_exchanged: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizers' tensors with names like ``blocks.0.mlp.up.weight/exp_avg``.

    Args: average, of the weights, yielded as ``.../average``; is_exchanged, whether the model holds
        the average at the moment: then the step's own weights are yielded, as ``.../step_weight``.
    """
    for name, optimizer, parameter in _optimized(model, optimizers):
        for key, tensor in optimizer.state[parameter].items():
            yield f"{name}/{key}", tensor
        if average:
            key = _STEP_KEY if is_exchanged else _AVERAGE_KEY
            yield f"{name}/{key}", average.tensors[parameter]


def _optimized(
    model: nn.Module, optimizers: list[Optimizer]
) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    """Yield each parameter with its name and its optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], optimizer, parameter


def write_state(folder: Path, tensors: dict[str, Tensor], state: TrainingState) -> None:
    """Write training_state/ into a checkpoint folder.

    Args: tensors, the full ``optimizer_tensors``.
    Raises: ResourceError if the disk is full or the folder is not writable.
    """
    folder = folder / STATE_FOLDER
    folder.mkdir()
    save_tensors(folder / _OPTIMIZER_FILE, tensors)
    (folder / _STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(folder: Path) -> TrainingState:
    """Read the counters of the checkpoint in ``folder``.

    Raises: CheckpointError if they are missing or damaged.
    """
    path = folder / STATE_FOLDER
    try:
        return build(TrainingState, json.loads(read_bytes(path / _STATE_FILE)))
    except (OSError, ValueError, ConfigError, AttributeError) as error:
        raise _not_resumable(path, error) from None


def _not_resumable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot resume from {str(path)!r}: {error}. Resume from an older step, or start a new run."
    )


def restore_state(
    folder: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    world: World = ALONE,
    average: WeightAverage | None = None,
) -> TrainingState:
    """Load the optimizers' state from a checkpoint, and return its counters.

    Args: model, with the weights of the checkpoint's model, which may be averaged ones: they are
        replaced by those of the step; average, started from the same weights.
    Raises: CheckpointError if it is missing, damaged, or of another model or optimizer.
    """
    path, counters = folder / STATE_FOLDER, read_state(folder)
    try:
        open_regular(path / _OPTIMIZER_FILE).close()
        tensors = load_file(path / _OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise _not_resumable(path, error) from None
    found: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        found.setdefault(name, {})[key] = tensor
    for name, optimizer, parameter in _optimized(model, optimizers):
        state = found.pop(name, {})
        other = {key: state.pop(key) for key in (_STEP_KEY, _AVERAGE_KEY) if key in state}
        has_keys = not counters.step or state.keys() == _STATE_KEYS[type(optimizer)]
        if not has_keys or any(
            key != "step" and tensor.shape != parameter.shape
            for key, tensor in (state | other).items()
        ):
            raise CheckpointError(
                f"{str(path)!r} has no {type(optimizer).__name__} state for {name} of shape "
                f"{tuple(parameter.shape)}. Resume with the run's own settings."
            )
        with torch.no_grad():
            if _STEP_KEY in other:
                parameter.copy_(world.shard_like(other[_STEP_KEY], parameter))
            if average and _AVERAGE_KEY in other:
                average.tensors[parameter].copy_(world.shard_like(other[_AVERAGE_KEY], parameter))
        for key, tensor in state.items():
            optimizer.state[parameter][key] = world.shard_like(tensor, parameter)
    if found:
        raise CheckpointError(
            f"{str(path)!r} has state for {min(found)!r}, which the model does not have. "
            "Resume with the run's own settings."
        )
    return counters
