"""How much memory a run takes: counted, tried out without any, and held against the machine's."""

import os
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from minigpt.config import RunConfig
from minigpt.errors import ResourceError
from minigpt.evaluation import windows_at_once
from minigpt.model.cost import parameter_count
from minigpt.model.device import autocast
from minigpt.model.registry import model_class
from minigpt.training.optim import is_muon_parameter, make_optimizers

_VALUE_BYTES = 4  # weights, gradients and moments are float32
_BLOCK_BYTES = 50_000  # of Python's own, for the modules of a block
_TOKEN_BYTES = 16  # an id and its target
_LSTM_KEEPS = 15  # times its output: measured, oneDNN's gates and states of every position
_FEW = 2  # layers; of one, the pass through it may not be where the most is held


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What one process holds at most, in bytes; the program's own few hundred MB are left out."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """All else at the highest point: activations, logits and what the optimizer multiplies."""

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    config: RunConfig, n_val_tokens: int, dtype: torch.dtype, n_ranks: int = 1
) -> MemoryEstimate:
    """Estimate the memory of a run from a step that is taken with tensors that have none.

    That is done for two blocks and for three; each further one takes as much more. The kernels are
    those of the CPU, whatever the device.

    Args: n_ranks, which share weights, gradients and optimizer if the config says so.
    """
    moments = optimizer_values(config)
    shares = n_ranks if config.training.shard else 1
    held = {
        "weights": parameter_count(config.model) * _VALUE_BYTES // shares,
        "gradients": parameter_count(config.model) * _VALUE_BYTES // shares,
        "optimizer": moments * _VALUE_BYTES // shares,
    }
    length = config.sequence_length
    n_windows = max(1, min(n_val_tokens, config.training.eval_tokens) // length)
    n_windows = min(n_windows, windows_at_once(config.model.vocab_size, length))

    def peaks(n_layer: int) -> tuple[int, ...]:
        return _peaks(_with_layers(config, n_layer), n_windows, dtype, n_ranks)

    few = min(config.model.n_layer, _FEW)
    n_more = config.model.n_layer - few
    low = peaks(few)
    high = peaks(few + 1) if n_more else low
    peak = max(one + n_more * (two - one) for one, two in zip(low, high, strict=True))
    alone = (2 * parameter_count(config.model) + moments) * _VALUE_BYTES
    return MemoryEstimate(**held, activations=max(0, peak - alone))


def optimizer_values(config: RunConfig) -> int:
    """Return how many numbers the optimizers keep: one for Muon's weights, two for AdamW's."""
    has_muon = config.training.optimizer == "muon"
    n_values = 0
    one = _with_layers(config, 1).model
    for name, parameter in model_class(one).without_weights(one).named_parameters():
        n_each = 1 if has_muon and is_muon_parameter(name, parameter) else 2
        n_times = config.model.n_layer if name.startswith("blocks.") else 1
        n_values += n_each * n_times * parameter.numel()
    return n_values


def _with_layers(config: RunConfig, n_layer: int) -> RunConfig:
    return replace(config, model=replace(config.model, n_layer=n_layer))


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is entered and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, Any] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mkldnn_rnn_layer.default:
            # Without real tensors, what it keeps for its backward pass has no size.
            self._add(out[-1], out[-1].nbytes or _LSTM_KEEPS * out[0].nbytes)
        tree_map_only(Tensor, self._add, out)
        return out

    def _add(self, tensor: Tensor, n_bytes: int | None = None) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        n_bytes = storage.nbytes() if n_bytes is None else n_bytes

        def forget(_: object) -> None:
            del self._storages[key]
            self.now -= n_bytes

        self._storages[key] = ref(storage, forget)
        self.now += n_bytes
        self.peak = max(self.peak, self.now)


def _peaks(
    config: RunConfig, n_evaluated: int, dtype: torch.dtype, n_ranks: int
) -> tuple[int, int, int]:
    """Return the most bytes in use in forward and backward pass, in the update, in evaluation."""
    training, length = config.training, config.sequence_length
    n_local = max(1, training.batch_size // n_ranks)
    size = min(training.micro_batch_size, n_local)
    moments = optimizer_values(config) * _VALUE_BYTES
    with FakeTensorMode(), _LiveBytes() as live:

        def loss_of(n_sequences: int) -> Tensor:
            tokens = torch.zeros(n_sequences, length, dtype=torch.long)
            with autocast(tokens.device, dtype):
                logits = model(tokens, recompute=training.recompute)
            return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

        model = model_class(config.model)(config.model)
        optimizers = make_optimizers(model, training, torch.float32)
        loss_of(size).backward()
        # From the second step on there are moments, from the second micro-batch on gradients too.
        gradients = parameter_count(config.model) * _VALUE_BYTES if n_local > size else 0
        passes, live.peak = live.peak + moments + gradients, live.now
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update, live.peak = live.peak, live.now
        with torch.no_grad():
            loss_of(n_evaluated)
        return passes, update, live.peak


def machine_bytes(device: torch.device) -> int | None:
    """Return the memory of a device; None where we cannot tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def require_memory(config: RunConfig, device: torch.device, n_ranks: int = 1) -> None:
    """Refuse what cannot be: more than the machine has, by the least that is needed.

    Raises: ResourceError before any of it is taken.
    """
    there = machine_bytes(device)
    if there is None:
        return
    model, training = config.model, config.training
    shares = n_ranks if training.shard else 1
    state = 3 * _VALUE_BYTES * parameter_count(model) // shares + _BLOCK_BYTES * model.n_layer
    n_tokens = training.batch_size * config.sequence_length // n_ranks
    n_at_once = min(n_tokens, training.micro_batch_size * config.sequence_length)
    # The logits, and the stream before each block, in bfloat16 at best.
    values = model.vocab_size * _VALUE_BYTES + 2 * model.n_layer * model.d_model
    batch = n_tokens * _TOKEN_BYTES + n_at_once * values
    if state + batch > there:
        what = "--batch-size or training.micro_batch_size" if batch > state else "model"
        raise ResourceError(
            f"training needs at least {_gigabytes(state)} for weights, gradients and optimizer and "
            f"{_gigabytes(batch)} for a batch, and {device.type} has {_gigabytes(there)} of memory."
            f" Use a smaller {what}."
        )


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3f} GB"
