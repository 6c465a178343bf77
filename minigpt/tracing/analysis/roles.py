"""Roles of heads, such as previous-token or induction head, detected on repeated random tokens.

Random tokens cannot be predicted, so a head's attention on them shows its default pattern. If the
sequence is repeated, the second half can only be predicted by attending to the first copy.

Shapes: L layers, B sequences, H query heads, G key/value heads, T tokens in each copy, Q = 2 T
queries, S = 2 T keys, D head dim.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from minigpt.errors import CheckpointError, ConfigError
from minigpt.fields import require_within
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.linear_logits import (
    HeadDirections,
    frozen_norm,
    logit_weights,
    why_not_linear,
)
from minigpt.tracing.findings import ROLE_SCORES, Roles
from minigpt.tracing.recorder import RowRecorder

_MAX_REPEATED = 64  # T: uniform attention would give the induction position about 1%
_MIN_REPEATED = 3  # with T = 2, the induction position is the previous token
_N_TOKENS = 256  # about B T
_N_LOCAL = 4  # positions, including the query's own
_MIN_SPECIFIC = 0.4
_MIN_BROAD = 0.5


def head_roles(model: LanguageModel, *, seed: int = 0) -> tuple[tuple[Roles, ...], ...]:
    """Return the roles of the heads of each layer.

    Args: seed, of the random tokens.
    Raises: ConfigError if the model has no attention, or its context or vocabulary is too small for
        a repeated sequence; CheckpointError for NaN or inf in the attention weights or logits.
    """
    recorder = RowRecorder(model)
    recorder.needs_queries = True
    with torch.inference_mode():
        sequences = repeated_sequences(model, seed=seed)
        logits = model(sequences, recorder=recorder, logits_to_keep=1)
        attention = recorder.attention
        assert attention.queries is not None
        assert attention.keys is not None
        heads = zip(model.attentions, attention.queries, attention.keys, strict=True)
        # One layer at a time, to keep only one layer's weights in memory.
        scores_LH5 = torch.stack([role_scores(one.score.weights(q, k)) for one, q, k in heads])
    if not (scores_LH5.isfinite().all() and logits.isfinite().all()):
        raise CheckpointError(
            "the model's attention or its logits have NaN or inf, so its weights are damaged. Use "
            "another checkpoint, or download it again."
        )

    def roles(*scores: float) -> Roles:
        return Roles(**dict(zip(ROLE_SCORES, scores, strict=True)), tag=role_tag(*scores))

    return tuple(tuple(roles(*scores) for scores in layer) for layer in scores_LH5.tolist())


def repeated_sequences(model: LanguageModel, *, seed: int) -> Tensor:
    """Return sequences (B, 2 T), each of T distinct random tokens, repeated once.

    Raises: ConfigError if the context or the vocabulary is too small, or for a seed out of range.
    """
    config = model.config
    require_within("seed", seed, "[0, 2**63)")
    n_repeated = min(config.context_length // 2, config.vocab_size, _MAX_REPEATED)
    if n_repeated < _MIN_REPEATED:
        raise ConfigError(
            f"finding roles needs a context of at least {2 * _MIN_REPEATED} positions and a "
            f"vocabulary of at least {_MIN_REPEATED} tokens: the model has {config.context_length} "
            f"and {config.vocab_size}. Leave the roles out."
        )
    generator = torch.Generator().manual_seed(seed)
    sequences = [
        torch.randperm(config.vocab_size, generator=generator)[:n_repeated].repeat(2)
        for _ in range(_N_TOKENS // n_repeated)
    ]
    return torch.stack(sequences).to(model.device)


def role_scores(weights_BHQS: Tensor) -> Tensor:
    """Return the scores of each head (H, 5) on repeated sequences, in the order of ROLE_SCORES.

    With A the attention weights of a head and i a query:
    previous: mean of A[i, i - 1]. duplicate: mean of A[i, i - T] over the second half. induction:
    mean of A[i, i - T + 1] over the second half (prefix matching). sink: mean of A[i, 0] for i > 0.
    local: mean over the second half of the total of A[i, i] and the few positions before i.

    Source: Olsson et al. 2022, arXiv:2209.11895 (prefix matching).
    """
    n_repeated = weights_BHQS.shape[-1] // 2

    def mean_back(distance: int, *, is_second_half: bool = True) -> Tensor:
        """Return the mean of A[i, i - distance]."""
        diagonal_BHQ = weights_BHQS.diagonal(-distance, dim1=-2, dim2=-1)
        return (diagonal_BHQ[..., -n_repeated:] if is_second_half else diagonal_BHQ).mean((0, 2))

    # Small enough to exclude the position that an induction head attends to.
    n_local = min(_N_LOCAL, n_repeated - 1)
    local_H = sum((mean_back(i) for i in range(1, n_local)), start=mean_back(0))
    sink_H = weights_BHQS[:, :, 1:, 0].mean((0, 2))
    previous_H = mean_back(1, is_second_half=False)
    duplicate_H, induction_H = mean_back(n_repeated), mean_back(n_repeated - 1)
    return torch.stack((previous_H, duplicate_H, induction_H, sink_H, local_H), dim=1)


def role_tag(previous: float, duplicate: float, induction: float, sink: float, local: float) -> str:
    """Return the tag of a head's role, or an empty string.

    The role is the largest of previous, duplicate and induction if it reaches a threshold, which is
    low, as each is one position among many. Otherwise the larger of sink and local, with a higher
    threshold.
    """
    score, tag = max((previous, "prev"), (duplicate, "dup"), (induction, "induc"))
    if score >= _MIN_SPECIFIC:
        return tag
    score, tag = max((sink, "sink"), (local, "local"))
    return tag if score >= _MIN_BROAD else ""


@torch.inference_mode()
def head_effects(
    model: LanguageModel, *, seed: int = 0, progress: Callable[[float], None] | None = None
) -> NDArray[np.float32]:
    """Return the increase in loss on repeated tokens without each head, in nats/token: (L, H).

    The loss is the mean over the second copy except its first token, which cannot be predicted.

    Args: seed, of the random tokens; progress, called with the share of the heads done.
    Raises: ConfigError if the context or the vocabulary is too small.
    """
    tokens = repeated_sequences(model, seed=seed)
    n_repeated = tokens.shape[1] // 2

    def loss() -> float:
        logits = model(tokens, logits_to_keep=n_repeated)[:, :-1]
        targets = tokens[:, n_repeated + 1 :]
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()

    shape = (model.config.n_attention_layer, model.config.n_head)
    effects_LH = np.zeros(shape, np.float32)
    loss_with_all = loss()
    for n_done, (layer, head) in enumerate(np.ndindex(shape)):
        if progress is not None:
            progress(n_done / effects_LH.size)
        with without_heads(model, layer, [head]):
            effects_LH[layer, head] = loss() - loss_with_all
    return effects_LH


@torch.inference_mode()
def head_logits(model: LanguageModel, *, seed: int = 0) -> NDArray[np.float32] | None:
    """Return each head's mean direct effect on the logit of the right token, in logits: (L, H).

    The effect is ``--measure logit`` summed over all sources. The mean is over the second copy
    except its first token, as in ``head_effects``. None if the model's logits are not a sum of
    additions to its residual stream.

    Raises: ConfigError if the context or the vocabulary is too small.
    """
    if why_not_linear(model):
        return None
    assert isinstance(model, GPT)
    tokens = repeated_sequences(model, seed=seed)
    n_repeated = tokens.shape[1] // 2
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(args[0][:, -n_repeated:-1].float())

    outputs = [attention.output for attention in model.attentions]
    with ExitStack() as hooks:
        for module in (*outputs, model.final_norm):
            hooks.enter_context(module.register_forward_pre_hook(keep))
        model(tokens, logits_to_keep=n_repeated)
    *contexts, x_BTC = inputs
    w_BTC = logit_weights(model, tokens[:, n_repeated + 1 :])
    u_BTC, _ = frozen_norm(model.final_norm, x_BTC, w_BTC)
    [(u_LBTX, _)] = HeadDirections(model)([u_BTC], [contexts])
    by_head = (u_LBTX * torch.stack(contexts)).unflatten(3, (model.config.n_head, -1))
    effects_LH: NDArray[np.float32] = by_head.sum(dim=4).mean(dim=(1, 2)).cpu().numpy()
    return effects_LH


@contextmanager
def without_heads(model: LanguageModel, layer: int, heads: Sequence[int]) -> Iterator[None]:
    """Zero the outputs of some heads of a layer before W_O, in forward passes inside the block."""

    def zero_heads(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        x_BTHD = inputs[0].unflatten(-1, (model.config.n_head, -1)).clone()
        x_BTHD[:, :, list(heads)] = 0
        return x_BTHD.flatten(2)

    with model.attentions[layer].output.register_forward_pre_hook(zero_heads):
        yield
