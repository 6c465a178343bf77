"""Save and restore the state of a run in addition to the weights, as safetensors and JSON.

The order of the data and the dropout masks are pure functions of seed and step, so no RNG state is
saved.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Muon, Optimizer

from minigpt.checkpoint.model_folder import (
    STATE_FOLDER,
    WEIGHTS,
    name_of,
    save_tensors,
    weights_to_hf,
)
from minigpt.checkpoint.stored_tensors import check_header
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.fields import Checked, setting
from minigpt.files import read_bytes
from minigpt.model.language_model import LanguageModel
from minigpt.settings import build
from minigpt.training.run import Run
from minigpt.training.world import is_sharded

MAX_LR_RISE = 1.2
"""Maximum factor by which the learning rate rises per step after a change of the schedule."""
_MAX_RISES = 500  # 1.2 ** 500 is still a float, and far above any ratio of learning rates
_OPTIMIZER_FILE = "optimizer.safetensors"
_STATE_FILE = "progress.json"
_STEP_KEY, _AVERAGE_KEY = "step_weight", "average"
_ADAMW_KEYS, _MUON_KEYS = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}


@dataclass(frozen=True, kw_only=True)
class Seam(Checked):
    """A step at which a resumed run changed its schedule, for example because of a larger budget.

    The learning rate continues from its last value, and rises by at most a factor of
    ``MAX_LR_RISE`` per step until it reaches the new schedule. A context warm-up that was over is
    not repeated.
    """

    step: int = setting(bounds="[0, inf)")
    """Number of steps taken under the old schedule."""
    lr_scale: float = setting(bounds="[0, inf)")
    """Learning rate of the last of these steps, as a fraction of the peak."""
    is_warm: bool
    """Whether the context warm-up was over."""

    def limit(self, lr_scale: float, step: int) -> float:
        """Return the new schedule's learning rate at a step, with its rise limited."""
        n_rises = min(step + 1 - self.step, _MAX_RISES)
        return min(lr_scale, self.lr_scale * MAX_LR_RISE**n_rises)


@dataclass(frozen=True, kw_only=True)
class Lowest(Checked):
    """The lowest validation loss of the scheduled evaluations."""

    step: int = setting(0, "[0, inf)")
    val_loss: float | None = setting(None, "[0, inf)")
    """Loss in nats/token. None before the first evaluation."""
    evaluated_step: int = setting(0, "[0, inf)")
    """Step of the latest scheduled evaluation."""


@dataclass(frozen=True, kw_only=True)
class TrainingState(Checked):
    """Counters of a run at a checkpoint."""

    step: int = setting(0, "[0, inf)")
    """Number of optimizer steps taken."""
    elapsed_s: float = setting(0.0, "[0, inf)")
    """Seconds of training, without evaluation and saving."""
    n_skipped: int = setting(0, "[0, inf)")
    """Number of steps skipped because of NaN or inf."""
    corpus: str = ""
    """Fingerprint of the tokenized corpus."""
    computed_on: str = ""
    """Hardware, dtype and torch version, from ``computed_on``."""
    compile_failed: bool = False
    """Whether the compiler failed, so that the run, compiled by default, continued uncompiled."""
    lr_scale: float | None = setting(None, "[0, inf)")
    """Learning rate of the last step as a fraction of the peak. None before the first step."""
    next_lr_scale: float | None = setting(None, "[0, inf)")
    """Learning rate of the next step as a fraction of the peak, if the schedule stays the same."""
    is_warm: bool = False
    """Whether the context warm-up is over."""
    lowest: Lowest = field(default_factory=Lowest)
    """Lowest validation loss of the scheduled evaluations."""
    seam: Seam | None = None
    """Latest change of the schedule. None if it never changed."""


def computed_on(run: Run) -> str:
    """Describe everything except the config that affects rounding; if equal, resume is bit-exact.

    Other kernels, or sums in another order, round differently.
    """
    world = run.world
    ranks = f"{world.size} ranks of " if world.size > 1 else ""
    shards = "in shards, " if world.is_sharded else ""
    name = world.device.type
    if name == "cuda":
        precision = ", TF32" if torch.get_float32_matmul_precision() == "high" else ""
        name = torch.cuda.get_device_name(world.device) + precision
    elif name == "cpu":
        threads = f"threads: {torch.get_num_threads()}"
        name = f"cpu ({torch.backends.cpu.get_cpu_capability()}, {threads})"
    precision = ("compiled, " if run.is_compiled else "") + name_of(run.dtype)
    return f"{ranks}{name}, {shards}{precision}, torch {torch.__version__}"


def training_tensors(run: Run) -> Iterator[tuple[str, Tensor]]:
    """Yield the optimizers' tensors with names like ``blocks.0.mlp.up.weight/exp_avg``.

    The average of the weights is ``.../average``. While it is in the model, the step's own weights
    are yielded instead, as ``.../step_weight``.
    """
    for name, optimizer, parameter in _optimized(run):
        for key, tensor in optimizer.state[parameter].items():
            yield f"{name}/{key}", tensor
        if run.average:
            key = _STEP_KEY if run.average.is_in_model else _AVERAGE_KEY
            yield f"{name}/{key}", run.average.tensors[parameter]


def training_state(run: Run) -> TrainingState:
    """Return the counters of a run."""
    early_stop = run.early_stop
    return TrainingState(
        step=run.step,
        elapsed_s=run.elapsed_s,
        n_skipped=run.n_skipped,
        corpus=run.data.tokens.fingerprint,
        computed_on=computed_on(run),
        compile_failed=run.compile_failed,
        lr_scale=run.last_lr_scale,
        next_lr_scale=run.lr_scale,
        is_warm=run.context_length == run.config.sequence_length,
        lowest=Lowest(
            step=early_stop.best_step,
            val_loss=early_stop.val_loss,
            evaluated_step=early_stop.evaluated_step,
        )
        if early_stop
        else Lowest(),
        seam=run.seam,
    )


def restore(run: Run, folder: Path) -> None:
    """Restore a run, whose model and average have the checkpoint's weights, from a checkpoint.

    Raises: CheckpointError if the state is missing, damaged, or of another model or optimizer;
        DataError if the corpus differs.
    """
    state = read_state(folder)
    _restore_tensors(run, folder / STATE_FOLDER, has_steps=state.step > 0)
    if state.corpus != run.data.tokens.fingerprint:
        raise DataError(
            "the corpus is not the one that this run started with. Give the same text, or "
            "start a new run under another --name."
        )
    run.step = run.saved_step = state.step
    run.elapsed_s, run.n_skipped = state.elapsed_s, state.n_skipped
    if state.compile_failed and run.config.training.compile is None:
        run.is_compiled, run.compile_failed = False, True
    if state.computed_on not in ("", computed_on(run)):
        run.moved_from = state.computed_on
    if run.early_stop:
        run.early_stop.best_step = state.lowest.step
        run.early_stop.val_loss = state.lowest.val_loss
        run.early_stop.evaluated_step = state.lowest.evaluated_step
    run.seam, run.last_lr_scale = state.seam, state.lr_scale
    is_changed = state.next_lr_scale not in (None, run.lr_scale)
    if is_changed and state.lr_scale is not None:
        run.seam = Seam(step=run.step, lr_scale=state.lr_scale, is_warm=state.is_warm)


def _optimized(run: Run) -> Iterator[tuple[str, Optimizer, nn.Parameter]]:
    """Yield each parameter with its name and its optimizer."""
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                yield names[parameter], optimizer, parameter


def write_state(
    folder: Path, tensors: dict[str, Tensor], state: TrainingState, exact: LanguageModel | None
) -> None:
    """Write training_state/ into a checkpoint folder.

    Args: tensors, the full ``training_tensors``; exact, the float32 model if it was saved rounded.
    Raises: ResourceError if the disk is full or the folder is not writable.
    """
    folder = folder / STATE_FOLDER
    folder.mkdir()
    save_tensors(folder / _OPTIMIZER_FILE, tensors)
    if exact:
        save_tensors(folder / WEIGHTS, weights_to_hf(exact), {"format": "pt"})
    (folder / _STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(folder: Path) -> TrainingState:
    """Read the counters of the checkpoint in ``folder``.

    Raises: CheckpointError if they are missing or damaged.
    """
    path = folder / STATE_FOLDER
    try:
        return build(TrainingState, json.loads(read_bytes(path / _STATE_FILE)))
    except (OSError, ValueError, ConfigError, AttributeError, RecursionError) as error:
        raise _not_resumable(path, error) from None


def _not_resumable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"cannot resume from {str(path)!r}: {error}. Resume from an older step, or start a new run."
    )


def _restore_tensors(run: Run, path: Path, *, has_steps: bool) -> None:
    """Load the optimizers' state and the weights of the last step or their average.

    Args: path, training_state/ of a checkpoint; has_steps, whether the optimizers took steps.
    """
    stored = _read_tensors(path)
    for name, optimizer, parameter in _optimized(run):
        state = stored.pop(name, {})
        weights = {key: state.pop(key) for key in (_STEP_KEY, _AVERAGE_KEY) if key in state}
        keys = _MUON_KEYS if isinstance(optimizer, Muon) else _ADAMW_KEYS
        has_keys = not has_steps or state.keys() == keys
        if not has_keys or not all(
            value.is_floating_point() and value.shape == (() if key == "step" else parameter.shape)
            for key, value in (state | weights).items()
        ):
            raise CheckpointError(
                f"{str(path)!r} has no {type(optimizer).__name__} state for {name} of shape "
                f"{tuple(parameter.shape)}. Resume with the run's own settings."
            )
        with torch.no_grad():
            if _STEP_KEY in weights:  # the model was loaded with averaged weights
                parameter.copy_(_shard_like(weights[_STEP_KEY], parameter))
            if run.average and _AVERAGE_KEY in weights:
                average = run.average.tensors[parameter]
                average.copy_(_shard_like(weights[_AVERAGE_KEY], parameter))
        for key, tensor in state.items():
            optimizer.state[parameter][key] = _shard_like(tensor, parameter)
    if stored:
        raise CheckpointError(
            f"{str(path)!r} has state for {min(stored)!r}, which the model does not have. "
            "Resume with the run's own settings."
        )


def _read_tensors(path: Path) -> dict[str, dict[str, Tensor]]:
    """Read the tensors of ``training_tensors``, by parameter and by key."""
    try:
        check_header(path / _OPTIMIZER_FILE)
        tensors = load_file(path / _OPTIMIZER_FILE)
    except (OSError, SafetensorError) as error:
        raise _not_resumable(path, error) from None
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    return by_parameter


def _shard_like(tensor: Tensor, parameter: Any) -> Tensor:
    """Move a full tensor, which every rank has, to the device of a parameter, sharded like it.

    A tensor of another shape, for example a step counter, is not sharded.
    """
    tensor = tensor.to(parameter.device)
    if tensor.shape != parameter.shape or not is_sharded(parameter):
        return tensor
    from torch.distributed.tensor import distribute_tensor  # takes a second

    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
