"""Claim 2: the attention of a model explains its answers.

The source of a recalled answer is known, so we count how often it is the most attended position,
and measure how much less probable the answer is without it.

Shapes: B sequences, N heads of all layers, S positions in view.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.language_model import LanguageModel
from minigpt.studies.claims.learning import Progress
from minigpt.studies.claims.long_range import TEST_SEED
from minigpt.studies.claims.study import LEARNED, Panel, Study, Verdict, percent
from minigpt.studies.claims.tasks import RECALL, TaskBatch
from minigpt.tracing.recorder import RowRecorder

POINTED = 0.8
"""Share of answers at which the most attended position counts as pointing to the source."""
MATTERED = 1.0
"""Smallest drop of ln p beyond the control's that counts: the answer is e times less probable."""
_ARCHS = ("lstm-attention", "gpt")
_BATCH_TOKENS = 2**13


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """How well a model's attention explains its answers."""

    arch: str
    seed: int
    """Seed of the training."""
    n_answers: int
    accuracy: float
    """Share of right answers."""
    best_layer: int
    best_head: int
    """Head that attended most to the source most often, on other sequences."""
    best_head_share: float
    """Share of answers at which that head attended most to the source."""
    mean_share: float
    """Share of answers at which the mean of all heads attended most to the source."""
    chance: float
    """Share of answers at which a random position would be the source."""
    source_change: float
    """Mean change of ln p of the right answer when the source is hidden from the last query."""
    control_change: float
    """Mean change when another pair's value is hidden instead."""
    source_mattered_share: float
    """Share of answers whose ln p falls more without the source than without the control."""
    accuracy_without_source: float
    """Share of right answers when the source is hidden."""
    most_attended_change: float
    """Mean change when the most attended position of the mean head is hidden."""


class Answers(NamedTuple):
    """Measurements of some answers, one row per answer."""

    hits_BN: Tensor
    """Whether each head, and last their mean, attended most to the source."""
    log_p_B4: Tensor
    """ln p of the right answer: with everything in view, then without the source, the control and
    the most attended position."""
    right_B4: Tensor
    """Whether the most probable answer was right, in the same four cases."""
    chance_B: Tensor
    """Probability that a random position in view is the source."""


def measure(study: Study) -> Generator[Progress, None, tuple[Explanation, ...]]:
    """Explain the recalled answers of each architecture that has attention."""
    explanations = []
    for arch, seed in product(_ARCHS, study.seeds):
        model, _ = yield from study.trained(arch, RECALL, seed)
        yield Progress(f"{arch} answers", 0.0)
        explanations.append(_explain(model, study, seed))
    return tuple(explanations)


def _explain(model: LanguageModel, study: Study, seed: int) -> Explanation:
    """Measure a model's answers; the best head is chosen on the same number of other sequences."""
    held_out, answers = (_ask(model, study, 2 * seed + part) for part in (1, 0))
    best = int(held_out.hits_BN[:, :-1].mean(dim=0).argmax())
    hits, right = answers.hits_BN.mean(dim=0), answers.right_B4.mean(dim=0)
    log_p = answers.log_p_B4
    changes = (log_p[:, 1:] - log_p[:, :1]).mean(dim=0)
    best_layer, best_head = divmod(best, model.config.n_head)
    return Explanation(
        arch=model.config.arch,
        seed=seed,
        n_answers=len(log_p),
        accuracy=float(right[0]),
        best_layer=best_layer,
        best_head=best_head,
        best_head_share=float(hits[best]),
        mean_share=float(hits[-1]),
        chance=float(answers.chance_B.mean()),
        source_change=float(changes[0]),
        control_change=float(changes[1]),
        source_mattered_share=float((log_p[:, 1] < log_p[:, 2]).float().mean()),
        accuracy_without_source=float(right[1]),
        most_attended_change=float(changes[2]),
    )


def _ask(model: LanguageModel, study: Study, seed: int) -> Answers:
    """Measure the answers to test sequences, equally many of each distance."""
    generator, n_sequences = torch.Generator().manual_seed(TEST_SEED + seed), study.size.n_sequences
    answers = [
        answer(model, batch)
        for distance in study.size.distances
        for batch in RECALL.batches(distance, n_sequences, generator, batch_tokens=_BATCH_TOKENS)
    ]
    return Answers(*(torch.cat(parts).float() for parts in zip(*answers, strict=True)))


@torch.inference_mode()
def answer(model: LanguageModel, batch: TaskBatch) -> Answers:
    """Measure the first answer of each sequence, with and without single positions.

    A position is hidden from the last query in every layer; earlier positions have still seen it.
    All four answers use the same kernels.
    """
    query = int(batch.query_B[0])
    tokens_BT = batch.tokens_BT[:, : query + 1].to(model.device)
    target_B = batch.targets_BT[:, query].to(model.device)
    n_batch, n_view = tokens_BT.shape
    cache = KVCache(model.config, batch_size=n_batch, capacity=n_view, device=model.device)
    model(tokens_BT[:, :-1], cache, logits_to_keep=1)
    recorder = RowRecorder(model)

    def answer_without(*hidden_B: Tensor) -> tuple[Tensor, Tensor]:
        visible_BS = torch.ones(n_batch, n_view, dtype=torch.bool, device=model.device)
        for position_B in hidden_B:
            visible_BS.scatter_(1, position_B[:, None].to(model.device), False)
        cache.truncate(n_view - 1)
        logits = model(tokens_BT[:, -1:], cache, recorder, visible_BS=visible_BS)[:, -1].float()
        log_p = logits.log_softmax(dim=-1).gather(1, target_B[:, None])[:, 0]
        return log_p.cpu(), (logits.argmax(dim=-1) == target_B).cpu()

    results = [answer_without()]
    weights_BNS = recorder.attention.weights_LBHS.transpose(0, 1).flatten(1, 2)
    mean_B1S = weights_BNS.mean(dim=1, keepdim=True)
    attended_BN = torch.cat((weights_BNS, mean_B1S), dim=1).argmax(-1)
    for position_B in (batch.source_B, batch.other_B, attended_BN[:, -1]):
        results.append(answer_without(position_B))
    log_p_B4, right_B4 = (torch.stack(column, dim=1) for column in zip(*results, strict=True))
    hits_BN = attended_BN.cpu() == batch.source_B[:, None]
    return Answers(hits_BN, log_p_B4, right_B4, torch.full((n_batch,), 1 / n_view))


def judge(explanations: Sequence[Explanation]) -> Verdict:
    """Judge whether the most attended position is the source, and whether the source matters.

    Borne out if in every model the mean of all heads points to the source, and the answer needs
    the source more than a control; in part if in some model this holds for the best head.
    """
    reasons, holds, partly = [], [], []
    for one in explanations:
        name = f"{one.arch}, seed {one.seed}"
        beyond = one.control_change - one.source_change
        reasons.append(
            f"{name}: the mean of its heads attends most to the source for "
            f"{percent(one.mean_share)} of the answers, its best head for "
            f"{percent(one.best_head_share)} (a random position: {percent(one.chance)})."
        )
        reasons.append(
            f"{name}: without the source, ln p of the answer changes by {one.source_change:+.2f}, "
            f"without another pair's value by {one.control_change:+.2f}; right answers go from "
            f"{percent(one.accuracy)} to {percent(one.accuracy_without_source)}."
        )
        if one.accuracy < LEARNED:
            reasons.append(f"{name}: it has not learned the task; its attention explains little.")
        if one.mean_share < POINTED <= one.best_head_share:
            reasons.append(f"{name}: which head to look at had to be known first.")
        if beyond < MATTERED:
            reasons.append(
                f"{name}: hiding the source changes little: the answer can also come from other "
                "positions, so the weight is not the cause."
            )
        mattered = beyond >= MATTERED
        holds.append(mattered and one.mean_share >= POINTED)
        partly.append(mattered and one.best_head_share >= POINTED)
    return Verdict.of("explainable", reasons, holds=all(holds), in_part=any(partly))


def table(explanations: Sequence[Explanation]) -> list[list[str]]:
    """Return a table with a row per model."""
    changes = ["ln p without source", "without control", "without most attended"]
    head = ["recall", "seed", "% right", "mean of heads at source", "best head", *changes]
    return [head] + [
        [
            one.arch,
            str(one.seed),
            f"{100 * one.accuracy:.0f}",
            f"{100 * one.mean_share:.0f}",
            f"{100 * one.best_head_share:.0f} ({one.best_layer}.{one.best_head})",
            f"{one.source_change:+.2f}",
            f"{one.control_change:+.2f}",
            f"{one.most_attended_change:+.2f}",
        ]
        for one in explanations
    ]


def panels(explanations: Sequence[Explanation]) -> list[Panel]:
    """Return no charts: the table is enough."""
    return []
