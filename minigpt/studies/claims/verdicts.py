"""Do the numbers bear the claims out? By thresholds that stand here, in words made of numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from minigpt.studies.claims.explainable import Explanation
from minigpt.studies.claims.long_range import Curve
from minigpt.studies.claims.parallel import Timing
from minigpt.studies.claims.tasks import TASKS

LEARNED = 0.9
"""Share of right answers from which a task counts as learned."""
LOST = 0.2
"""A fall of the share of right answers, from the nearest distance to the farthest, that counts; and
how much more often than another model one has to be right to be better."""
POINTED = 0.8
"""Share of answers from which the most attended position counts as pointing to the source."""
MATTERED = 1.0
"""A fall of ln p, beyond the control's, that counts: the answer is e times less probable."""
FASTER = 2.0
"""How many times as fast one has to be to be faster."""

Outcome = Literal["borne out", "borne out in part", "not borne out"]


@dataclass(frozen=True)
class Verdict:
    """Whether a claim holds of these numbers."""

    claim: str
    outcome: Outcome
    reasons: tuple[str, ...]
    """Sentences: what was found, and where the claim goes too far."""


def judge_long_range(curves: Sequence[Curve]) -> Verdict:
    """Say whether attention answers from afar, and the LSTM only from nearby.

    Borne out where, in every task, the Transformer is right at the farthest distance and the LSTM
    was right nearby and is not there; in part where attention is merely better there.
    """
    reasons, holds, better = [], [], []
    for task in dict.fromkeys(curve.task for curve in curves):
        near = _ends(curves, task, 0)
        far = _ends(curves, task, -1)
        distances = next(curve.distances for curve in curves if curve.task == task)
        for arch in near:
            reasons.append(
                f"{task}, {arch}: {_percent(near[arch])} right at distance {distances[0]}, "
                f"{_percent(far[arch])} at {distances[-1]}: {_range(task, near[arch], far[arch])}."
            )
        holds.append(far["gpt"] >= LEARNED and near["lstm"] - far["lstm"] >= LOST)
        better.append(far["gpt"] - far["lstm"] >= LOST)
        if near["gpt"] - near["lstm"] >= far["gpt"] - far["lstm"] - LOST / 2 > 0:
            reasons.append(
                f"{task}: the LSTM is as far behind nearby, so that what it lacks is not range."
            )
        if far["lstm-attention"] - far["lstm"] >= LOST:
            reasons.append(
                f"{task}: attention on top of the LSTM is what it lacked at {distances[-1]}."
            )
    return Verdict("long-range", _outcome(all(holds), any(better)), tuple(reasons))


def _ends(curves: Sequence[Curve], task: str, end: int) -> dict[str, float]:
    """Return each architecture's accuracy at one end of its curve, the mean of its seeds."""
    found: dict[str, list[float]] = {}
    for curve in curves:
        if curve.task == task:
            found.setdefault(curve.arch, []).append(curve.accuracy[end])
    return {arch: mean(values) for arch, values in found.items()}


def _range(task: str, near: float, far: float) -> str:
    if near - far >= LOST:
        return "it loses what is far away"
    if far >= LEARNED:
        return "it reaches that far"
    if near < TASKS[task].informed_chance + LOST:
        return "not learned, near or far"
    return "learned in part, and as well from afar"


def judge_explainable(explanations: Sequence[Explanation]) -> Verdict:
    """Say whether the most attended position was the source, and whether the source mattered.

    Borne out where, in every model, the mean of all heads points to the source, and the answer
    needs the source more than a control; in part where some head points to it, and it does.
    """
    reasons, holds, partly = [], [], []
    for one in explanations:
        name = f"{one.arch}, seed {one.seed}"
        beyond = one.control_change - one.source_change
        reasons.append(
            f"{name}: the mean of its heads looks most at the source for {_percent(one.mean_share)}"
            f" of the answers, its best head for {_percent(one.best_head_share)} (a random "
            f"position: {_percent(one.chance)})."
        )
        reasons.append(
            f"{name}: without the source, ln p of the answer changes by {one.source_change:+.2f}, "
            f"without another pair's value by {one.control_change:+.2f}; right answers go from "
            f"{_percent(one.accuracy)} to {_percent(one.accuracy_without_source)}."
        )
        if one.accuracy < LEARNED:
            reasons.append(f"{name}: it has not learned the task; its attention explains little.")
        if one.mean_share < POINTED <= one.best_head_share:
            reasons.append(f"{name}: which head to look at had to be known first.")
        if beyond < MATTERED:
            reasons.append(
                f"{name}: hiding the source changes little: the answer also has it from elsewhere, "
                "so that weight is not cause."
            )
        mattered = beyond >= MATTERED
        holds.append(mattered and one.mean_share >= POINTED)
        partly.append(mattered and one.best_head_share >= POINTED)
    return Verdict("explainable", _outcome(all(holds), any(partly)), tuple(reasons))


def judge_parallel(timings: Sequence[Timing]) -> Verdict:
    """Say whether the Transformer trains long sequences faster, and keeps its speed.

    Borne out where, on every device, it is faster at the greatest length, and by more than at the
    least; in part where that is so on some device.
    """
    reasons, holds = [], []
    for device in dict.fromkeys(timing.device for timing in timings):
        speed = {(t.arch, t.length): t.tokens_per_s for t in timings if t.device == device}
        lengths = sorted({length for _, length in speed})
        short, long = lengths[0], lengths[-1]
        ratio = {length: speed["gpt", length] / speed["lstm", length] for length in lengths}
        kept = {arch: speed[arch, long] / speed[arch, short] for arch in ("gpt", "lstm")}
        reasons.append(
            f"{device}: the Transformer trains {ratio[short]:.2g} times as many tokens/s as the "
            f"LSTM at length {short}, {ratio[long]:.2g} times as many at {long}."
        )
        reasons.append(
            f"{device}: from length {short} to {long}, with as many tokens in a step, the LSTM "
            f"keeps {_percent(kept['lstm'])} of its speed and the Transformer "
            f"{_percent(kept['gpt'])}."
        )
        if kept["gpt"] < 1 / FASTER:
            reasons.append(f"{device}: attention looks at all pairs, and that has its price too.")
        if ratio[long] < FASTER:
            reasons.append(
                f"{device}: the LSTM is parallel enough over the batch and its own width here."
            )
        holds.append(ratio[long] >= FASTER and ratio[long] > ratio[short])
    return Verdict("parallel", _outcome(all(holds), any(holds)), tuple(reasons))


def _outcome(is_borne_out: bool, is_in_part: bool) -> Outcome:
    if is_borne_out:
        return "borne out"
    return "borne out in part" if is_in_part else "not borne out"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
