"""Claim 2: the attention of a model says what its answer was made of.

Of a recall, the source of the answer is known. So it can be counted how often it is the position
with the most attention, and what the answer is worth without it.

Shapes: B sequences, H heads, S positions in view, L layers of attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.long_range import TEST_SEED
from minigpt.studies.claims.tasks import RECALL, Batch

_TOKENS_AT_ONCE = 2**13


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a model's attention said of its answers, and whether it was so."""

    arch: str
    seed: int
    n_answers: int
    accuracy: float
    """Share of right answers."""
    best_layer: int
    best_head: int
    """The head that looked at the source most often, of other answers than these."""
    best_head_share: float
    """Of answers, those in which that head looked most at the source."""
    mean_share: float
    """Of answers, those in which the mean of all heads of all layers looked most at the source."""
    chance: float
    """The same of a position drawn at random."""
    source_change: float
    """By how much ln p of the right answer changes, on average, if the last query lacks its source
    in every layer."""
    control_change: float
    """The same without another pair's value."""
    source_mattered_share: float
    """Of answers, those whose ln p falls by more without the source than without the control."""
    accuracy_without_source: float
    """Share of right answers without the source."""
    most_attended_change: float
    """As source_change, without the position at which the mean of all heads looks most."""


@dataclass(frozen=True)
class _Answers:
    """What was seen of some answers; each tensor has a row for each."""

    hits_BN: Tensor
    """Whether each head, and at last their mean, looked most at the source."""
    log_p_B4: Tensor
    """ln p of the right answer: of all, without source, control, and the most attended."""
    right_B2: Tensor
    """Whether the most probable answer was right: of all, and without the source."""
    n_in_view: int


class _LastRows:
    """A recorder of the last query's weights in all heads of all layers."""

    def __init__(self, model: LanguageModel) -> None:
        self._scores = [attention.score for attention in model.attentions]
        self.weights: list[Tensor] = []

    def record(
        self, layer: int, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, context_BHTD: Tensor
    ) -> None:
        """Take one layer's rows."""
        self.weights.append(self._scores[layer].weights(q_BHTD[:, :, -1:], k_BGSD)[:, :, 0])


def explain(
    model: LanguageModel, distances: Sequence[int], *, n_sequences: int, seed: int
) -> Explanation:
    """Measure as many answers at each distance, and as many others to choose the best head by."""
    generator = torch.Generator().manual_seed(TEST_SEED + 2 * seed)
    held_out = torch.Generator().manual_seed(TEST_SEED + 2 * seed + 1)
    to_choose_by = _ask(model, distances, n_sequences, held_out)
    best = int(_joined(to_choose_by, "hits_BN")[:, :-1].mean(dim=0).argmax())
    answers = _ask(model, distances, n_sequences, generator)
    hits = _joined(answers, "hits_BN").mean(dim=0)
    log_p = _joined(answers, "log_p_B4")
    changes = (log_p[:, 1:] - log_p[:, :1]).mean(dim=0)
    right = _joined(answers, "right_B2").mean(dim=0)
    n_head = model.config.n_head
    return Explanation(
        arch=model.config.arch,
        seed=seed,
        n_answers=len(log_p),
        accuracy=float(right[0]),
        best_layer=best // n_head,
        best_head=best % n_head,
        best_head_share=float(hits[best]),
        mean_share=float(hits[-1]),
        chance=sum(1 / one.n_in_view for one in answers) / len(answers),
        source_change=float(changes[0]),
        control_change=float(changes[1]),
        source_mattered_share=float((log_p[:, 1] < log_p[:, 2]).float().mean()),
        accuracy_without_source=float(right[1]),
        most_attended_change=float(changes[2]),
    )


def _joined(answers: Sequence[_Answers], name: str) -> Tensor:
    return torch.cat([getattr(one, name) for one in answers]).float()


def _ask(
    model: LanguageModel, distances: Sequence[int], n_sequences: int, generator: torch.Generator
) -> list[_Answers]:
    answers = []
    for distance in distances:
        n_at_once = max(1, _TOKENS_AT_ONCE // (distance + 2 * RECALL.n_asked))
        for first in range(0, n_sequences, n_at_once):
            n_batch = min(n_at_once, n_sequences - first)
            batch = RECALL.draw(torch.full((n_batch,), distance), generator)
            answers.append(answer(model, batch))
    return answers


@torch.inference_mode()
def answer(model: LanguageModel, batch: Batch) -> _Answers:
    """Ask for the first answer of each sequence: with all in view, and with one position less.

    What earlier positions have seen of a position they have still seen when it is hidden: only the
    last query lacks it. All four answers go through the same kernels.
    """
    query = int(batch.query_B[0])
    tokens_BT = batch.tokens_BT[:, : query + 1].to(model.device)
    target_B = batch.targets_BT[:, query].to(model.device)
    n_batch, n_view = tokens_BT.shape
    cache = KVCache(model.config, batch_size=n_batch, capacity=n_view, device=model.device)
    model(tokens_BT[:, :-1], cache, logits_to_keep=1)
    rows = _LastRows(model)
    all_visible = torch.ones(n_batch, n_view, dtype=torch.bool, device=model.device)

    def log_p_without(position_B: Tensor | None) -> tuple[Tensor, Tensor]:
        visible_BS = all_visible
        if position_B is not None:
            visible_BS = visible_BS.scatter(1, position_B[:, None].to(model.device), False)
        recorder = rows if position_B is None else None
        cache.truncate(n_view - 1)
        logits = model(tokens_BT[:, -1:], cache, recorder, visible_BS=visible_BS)[:, -1].float()
        log_p = logits.log_softmax(dim=-1).gather(1, target_B[:, None])[:, 0]
        return log_p, logits.argmax(dim=-1) == target_B

    whole = log_p_without(None)
    weights_BNS = torch.cat(rows.weights, dim=1)  # the heads of all layers after each other
    looked_at_BN = torch.cat((weights_BNS, weights_BNS.mean(dim=1, keepdim=True)), 1).argmax(-1)
    no_source = log_p_without(batch.source_B)
    others = [log_p_without(position_B) for position_B in (batch.other_B, looked_at_BN[:, -1])]
    return _Answers(
        hits_BN=(looked_at_BN.cpu() == batch.source_B[:, None]),
        log_p_B4=torch.stack([log_p for log_p, _ in (whole, no_source, *others)], dim=1).cpu(),
        right_B2=torch.stack((whole[1], no_source[1]), dim=1).cpu(),
        n_in_view=n_view,
    )
