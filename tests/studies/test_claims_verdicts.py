"""Judgements follow from the measured numbers and the thresholds of each claim."""

from dataclasses import replace

import pytest

from minigpt.studies.claims import explainable, long_range, parallel
from minigpt.studies.claims.explainable import Explanation
from minigpt.studies.claims.long_range import AccuracyCurve
from minigpt.studies.claims.parallel import Timing


def curves(**ends: tuple[float, float]) -> list[AccuracyCurve]:
    """Return a curve per architecture from its accuracy at distances 8 and 512."""
    return [
        AccuracyCurve(
            task="recall",
            arch=arch.replace("_", "-"),
            seed=0,
            n_parameters=1,
            distances=(8, 512),
            accuracy=end,
            n_answers=(1, 1),
            train_s=1.0,
        )
        for arch, end in ends.items()
    ]


@pytest.mark.parametrize(
    ("lstm", "gpt", "outcome", "reason"),
    [
        ((0.99, 0.30), (1.0, 0.99), "borne out", "lstm: 99% right at distance 8, 30% at 512"),
        ((0.30, 0.28), (1.0, 0.99), "borne out in part", "range is not its problem"),
        ((0.84, 0.81), (1.0, 1.0), "not borne out", "learned in part, equally well near and far"),
        ((1.0, 0.99), (1.0, 1.0), "not borne out", "recall, lstm: 100% right at distance 8, 99%"),
        ((0.99, 0.30), (1.0, 0.4), "not borne out", "it loses what is far away"),
        ((0.22, 0.16), (0.34, 0.42), "not borne out", "42% at 512: not learned, near or far"),
    ],
)
def test_long_range_is_borne_out_if_only_attention_answers_from_far_away(
    lstm: tuple[float, float], gpt: tuple[float, float], outcome: str, reason: str
) -> None:
    verdict = long_range.judge(curves(lstm=lstm, lstm_attention=(1.0, 1.0), gpt=gpt))
    assert verdict.outcome == outcome
    assert reason in " ".join(verdict.reasons)


def test_long_range_averages_over_seeds() -> None:
    first = curves(lstm=(1.0, 0.0), lstm_attention=(1.0, 1.0), gpt=(1.0, 1.0))
    second = curves(lstm=(1.0, 1.0), lstm_attention=(1.0, 1.0), gpt=(1.0, 0.9))
    verdict = long_range.judge(first + second)
    assert verdict.outcome == "borne out"
    assert "recall, lstm: 100% right at distance 8, 50% at 512" in verdict.reasons[0]


EXPLAINED = Explanation(
    arch="gpt",
    seed=0,
    n_answers=100,
    accuracy=0.99,
    best_layer=1,
    best_head=0,
    best_head_share=0.97,
    mean_share=0.9,
    chance=0.01,
    source_change=-5.0,
    control_change=-0.1,
    source_mattered_share=1.0,
    accuracy_without_source=0.2,
    most_attended_change=-5.0,
)


@pytest.mark.parametrize(
    ("changes", "outcome", "reason"),
    [
        ({}, "borne out", "ln p of the answer changes by -5.00"),
        ({"mean_share": 0.3}, "borne out in part", "which head to look at had to be known first"),
        ({"source_change": -0.5}, "not borne out", "weight is not the cause"),
        ({"control_change": -4.5}, "not borne out", "weight is not the cause"),
        ({"mean_share": 0.1, "best_head_share": 0.5}, "not borne out", "best head for 50%"),
        ({"accuracy": 0.5}, "borne out", "has not learned the task"),
    ],
)
def test_explainable_is_borne_out_if_the_source_is_attended_to_and_matters(
    changes: dict[str, float], outcome: str, reason: str
) -> None:
    verdict = explainable.judge([replace(EXPLAINED, **changes)])
    assert verdict.outcome == outcome
    assert reason in " ".join(verdict.reasons)


def timings(device: str, lstm: tuple[float, float], gpt: tuple[float, float]) -> list[Timing]:
    return [
        Timing(
            arch=arch,
            device=device,
            n_parameters=1,
            length=length,
            batch_size=1,
            step_ms=1.0,
            tokens_per_s=speed,
        )
        for arch, speeds in (("lstm", lstm), ("gpt", gpt))
        for length, speed in zip((64, 2048), speeds, strict=True)
    ]


@pytest.mark.parametrize(
    ("lstm", "gpt", "outcome", "reason"),
    [
        ((100, 10), (100, 90), "borne out", "9 times as many at 2048"),
        ((100, 60), (100, 90), "not borne out", "enough parallelism over the batch"),
        ((100, 90), (100, 20), "not borne out", "attention compares all pairs"),
        ((10, 10), (100, 30), "not borne out", "10 times as many tokens/s"),
    ],
)
def test_parallel_is_borne_out_if_the_transformer_is_faster_on_longer_sequences(
    lstm: tuple[float, float], gpt: tuple[float, float], outcome: str, reason: str
) -> None:
    verdict = parallel.judge(timings("cpu", lstm, gpt))
    assert verdict.outcome == outcome
    assert reason in " ".join(verdict.reasons)


def test_parallel_is_borne_out_in_part_if_faster_on_one_device_of_two() -> None:
    both = timings("cpu", (100, 60), (100, 90)) + timings("cuda", (100, 10), (900, 900))
    assert parallel.judge(both).outcome == "borne out in part"
