"""Claims measured on models that train in seconds."""

import math
from collections.abc import Generator
from dataclasses import replace
from typing import TypeVar

import pytest
import torch

from minigpt.model.cost import parameter_count
from minigpt.model.language_model import model_class
from minigpt.studies.claims import explainable
from minigpt.studies.claims.explainable import answer
from minigpt.studies.claims.learning import Progress, Size, equal_size_config, train_on_task
from minigpt.studies.claims.long_range import accuracy
from minigpt.studies.claims.study import Finding, Study
from minigpt.studies.claims.tasks import FIRST_KEY, FIRST_VALUE, N_VALUES, RECALL, VOCAB_SIZE

CPU = torch.device("cpu")
Result = TypeVar("Result")


def run_to_end(work: Generator[Progress, None, Result]) -> Result:
    """Run a generator to its end and return its result."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Result = end.value
            return result


@pytest.mark.parametrize("arch", ["lstm", "lstm-attention"])
@pytest.mark.parametrize("d_model", [32, 64, 128])
def test_compared_models_have_equal_parameter_counts(arch: str, d_model: int) -> None:
    wanted = parameter_count(equal_size_config("gpt", d_model, context_length=64))
    found = parameter_count(equal_size_config(arch, d_model, context_length=64))
    assert abs(found / wanted - 1) < 0.03


TINY = Size(
    n_steps=4,
    batch_tokens=64,
    stages=(8, 16),
    d_model=16,
    distances=(8, 16),
    n_sequences=5,
    lengths=(8, 16),
    step_tokens=32,
    n_repeats=1,
    timed_d_model=16,
)


@pytest.mark.integration
def test_training_with_one_seed_is_deterministic_and_reports_rising_progress() -> None:
    config = equal_size_config("lstm", 16, context_length=128)
    first, second = (
        run_to_end(train_on_task(config, RECALL, TINY, seed=3, device=CPU)).state_dict()
        for _ in range(2)
    )
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    shares = [one.share for one in train_on_task(config, RECALL, TINY, seed=3, device=CPU)]
    assert shares == sorted(shares)
    assert shares[0] == 0


class _Lookup(torch.nn.Module):
    """A model that solves the recall task by lookup."""

    device = CPU

    def forward(self, tokens: torch.Tensor, logits_to_keep: int) -> torch.Tensor:
        answers = torch.zeros(len(tokens), logits_to_keep, VOCAB_SIZE)
        for i, row in enumerate(tokens.tolist()):
            for j in range(logits_to_keep):
                key = row[len(row) - logits_to_keep + j] - FIRST_KEY
                pairs = [token for token in row if token // N_VALUES == key]
                answers[i, j, FIRST_VALUE + pairs[0] % N_VALUES if pairs else 0] = 1
        return answers


def test_accuracy_is_1_for_a_lookup_and_near_chance_for_random_weights() -> None:
    assert accuracy(_Lookup(), RECALL, 30, n_sequences=50, seed=0) == (1.0, 50)
    config = equal_size_config("gpt", 16, context_length=128)
    torch.manual_seed(0)
    noise, n = accuracy(model_class(config)(config), RECALL, 30, n_sequences=400, seed=0)
    assert n == 400
    assert noise < 0.2


@pytest.mark.parametrize("arch", ["gpt", "lstm-attention"])
def test_hiding_a_position_equals_a_forward_pass_with_a_mask(arch: str) -> None:
    config = equal_size_config(arch, 16, context_length=128)
    model = model_class(config)(config).eval()
    batch = RECALL.draw(torch.full((6,), 20), torch.Generator().manual_seed(0))
    answers = answer(model, batch)
    query = int(batch.query_B[0])
    tokens = batch.tokens_BT[:, : query + 1]
    target = batch.targets_BT[:, query]
    log_p = model(tokens)[:, -1].log_softmax(-1).gather(1, target[:, None])[:, 0]
    # Two different float32 kernels.
    torch.testing.assert_close(answers.log_p_B4[:, 0], log_p, atol=1e-4, rtol=1e-4)
    n_heads = config.n_head * config.n_attention_layer
    assert answers.hits_BN.shape == (6, n_heads + 1)
    if arch == "lstm-attention":  # one layer: hiding from all queries is hiding from the last
        for column, position_B in ((1, batch.source_B), (2, batch.other_B)):
            visible = torch.ones_like(tokens, dtype=torch.bool).scatter(
                1, position_B[:, None], False
            )
            log_p = model(tokens, visible_BS=visible)[:, -1].log_softmax(-1)
            wanted = log_p.gather(1, target[:, None])[:, 0]
            torch.testing.assert_close(answers.log_p_B4[:, column], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.integration
def test_a_study_measures_and_judges_each_claim() -> None:
    study = Study(TINY, seeds=(0, 1), device=CPU)
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


def test_chance_is_averaged_over_answers_and_not_over_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explainable, "_BATCH_TOKENS", 300)  # one batch at 8, two at 64
    size = replace(TINY, distances=(8, 64), n_sequences=3)
    *_, finding = Study(size, seeds=(0,), device=CPU).measure("explainable")
    assert isinstance(finding, Finding)
    # A recall at distance d has d + 4 positions before its query, which also attends to itself.
    assert finding.measured[0].chance == pytest.approx((1 / 13 + 1 / 69) / 2)


@pytest.mark.slow  # two models train for some seconds each
def test_an_lstm_recalls_worse_than_a_transformer_of_equal_size() -> None:
    size = Size(n_steps=220, batch_tokens=640, stages=(16,), d_model=64)
    right = {}
    for arch in ("lstm", "gpt"):
        config = equal_size_config(arch, size.d_model, context_length=128)
        model = run_to_end(train_on_task(config, RECALL, size, seed=0, device=CPU))
        right[arch] = [
            accuracy(model, RECALL, distance, n_sequences=200, seed=0)[0]
            for distance in (8, 12, 16)
        ]
    # Attention finds the pair; after three times the steps, the LSTM still guesses among four.
    assert min(right["gpt"]) > 0.9
    assert max(right["lstm"]) < 0.6
