"""Role scores of synthetic heads are exact, and a learned induction head is found."""

import math

import numpy as np
import pytest
import torch
from copying import CONTEXT, INDUCTION, PREVIOUS, copying_model, doubled
from kept_attention import full_weights
from laid_out import in_int8
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.model.gpt import GPT
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.tracing.analysis.roles import (
    head_effects,
    head_roles,
    repeated_sequences,
    role_scores,
    role_tag,
    without_heads,
)
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import ROLE_SCORES, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.tracer import trace

N_REPEATED = 16


def synthetic_head(place: dict[str, int], share: float = 1.0) -> Tensor:
    """Return a head (1, 1, 2 T, 2 T) that attends to an earlier token; the rest is on itself."""
    weights = torch.zeros(2 * N_REPEATED, 2 * N_REPEATED)
    for query in range(2 * N_REPEATED):
        target = place.get("at", query - place.get("back", 0))
        weights[query, query] += 1 - share
        weights[query, target if 0 <= target <= query else query] += share
    return weights[None, None]


IDEAL = {
    "previous": ({"back": 1}, "prev"),
    "duplicate": ({"back": N_REPEATED}, "dup"),
    "induction": ({"back": N_REPEATED - 1}, "induc"),
    "sink": ({"at": 0}, "sink"),
    "local": ({"back": 2}, "local"),
}


@pytest.mark.parametrize("role", IDEAL)
def test_an_ideal_head_scores_one_and_gets_its_tag(role: str) -> None:
    place, tag = IDEAL[role]
    scores = dict(zip(ROLE_SCORES, role_scores(synthetic_head(place))[0].tolist(), strict=True))
    assert scores[role] == pytest.approx(1)
    assert role_tag(**scores) == tag
    others = {name for name in ROLE_SCORES if name != role and scores[name] > 0.1}
    # The previous token is local, too; the first query sees only itself and the sink.
    assert others == ({"local"} if role == "previous" else set())


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_scores_are_proportional_to_the_attention(share: float) -> None:
    for role in ("previous", "duplicate", "induction", "sink"):
        place, tag = IDEAL[role]
        scores = dict(
            zip(ROLE_SCORES, role_scores(synthetic_head(place, share))[0].tolist(), strict=True)
        )
        assert scores[role] == pytest.approx(share)
        assert role_tag(**scores) == (tag if share > 0.5 else "local")


def test_the_tag_is_the_most_specific_role_above_its_threshold() -> None:
    def tag(**scores: float) -> str:
        return role_tag(**(dict.fromkeys(ROLE_SCORES, 0.0) | scores))

    assert tag() == ""
    assert tag(induction=0.41, sink=0.59) == "induc"
    assert tag(induction=0.39, sink=0.59) == "sink"
    assert tag(induction=0.41, duplicate=0.5) == "dup"
    assert tag(previous=0.7, local=0.9) == "prev"
    assert tag(sink=0.5, local=0.51) == "local"
    assert tag(sink=0.49, local=0.49, previous=0.39) == ""


def test_each_sequence_is_distinct_tokens_followed_by_a_copy() -> None:
    for changes in ({}, {"vocab_size": 5}, {"context_length": 9}):
        model = small_model(**changes)
        tokens = repeated_sequences(model, seed=1)
        n_repeated = tokens.shape[1] // 2
        assert n_repeated == min(model.config.context_length // 2, model.config.vocab_size)
        assert torch.equal(tokens[:, :n_repeated], tokens[:, n_repeated:])
        assert all(len(set(row[:n_repeated])) == n_repeated for row in tokens.tolist())
        assert len({tuple(row) for row in tokens.tolist()}) > 4
        assert torch.equal(repeated_sequences(model, seed=1), tokens)
        assert not torch.equal(repeated_sequences(model, seed=2), tokens)
    assert repeated_sequences(small_model(context_length=1000), seed=0).shape[1] <= 128


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_scores_equal_a_plain_loop_over_full_attention_maps(layout: str) -> None:
    model = small_model(layout)
    tokens = repeated_sequences(model, seed=3)
    weights = full_weights(model, tokens).mean(dim=1).double().numpy()  # (L, H, S, S)
    n, T = tokens.shape[1], tokens.shape[1] // 2
    roles = head_roles(model, seed=3)
    for layer, head in np.ndindex(2, 4):
        a, ours = weights[layer, head], roles[layer][head]
        second = range(T, n)
        expected = [
            np.mean([a[i, i - 1] for i in range(1, n)]),
            np.mean([a[i, i - T] for i in second]),
            np.mean([a[i, i - T + 1] for i in second]),
            np.mean([a[i, 0] for i in range(1, n)]),
            np.mean([a[i, i - 3 : i + 1].sum() for i in second]),
        ]
        assert [getattr(ours, name) for name in ROLE_SCORES] == pytest.approx(expected, abs=1e-5)
        assert ours.tag == role_tag(*expected)


@pytest.mark.parametrize("changes", [{"context_length": 5}, {"vocab_size": 2}])
def test_a_model_too_small_for_a_repeated_sequence_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="a context of at least 6 positions"):
        head_roles(small_model(**changes))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_ablation_cost_of_a_head_equals_zeroed_columns(layout: str) -> None:
    model = small_model(layout)
    tokens = repeated_sequences(model, seed=5)
    T, d_head = tokens.shape[1] // 2, model.config.d_head

    def loss() -> float:
        ln_p = model(tokens).log_softmax(dim=-1)
        terms = [
            ln_p[b, i, tokens[b, i + 1]] for b in range(len(tokens)) for i in range(T, 2 * T - 1)
        ]
        return -torch.stack(terms).mean().item()

    shares: list[float] = []
    effects = head_effects(model, seed=5, progress=shares.append)
    assert shares == [i / 8 for i in range(8)]
    whole = loss()
    for layer, head in np.ndindex(2, 4):
        weight = model.blocks[layer].attention.output.weight
        columns = weight[:, head * d_head : (head + 1) * d_head]
        kept = columns.clone()
        columns.zero_()
        assert effects[layer, head] == pytest.approx(loss() - whole, abs=1e-4)
        columns.copy_(kept)


@pytest.mark.integration
@torch.no_grad()
def test_int8_and_bfloat16_models_have_nearly_the_same_scores() -> None:
    exact = small_model()
    for way in ("int8", "bfloat16"):
        model = small_model()
        if way == "int8":
            model = in_int8(model)
        else:
            model.bfloat16()
        assert np.isfinite(head_effects(model)).all()
        for ours, theirs in zip(
            sum(head_roles(model), ()), sum(head_roles(exact), ()), strict=True
        ):
            for name in ROLE_SCORES:
                assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=0.05)


@pytest.fixture(scope="module")
def copier() -> GPT:
    return copying_model()


@pytest.mark.integration
def test_the_induction_head_of_a_copying_model_is_found(copier: GPT) -> None:
    tags = [layer[0].tag for layer in head_roles(copier)]
    assert tags == ["", "prev", "induc"]
    assert head_roles(copier)[INDUCTION][0].induction > 0.8


def test_ablating_the_induction_head_costs_the_most(copier: GPT) -> None:
    effects = head_effects(copier)[:, 0]
    assert effects.argmax() == INDUCTION
    assert effects[INDUCTION] > math.log(CONTEXT // 2), "the loss must be that of guessing or worse"
    assert effects[PREVIOUS] > math.log(CONTEXT // 2), "induction needs the previous-token head"


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_copied_token_needs_its_source_and_not_the_controls(copier: GPT, kind: str) -> None:
    ranks = {bytes([b]): b for b in range(256)}
    tokenizer = TiktokenTokenizer("bytes", make_encoding("bytes", r"(?s:.)", ranks, {}))
    sources, controls = [], []
    for sequence in doubled(5, 12, torch.Generator().manual_seed(11)).tolist():
        header, *steps, footer = trace(
            copier,
            tokenizer,
            sequence[:14],
            SamplingConfig(max_new_tokens=10, temperature=0.0),
            AnalysisConfig(layers=str(INDUCTION), n_verified=1, knockout=kind, roles=True),
            seed=1,
        )
        assert isinstance(header, TraceHeader)
        assert header.roles == head_roles(copier)
        assert isinstance(footer, TraceFooter)
        assert footer.cause is not None
        assert footer.cause.mean_effect > 10 * footer.cause.mean_control_effect
        assert footer.cause.rank_correlation is not None
        assert footer.cause.rank_correlation > 0.5
        for i, step in enumerate(steps, start=14):
            assert isinstance(step, TraceStep)
            assert step.token.id == sequence[i]
            source, control = step.effects
            assert source.source.token.position == i - 12, "the earlier occurrence of the token"
            sources.append(source.change)
            controls.append(control.change)
    assert np.mean(sources) < -10 * np.mean(np.abs(controls))
    assert max(sources) < -0.5, "every source must matter"


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_model_without_heads_equals_zeroed_columns(layout: str) -> None:
    model, synthetic_head = small_model(layout), small_model(layout)
    tokens, d_head = random_tokens(2, 9), model.config.d_head
    for layer, head in [(0, 1), (1, 0), (1, 3)]:
        weight = synthetic_head.blocks[layer].attention.output.weight
        weight[:, head * d_head : (head + 1) * d_head] = 0
    before = model(tokens)
    with without_heads(model, 0, [1]), without_heads(model, 1, [0, 3]):
        torch.testing.assert_close(model(tokens), synthetic_head(tokens))
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)
