"""Which known kind of head each head is: roles, found on random tokens said twice.

Of a text that is random, nothing can be foretold but by looking: what a head attends to there is
its habit. Said twice, it shows the heads that find a token's earlier appearance, and those that
find what came after it.

Shapes: L layers, B sequences, H query heads, G key/value heads, T tokens of which a sequence has
each twice, Q = 2 T queries, S = 2 T keys, D head dim.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from minigpt.errors import CheckpointError, ConfigError
from minigpt.model.language_model import LanguageModel
from minigpt.tracing.analysis.knockout import without_heads
from minigpt.tracing.events import Roles
from minigpt.tracing.recorder import require_attention
from minigpt.tracing.words import SCORES

_MOST_REPEATED = 64  # T: chance gives an induction head's place 1 % there
_LEAST_REPEATED = 3  # with two tokens, the one after the earlier appearance is the one before
_N_TOKENS = 256  # B T, about
_LOCAL = 4  # positions, the query's own among them
_SPECIFIC = 0.4
_BROAD = 0.5


def head_roles(model: LanguageModel, *, seed: int = 0) -> tuple[tuple[Roles, ...], ...]:
    """Return for each layer its heads' roles.

    Args: seed, of the random tokens.
    Raises: ConfigError if the model has no attention, or its context or vocabulary is too small to
        say anything twice; CheckpointError if the attention is no numbers.
    """
    require_attention(model)
    recorder = _RoleRecorder(model)
    with torch.inference_mode():
        model(doubled_sequences(model, seed=seed), recorder=recorder, logits_to_keep=1)
    scores_LH5 = torch.stack(recorder.scores_H5)
    if not scores_LH5.isfinite().all():
        raise CheckpointError(
            "the model's attention is no finite numbers, so its weights are damaged. Use another "
            "checkpoint, or download it again."
        )
    return tuple(tuple(_roles(*scores) for scores in layer) for layer in scores_LH5.tolist())


def doubled_sequences(model: LanguageModel, *, seed: int) -> Tensor:
    """Return a few sequences (B, 2 T) of T different random tokens, each sequence said twice.

    Raises: ConfigError if the context or the vocabulary is too small, or for a seed out of range.
    """
    config = model.config
    if not 0 <= seed < 2**63:
        raise ConfigError(f"seed must be between 0 and {2**63 - 1}: it is {seed}.")
    n_repeated = min(config.context_length // 2, config.vocab_size, _MOST_REPEATED)
    if n_repeated < _LEAST_REPEATED:
        raise ConfigError(
            f"roles take a context of {2 * _LEAST_REPEATED} positions and a vocabulary of "
            f"{_LEAST_REPEATED} tokens at least: the model has {config.context_length} and "
            f"{config.vocab_size}. Leave them out."
        )
    generator = torch.Generator().manual_seed(seed)
    once = torch.stack(
        [
            torch.randperm(config.vocab_size, generator=generator)[:n_repeated]
            for _ in range(_N_TOKENS // n_repeated)
        ]
    )
    return torch.cat((once, once), dim=1).to(model.device)


def role_scores(weights_BHQS: Tensor) -> Tensor:
    """Return each head's scores (H, 5) on doubled sequences, in the order of SCORES.

    With A a head's weights, i a query: previous, the mean of A[i, i - 1]; duplicate, of A[i, i - T]
    and induction, of A[i, i - T + 1] over the second half (the latter is prefix matching); sink,
    of A[i, 0] for i > 0; local, over the second half, what i and a few before it have together.

    Source: Olsson et al. 2022, arXiv:2209.11895 (prefix matching).
    """
    n_repeated = weights_BHQS.shape[-1] // 2

    def back(distance: int, *, is_second_half: bool = True) -> Tensor:
        """The mean of A[i, i - distance]."""
        diagonal_BHQ = weights_BHQS.diagonal(-distance, dim1=-2, dim2=-1)
        return (diagonal_BHQ[..., -n_repeated:] if is_second_half else diagonal_BHQ).mean((0, 2))

    # So few that an induction head's place is not among them.
    local_H = sum((back(i) for i in range(1, min(_LOCAL, n_repeated - 1))), start=back(0))
    sink_H = weights_BHQS[:, :, 1:, 0].mean((0, 2))
    previous_H = back(1, is_second_half=False)
    return torch.stack((previous_H, back(n_repeated), back(n_repeated - 1), sink_H, local_H), dim=1)


def role_tag(previous: float, duplicate: float, induction: float, sink: float, local: float) -> str:
    """Return the name of a head's role.

    That of the largest of previous, duplicate and induction, if it is at least 0.4: each is one
    place among many. Else that of the larger of sink and local, if it is at least 0.5. Else none.
    """
    score, tag = max((previous, "prev"), (duplicate, "dup"), (induction, "induc"))
    if score >= _SPECIFIC:
        return tag
    score, tag = max((sink, "sink"), (local, "local"))
    return tag if score >= _BROAD else ""


def _roles(*scores: float) -> Roles:
    facts = dict(zip(SCORES, scores, strict=True))
    return Roles(**facts, tag=role_tag(**facts))


class _RoleRecorder:
    """Keeps five numbers of a head, and one layer's maps at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self._attentions = model.attentions
        self.scores_H5: list[Tensor] = []
        """Of each layer."""

    def record(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor
    ) -> None:
        self.scores_H5.append(role_scores(self._attentions[layer].score.weights(q_BHTD, k_BGSD)))


@torch.inference_mode()
def head_effects(
    model: LanguageModel, *, seed: int = 0, progress: Callable[[float], None] | None = None
) -> NDArray[np.float32]:
    """Return by how many nats/token each head's absence makes the second saying worse: (L, H).

    The loss is that of the second half's tokens but its first, which nothing foretells.

    Args: seed, of the random tokens; progress, is told the share that is done.
    Raises: ConfigError if the context or the vocabulary is too small.
    """
    tokens = doubled_sequences(model, seed=seed)
    n_repeated = tokens.shape[1] // 2

    def loss() -> float:
        logits = model(tokens, logits_to_keep=n_repeated)[:, :-1]
        targets = tokens[:, n_repeated + 1 :]
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()

    shape = (model.config.n_attention_layer, model.config.n_head)
    effects_LH = np.zeros(shape, np.float32)
    whole = loss()
    for done, head in enumerate(np.ndindex(shape)):
        if progress is not None:
            progress(done / effects_LH.size)
        with without_heads(model, [head]):
            effects_LH[head] = loss() - whole
    return effects_LH
