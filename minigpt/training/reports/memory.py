"""How much memory training takes, by formula, and how much the machine has."""

import os
from collections import Counter
from dataclasses import dataclass, replace

import torch

from minigpt.config import ModelConfig, RunConfig
from minigpt.errors import ResourceError
from minigpt.evaluation import windows_at_once
from minigpt.format import with_unit
from minigpt.model.registry import model_class
from minigpt.training.optim import is_muon_parameter

_FLOAT32 = 4
_LSTM_VALUES = 16  # per token and unit: measured with oneDNN
_BLOCK_BYTES = 50_000  # Python objects of a block's modules
_TOKEN_BYTES = 16  # id and target


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of one process in bytes, without the few hundred MB of Python and torch."""

    weights: int
    """Parameters in float32."""
    gradients: int
    """Gradients in float32."""
    optimizer: int
    """State of the optimizers."""
    activations: int
    """Activations, logits and temporary tensors at the peak, beyond the three above."""

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return self.weights + self.gradients + self.optimizer + self.activations


def estimate_memory(
    config: RunConfig, n_val_tokens: int, dtype: torch.dtype, n_ranks: int = 1
) -> MemoryEstimate:
    """Estimate the peak memory of one rank.

    The peak is the largest of four moments (tests compare it with what torch allocates):

        loss        tokens x (n_layer x kept + output) + gradients of earlier micro-batches
        backward    tokens x (input + block) + gradients, at the first block
        update      gradients + five times the largest group of matrices (Muon)
        evaluation  tokens x the larger of output and hidden layer, without gradients

    The first two and the last add the weights in ``dtype``, which autocast caches. A block keeps
    ``block_bytes_per_token``, or only its input with activation checkpointing.
    """
    model, training, length = config.model, config.training, config.sequence_length
    shapes = _shapes(model)
    n_parameters = sum(n * shape.numel() for (_, shape), n in shapes.items())
    n_shares = n_ranks if training.shard else 1
    held = {
        "weights": n_parameters * _FLOAT32 // n_shares,
        "gradients": n_parameters * _FLOAT32 // n_shares,
        "optimizer": optimizer_values(config) * _FLOAT32 // n_shares,
    }
    gradients = held["gradients"]
    cast_bytes = 0 if dtype == torch.float32 else dtype.itemsize
    copies = n_parameters * cast_bytes
    n_local = max(1, training.batch_size // n_ranks)
    n_sequences = min(training.micro_batch_size, n_local)
    n_tokens = n_sequences * length
    stream = model.d_model * _FLOAT32
    block = block_bytes_per_token(model, dtype)
    kept = stream if training.recompute else block
    # Log-probabilities, their gradients and those of the logits; then the final norm.
    output = model.vocab_size * (3 * _FLOAT32 + cast_bytes) + 3 * stream
    loss = n_tokens * (model.n_layer * kept + output) + copies
    loss += gradients if n_local > n_sequences else 0
    backward = n_tokens * (stream + block) + copies + gradients
    matrices = [n * shape.numel() for (is_matrix, shape), n in shapes.items() if is_matrix]
    has_muon = training.optimizer == "muon"
    update = gradients + (5 * max(matrices) * _FLOAT32 if has_muon and matrices else 0)
    n_windows = max(1, min(n_val_tokens, training.eval_tokens) // length)
    n_windows = min(n_windows, windows_at_once(model.vocab_size, length))
    logits = model.vocab_size * (2 * _FLOAT32 + cast_bytes)
    hidden = (3 if model.family == "gpt2" else 4) * model.d_mlp * dtype.itemsize + stream
    evaluation = n_windows * length * max(logits, hidden) + copies
    peak = max(loss, backward, update, evaluation)
    return MemoryEstimate(**held, activations=max(0, peak - gradients))


def block_bytes_per_token(model: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes that one block keeps per token for its backward pass.

    Norms keep float32 values: input and output, RMSNorm the normalized input too, and a copy of
    the output in ``dtype``. The rest is in ``dtype``: queries, keys, values and context; with
    QK-norm, its inputs, normalized inputs and outputs; and the MLP's hidden values (gate, up,
    activation and product; gpt2: up and activation). An LSTM keeps its gates and states.
    """
    if model.arch != "gpt":
        return _LSTM_VALUES * model.d_model * _FLOAT32
    is_gpt2 = model.family == "gpt2"
    per_norm = (2 if is_gpt2 else 3) * _FLOAT32
    per_norm += dtype.itemsize if dtype != torch.float32 else 0
    heads = (model.n_head + model.n_kv_head) * model.d_head
    attention = (5 if model.qk_norm else 2) * heads
    mlp = (2 if is_gpt2 else 4) * model.d_mlp
    return 2 * model.d_model * per_norm + (attention + mlp) * dtype.itemsize


def optimizer_values(config: RunConfig) -> int:
    """Return the size of the optimizers' state: one value per Muon parameter, else two."""
    has_muon = config.training.optimizer == "muon"
    return sum(
        n * shape.numel() * (1 if has_muon and is_matrix else 2)
        for (is_matrix, shape), n in _shapes(config.model).items()
    )


def _shapes(model: ModelConfig) -> Counter[tuple[bool, torch.Size]]:
    """Count the parameters by shape, and by whether they are matrices for Muon."""
    one = replace(model, n_layer=1)
    counts: Counter[tuple[bool, torch.Size]] = Counter()
    for name, parameter in model_class(one).without_weights(one).named_parameters():
        n = model.n_layer if name.startswith("blocks.") else 1
        counts[is_muon_parameter(name, parameter), parameter.shape] += n
    return counts


def machine_bytes(device: torch.device) -> int | None:
    """Return the memory of a device; None if it is unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def require_memory(config: RunConfig, device: torch.device, n_ranks: int = 1) -> None:
    """Raise ResourceError if the machine has less memory than a lower bound of what is needed.

    The bound counts weights, gradients and one value of optimizer state per weight; the batch; the
    logits; and the input of each block in bfloat16.
    """
    available = machine_bytes(device)
    if available is None:
        return
    model, training = config.model, config.training
    n_shares = n_ranks if training.shard else 1
    n_parameters = sum(n * shape.numel() for (_, shape), n in _shapes(model).items())
    state = 3 * _FLOAT32 * n_parameters // n_shares + _BLOCK_BYTES * model.n_layer
    n_tokens = training.batch_size * config.sequence_length // n_ranks
    n_at_once = min(n_tokens, training.micro_batch_size * config.sequence_length)
    per_token = model.vocab_size * _FLOAT32 + 2 * model.n_layer * model.d_model
    batch = n_tokens * _TOKEN_BYTES + n_at_once * per_token
    if state + batch > available:
        what = "--batch-size or training.micro_batch_size" if batch > state else "model"
        raise ResourceError(
            f"training needs at least {with_unit(state, 'B')} for weights, gradients and optimizer "
            f"and {with_unit(batch, 'B')} for a batch, but {device.type} has "
            f"{with_unit(available, 'B')} of memory. Use a smaller {what}."
        )
