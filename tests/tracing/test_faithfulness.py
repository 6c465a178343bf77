"""Measures compared with exact knockout effects, checked by plain loops."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from copying import INDUCTION, copying_model, doubled
from knocking_out import last_query_without
from small_models import small_model
from test_other_architectures import VARIANTS, model_of

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, DataError
from minigpt.model.language_model import LanguageModel
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis import faithfulness
from minigpt.tracing.analysis.faithfulness import (
    CONTROLS,
    METRICS,
    SHARES,
    Comparison,
    bootstrap,
    choose_measures,
    compare_measures,
    measure_names,
)
from minigpt.tracing.analysis.tally import rank_correlation
from minigpt.tracing.analysis_config import DEFAULTS, AnalysisConfig
from minigpt.tracing.findings import TraceStep
from minigpt.tracing.tracer import trace

TOKENIZER = BytesTokenizer()


def compare(
    model: LanguageModel,
    prompt: list[int],
    *,
    measures: tuple[str, ...] | None,
    n_tokens: int = 8,
    n_samples: int = 1,
    config: AnalysisConfig = DEFAULTS,
) -> Comparison:
    sampling = SamplingConfig(max_new_tokens=n_tokens, temperature=0, num_samples=n_samples)
    return compare_measures(model, TOKENIZER, prompt, sampling, config, measures=measures, seed=3)


@pytest.mark.integration
def test_every_number_equals_a_plain_loop_over_full_forwards() -> None:
    model, prompt = small_model("llama-grouped", vocab_size=257), list(b"to be or not")
    found = compare(model, prompt, measures=("weight", "norm"), n_tokens=4)
    numbers: dict[str, list[list[float]]] = {"weight": [], "norm": [], "distance": [], "exact": []}
    rows = {}
    for measure in ("weight", "norm"):
        _, *steps, _ = trace(
            model,
            TOKENIZER,
            prompt,
            SamplingConfig(max_new_tokens=4, temperature=0),
            AnalysisConfig(measure=measure),
            seed=3,
        )
        rows[measure] = [step for step in steps if isinstance(step, TraceStep)]
    tokens = list(prompt)
    for i, step in enumerate(rows["weight"]):

        def p(*hidden: int, target: int = step.token.id) -> float:
            with torch.no_grad(), last_query_without(hidden, "key"):
                return model(torch.tensor([tokens]))[0, -1].softmax(dim=0)[target].item()

        positions = range(1, len(tokens))
        effect = {j: abs(math.log(p(j) / p())) for j in positions}
        strength = {
            "weight": {j: float(step.row.weights_S[j]) for j in positions},
            "norm": {j: float(rows["norm"][i].row.weights_S[j]) for j in positions},
            "distance": {j: float(j) for j in positions},
            "exact": effect,
        }
        for name, by_position in strength.items():
            order = sorted(positions, key=lambda j: -by_position[j])
            tops = [sum(effect[j] for j in order[:k]) / sum(effect.values()) for k in (1, 3, 5)]
            drops = [p() - p(*order[: math.ceil(share * len(order))]) for share in SHARES]
            correlation = rank_correlation(
                [by_position[j] for j in positions], [effect[j] for j in positions]
            )
            assert correlation is not None
            numbers[name].append([correlation, *tops, sum(drops) / len(drops)])
        tokens.append(step.token.id)
    assert [result.name for result in found.results] == ["weight", "norm", *CONTROLS]
    assert (found.n_tokens, found.mean_positions) == (4, 12.5)
    for result in found.results:
        if result.name in numbers:
            means = np.array(numbers[result.name]).mean(axis=0)
            ours = [result.metrics[name] for name in METRICS]
            assert [one and one.mean for one in ours] == pytest.approx(means, abs=2e-3)
            assert all(one and one.low <= one.mean <= one.high and one.n == 4 for one in ours)


@pytest.mark.integration
def test_measures_but_not_controls_rank_the_true_source_of_a_copy_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, generator = copying_model(), torch.Generator().manual_seed(5)
    numbers = faithfulness._numbers
    orders: list[tuple[int, int]] = []

    def watched(strengths: Any, effects: Any, order: Any, drop: float) -> list[float]:
        orders.append((int(order[0]) + 1, len(strengths) + 1))  # position 0 is the sink
        return numbers(strengths, effects, order, drop)

    monkeypatch.setattr(faithfulness, "_numbers", watched)

    def shares(*measures: str, **config: str) -> dict[str, float]:
        """Return how often each measure ranks the true source first."""
        names, firsts = (*measures, *CONTROLS), Counter[str]()
        for row in rows:
            orders.clear()
            compare(model, row, measures=measures, n_tokens=10, config=AnalysisConfig(**config))
            for i, (first, position) in enumerate(orders):
                # The token at t repeats that at t - 12 and is predicted by the query at t - 1.
                firsts[names[i % len(names)]] += first == position - 12
        return {name: firsts[name] * len(names) / len(orders) / len(rows) for name in names}

    rows = [doubled(1, 12, generator)[0, :14].tolist() for _ in range(4)]
    # Rollout traces back to the first origin, and mean weights include the previous-token head.
    names = [name for name in measure_names() if name not in ("rollout", "weight")]
    found = shares(*names) | {"weight": shares("weight", layers=str(INDUCTION))["weight"]}
    assert found["exact"] > 0.9
    assert all(found[name] > 0.7 for name in (*names, "weight")), found
    assert max(found["random"], found["distance"]) < 0.3


@pytest.mark.integration
def test_samples_are_pooled_and_all_registered_measures_are_compared() -> None:
    model, prompt = small_model("gpt2", vocab_size=257), list(b"to be or not")
    found = compare(model, prompt, measures=None, n_tokens=3, n_samples=2)
    assert [one.name for one in found.results] == [*measure_names(), *CONTROLS]
    assert {"weight", "norm", "rollout"} <= set(measure_names())
    assert found.n_tokens == 6


@pytest.mark.integration
def test_progress_grows_within_each_pass() -> None:
    model, prompt = small_model("gpt2", vocab_size=257), list(b"to be or not")
    reports: list[tuple[float, str]] = []
    sampling = SamplingConfig(max_new_tokens=4, temperature=0)
    compare_measures(
        model,
        TOKENIZER,
        prompt,
        sampling,
        DEFAULTS,
        measures=("weight", "rollout"),
        seed=3,
        progress=lambda *report: reports.append(report),
    )
    shares = [share for share, _ in reports]
    assert shares == sorted(set(shares))
    assert shares[0] >= 0
    assert shares[-1] < 1
    stages = Counter(what for _, what in reports)
    assert list(stages) == ["measuring", "rolling out", "knocking out"]
    assert min(stages.values()) >= 4, "progress must be reported for each token"


@pytest.mark.integration
def test_unsupported_measures_are_omitted_with_the_reason() -> None:
    lstm = model_of(VARIANTS["lstm-attention"])
    found = compare(lstm, list(range(12)), measures=None, n_tokens=3)
    assert set(found.left_out) == {"logit"}
    assert "no residual stream" in found.left_out["logit"]
    assert [one.name for one in found.results] == [
        *(name for name in measure_names() if name != "logit"),
        *CONTROLS,
    ]
    with pytest.raises(ConfigError, match="measure logit is not possible"):
        compare(lstm, list(range(12)), measures=("logit",), n_tokens=3)
    with pytest.raises(ConfigError, match="a model of arch lstm has no attention to show"):
        compare(model_of({"arch": "lstm", "n_head": 1}), list(range(12)), measures=None, n_tokens=3)
    long = small_model("gpt2", vocab_size=257, context_length=1100)
    with pytest.raises(ConfigError, match="at most 1024"):  # must not be dropped silently
        compare(long, [1] * 1050, measures=("rollout",), n_tokens=1)


def test_unknown_measures_and_too_short_texts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"there is no measure 'vibes'\. Choose from weight"):
        choose_measures("weight, vibes")
    assert choose_measures("norm,weight,norm") == ("norm", "weight")
    with pytest.raises(DataError, match="no generated token has 10 positions"):
        compare(small_model("gpt2", vocab_size=257), [97, 98], measures=("weight",), n_tokens=3)


def test_a_confidence_interval_uses_the_normal_mean_without_undefined_values() -> None:
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap(np.append(values, [np.nan, np.nan]), seed=1)
    assert interval is not None
    error = 1.96 * values.std() / 20
    assert interval.n == 400
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - error, abs=0.1 * error)
    assert interval.high == pytest.approx(values.mean() + error, abs=0.1 * error)
    assert bootstrap(np.array([np.nan]), seed=1) is None
