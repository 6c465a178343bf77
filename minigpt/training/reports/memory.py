"""Estimate the memory that training needs, and look up how much the machine has."""

import os
from collections import Counter

import torch
from torch import nn

from minigpt.config import ModelConfig, RunConfig
from minigpt.errors import ResourceError
from minigpt.evaluation import windows_at_once
from minigpt.format import with_unit
from minigpt.model.cost import parameter_count, parameters, with_one_block
from minigpt.model.gpt import Block
from minigpt.model.layers import GatedMLP
from minigpt.model_config import ATTENTIONS
from minigpt.rings import find_ring, load_class, ring
from minigpt.training.optim import is_muon_parameter

_FLOAT32 = 4
_LSTM_VALUES = 16  # per token and unit: measured with oneDNN
_ATTENTION_VALUES = 5  # per token and unit of a tanh score or an LSTM's attention: measured
_TOKEN_BYTES = 16  # id and target


def estimate_memory(
    config: RunConfig,
    n_val_tokens: int,
    dtype: torch.dtype,
    n_ranks: int = 1,
    device_type: str = "cpu",
) -> dict[str, int]:
    """Estimate the peak memory of one rank, without the few hundred MB of Python and torch.

    The peak is the largest of four moments (tests compare it with what torch allocates):

        loss        n_layer x kept + the larger of output and hidden + earlier gradients
        backward    input and kept values of the first block + hidden + gradients
        update      gradients + five times the largest group of matrices (Muon)
        evaluation  the larger of logits and the MLP's hidden layer, without gradients

    All but the update add the weights in ``dtype``, which autocast caches. A block keeps
    ``_block_bytes_per_token``, or only its input with activation checkpointing. ``hidden`` is the
    memory of a tanh score's backward pass; earlier gradients are those of other micro-batches.

    Returns: bytes of weights, gradients, optimizer and activations, and their total.
    """
    model, training, length = config.model, config.training, config.sequence_length
    n_shares = n_ranks if training.shard else 1
    n_parameters = parameter_count(model)
    gradients = n_parameters * _FLOAT32 // n_shares
    copies = n_parameters * _cast_bytes(dtype)
    n_local = max(1, training.batch_size // n_ranks)
    n_tokens = min(training.micro_batch_size, n_local) * length
    stream = model.d_model * _FLOAT32
    fused = find_ring("training.fused")
    is_fused = bool(fused) and fused.is_fused(config, device_type, n_ranks)
    kernels = find_ring("training.kernels")
    keeps = bool(kernels) and kernels.keep_weights(torch.device(device_type), dtype, length)
    block = _block_bytes_per_token(model, dtype, length, is_fused=is_fused, keeps_weights=keeps)
    kept = n_tokens * model.n_layer * (stream if training.recompute else block)
    # Log-probabilities, their gradients and those of the logits, or fused, logits and their
    # gradients; then the final norm.
    per_logit = 2 * dtype.itemsize if is_fused else 3 * _FLOAT32 + _cast_bytes(dtype)
    output = n_tokens * (model.vocab_size * per_logit + 3 * stream)
    if is_fused:
        output += _FLOAT32 * min(n_tokens * model.vocab_size, fused.BLOCK)
    hidden = 0
    if _has_hidden_values(model):
        n_hidden = n_tokens * length * model.n_head * model.d_head
        max_hidden = ring("model.variants.tanh_scores").max_hidden(device_type)
        hidden = 3 * _FLOAT32 * min(n_hidden, max_hidden)
    earlier = gradients if n_local > training.micro_batch_size else 0
    peak = max(
        kept + max(output, hidden) + earlier + copies,
        n_tokens * (stream + block) + hidden + gradients + copies,
        gradients + 5 * _FLOAT32 * max(_muon_values(config).values(), default=0),
        _evaluation_bytes(config, n_val_tokens, dtype, device_type) + copies,
    )
    n_averages = n_parameters if training.average else 0
    parts = {
        "weights": gradients,  # as many as gradients, in the same dtype
        "gradients": gradients,
        "optimizer": (optimizer_values(config) + n_averages) * _FLOAT32 // n_shares,
        "activations": max(0, peak - gradients),  # with logits and temporary tensors
    }
    return parts | {"total": sum(parts.values())}


def _evaluation_bytes(
    config: RunConfig, n_val_tokens: int, dtype: torch.dtype, device_type: str
) -> int:
    """Return the bytes of the larger of logits and hidden layer in a pass of an evaluation."""
    model, length = config.model, config.sequence_length
    n_eval_tokens = min(n_val_tokens, config.training.eval_tokens or n_val_tokens)
    n_windows = max(1, n_eval_tokens // length)
    n_windows = min(n_windows, windows_at_once(model.vocab_size, length, device_type))
    logits = model.vocab_size * (2 * _FLOAT32 + _cast_bytes(dtype))
    stream = model.d_model * _FLOAT32
    mlp = (3 if model.family == "gpt2" else 4) * model.d_mlp * dtype.itemsize + stream
    return n_windows * length * max(logits, mlp)


def _cast_bytes(dtype: torch.dtype) -> int:
    """Return the bytes of the copy that autocast makes of a value, none in float32."""
    return 0 if dtype == torch.float32 else dtype.itemsize


def _block_bytes_per_token(
    model: ModelConfig, dtype: torch.dtype, length: int, *, is_fused: bool, keeps_weights: bool
) -> int:
    """Return the bytes that one block keeps per token for its backward pass.

    Norms keep float32 values: input and output, RMSNorm the normalized input too, and a copy of
    the output in ``dtype``. The rest is in ``dtype``: queries, keys, values and context; with
    QK-norm, its inputs, normalized inputs and outputs; and the MLP's hidden values (gate, up,
    activation and product; not gated: up and activation). Some scores and kernels keep weights. An
    LSTM keeps its gates and states. A fused loss keeps an RMSNorm's normalized input in float32 and
    output in ``dtype``, also the inputs of queries, keys and values, and no activation of SwiGLU.
    """
    if model.arch != "gpt":
        n_values = _LSTM_VALUES + (_ATTENTION_VALUES if model.n_attention_layer else 0)
        return n_values * model.d_model * _FLOAT32
    block = with_one_block(model).blocks[0]
    assert isinstance(block, Block)
    n_norms = sum(isinstance(child, nn.LayerNorm | nn.RMSNorm) for child in block.children())
    per_norm = (2 if isinstance(block.mlp_norm, nn.LayerNorm) else 3) * _FLOAT32
    per_norm += _cast_bytes(dtype)
    heads = (model.n_head + model.n_kv_head) * model.d_head
    attention = (5 if model.qk_norm else 2) * heads * dtype.itemsize
    n_hidden = 4 if isinstance(block.mlp, GatedMLP) else 2
    if is_fused and model.family == "llama":
        per_norm = _FLOAT32 + dtype.itemsize
        attention = heads * (3 * dtype.itemsize + _FLOAT32 * model.qk_norm)
        n_hidden = {"silu": 3, "relu2": 5}.get(model.activation, n_hidden)
    if _has_hidden_values(model):
        attention += _ATTENTION_VALUES * model.n_head * model.d_head * _FLOAT32
    score, n_weights = block.attention.score, model.n_head * length
    attention += score.kept_per_weight * n_weights * _FLOAT32
    if keeps_weights and score.is_dot_product:
        attention += n_weights * dtype.itemsize
    mlp = n_hidden * model.d_mlp * dtype.itemsize
    return n_norms * model.d_model * per_norm + attention + mlp


def _has_hidden_values(model: ModelConfig) -> bool:
    has_attention = model.n_attention_layer > 0
    return has_attention and not load_class(ATTENTIONS[model.attention]).is_dot_product


def optimizer_values(config: RunConfig) -> int:
    """Return the size of the optimizers' state: one value per Muon parameter, else two."""
    return 2 * parameter_count(config.model) - _muon_values(config).total()


def _muon_values(config: RunConfig) -> Counter[torch.Size]:
    """Return the number of values in all matrices of a shape that Muon updates together."""
    values: Counter[torch.Size] = Counter()
    if config.training.optimizer == "muon":
        for name, parameter, n in parameters(config.model):
            if is_muon_parameter(name, parameter):
                values[parameter.shape] += n * parameter.numel()
    return values


def machine_bytes(device: torch.device) -> int | None:
    """Return the bytes of a machine's memory, or of a GPU's free memory; None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        return None


def require_memory(config: RunConfig, device: torch.device, n_ranks: int = 1) -> None:
    """Raise ResourceError if the machine has less memory than a lower bound of the memory needed.

    The bound counts weights, gradients and one value of optimizer state per weight; the batch; the
    logits; and the input of each block in bfloat16.
    """
    available = machine_bytes(device)
    if available is None:
        return
    model, training = config.model, config.training
    state = 3 * _FLOAT32 * parameter_count(model) // (n_ranks if training.shard else 1)
    n_sequences = training.batch_size // n_ranks
    per_token = model.vocab_size * _FLOAT32 + 2 * model.n_layer * model.d_model
    n_together = min(n_sequences, training.micro_batch_size)
    batch = config.sequence_length * (n_sequences * _TOKEN_BYTES + n_together * per_token)
    if state + batch > available:
        what = "--batch-size or training.micro_batch_size" if batch > state else "model"
        raise ResourceError(
            f"training needs at least {with_unit(state, 'B')} for weights, gradients and optimizer "
            f"and {with_unit(batch, 'B')} for a batch, but {device.type} has "
            f"{with_unit(available, 'B')} of {'free ' * (device.type == 'cuda')}memory. "
            f"Use a smaller {what}."
        )
