"""The claims, measured on models that learn in seconds."""

import math
from collections.abc import Generator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from minigpt.model.cost import parameter_count
from minigpt.model.registry import model_class
from minigpt.studies.claims.explainable import answer
from minigpt.studies.claims.learning import Lesson, Progress, contender, learn
from minigpt.studies.claims.long_range import accuracy, measure_curve
from minigpt.studies.claims.study import QUICK, Finding, Study
from minigpt.studies.claims.tasks import FIRST_KEY, FIRST_VALUE, N_VALUES, RECALL, VOCAB_SIZE

CPU = torch.device("cpu")
Result = TypeVar("Result")


def ended(work: Generator[Progress, None, Result]) -> Result:
    """Do all of the work and return what it returns."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


@pytest.mark.parametrize("arch", ["lstm", "lstm-attention"])
@pytest.mark.parametrize("d_model", [32, 64, 128])
def test_contenders_are_of_equal_size(arch: str, d_model: int) -> None:
    wanted = parameter_count(contender("gpt", d_model, context_length=64))
    found = parameter_count(contender(arch, d_model, context_length=64))
    assert abs(found / wanted - 1) < 0.03


LESSON = Lesson(n_steps=4, batch_tokens=64, stages=(8, 16), d_model=16)


def test_learning_is_the_same_of_the_same_seed_and_tells_how_far_it_is() -> None:
    config = contender("lstm", 16, context_length=128)
    first, second = (
        ended(learn(config, RECALL, LESSON, seed=3, device=CPU)).state_dict() for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    shares = [one.share for one in learn(config, RECALL, LESSON, seed=3, device=CPU)]
    assert shares == sorted(shares)
    assert shares[0] == 0


class _Reader(torch.nn.Module):
    """Answers a recall by looking it up, as a program would."""

    device = CPU

    def forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        answers = torch.zeros(len(tokens), logits_to_keep, VOCAB_SIZE)
        for i, row in enumerate(tokens.tolist()):
            for j in range(logits_to_keep):
                key = row[len(row) - logits_to_keep + j] - FIRST_KEY
                pairs = [token for token in row if token // N_VALUES == key]
                answers[i, j, FIRST_VALUE + pairs[0] % N_VALUES if pairs else 0] = 1
        return answers


def test_accuracy_is_one_of_a_look_up_and_a_guess_of_noise() -> None:
    assert accuracy(_Reader(), RECALL, 30, n_sequences=50, seed=0) == (1.0, 50)
    config = contender("gpt", 16, context_length=128)
    torch.manual_seed(0)
    noise, n = accuracy(model_class(config)(config), RECALL, 30, n_sequences=400, seed=0)
    assert n == 400
    assert noise < 0.2


@pytest.mark.parametrize("arch", ["gpt", "lstm-attention"])
def test_answers_without_a_position_are_those_of_a_forward_that_masks_it(arch: str) -> None:
    config = contender(arch, 16, context_length=128)
    model = model_class(config)(config).eval()
    batch = RECALL.draw(torch.full((6,), 20), torch.Generator().manual_seed(0))
    answers = answer(model, batch)
    query = int(batch.query_B[0])
    tokens = batch.tokens_BT[:, : query + 1]
    target = batch.targets_BT[:, query]
    log_p = model(tokens)[:, -1].log_softmax(-1).gather(1, target[:, None])[:, 0]
    # Two kernels, in float32.
    torch.testing.assert_close(answers.log_p_B4[:, 0], log_p, atol=1e-4, rtol=1e-4)
    n_heads = config.n_head * config.n_attention_layer
    assert answers.hits_BN.shape == (6, n_heads + 1)
    if arch == "lstm-attention":  # one layer: hiding from all queries hides no more from the last
        for column, position_B in ((1, batch.source_B), (2, batch.other_B)):
            visible = torch.ones_like(tokens, dtype=torch.bool).scatter(
                1, position_B[:, None], False
            )
            log_p = model(tokens, visible_BS=visible)[:, -1].log_softmax(-1)
            wanted = log_p.gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(answers.log_p_B4[:, column], wanted, atol=1e-4, rtol=1e-4)


def test_a_study_measures_and_judges_each_claim() -> None:
    size = replace(
        QUICK,
        lesson=LESSON,
        distances=(8, 16),
        n_sequences=5,
        lengths=(8, 16),
        step_tokens=32,
        n_repeats=1,
        timed_d_model=16,
    )
    study = Study(size, seeds=(0, 1), device=CPU)
    findings = {}
    for claim in ("long-range", "explainable", "parallel"):
        *progress, finding = study.measure(claim)
        assert isinstance(finding, Finding)
        assert all(isinstance(one, Progress) and 0 <= one.share <= 1 for one in progress)
        assert finding.verdict.claim == claim
        findings[claim] = finding.measured
    assert len(findings["long-range"]) == 2 * 3 * 2
    assert len(findings["explainable"]) == 2 * 2
    assert len(findings["parallel"]) == 2 * 2
    for timing in findings["parallel"]:
        assert timing.batch_size * timing.length == 32
        assert math.isclose(timing.tokens_per_s * timing.step_ms / 1000, 32)


@pytest.mark.slow  # two models learn for some seconds each
def test_the_recall_of_an_lstm_falls_behind_that_of_a_transformer_of_its_size() -> None:
    lesson = Lesson(n_steps=220, batch_tokens=640, stages=(16,), d_model=64)
    right = {}
    for arch in ("lstm", "gpt"):
        config = contender(arch, lesson.d_model, context_length=128)
        model = ended(learn(config, RECALL, lesson, seed=0, device=CPU))
        curve = measure_curve(model, RECALL, (8, 12, 16), n_sequences=200, seed=0, train_s=0.0)
        right[arch] = curve.accuracy
    # Attention finds the pair; the LSTM, in three times the steps, still guesses among the four.
    assert min(right["gpt"]) > 0.9
    assert max(right["lstm"]) < 0.6
