"""A knockout equals a forward pass that hides a position from the last query."""

import math

import numpy as np
import pytest
import torch
from knocking_out import knock_out, last_query_without
from laid_out import in_int8
from small_models import LAYOUTS, any_model, random_tokens, small_model
from torch import Tensor

from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.tracing.analysis import knockout
from minigpt.tracing.analysis.knockout import Knockouts, Query
from minigpt.tracing.analysis.verifier import choose_controls
from minigpt.tracing.analysis_config import Knockout
from minigpt.tracing.head_lists import select_heads

KINDS: tuple[Knockout, ...] = ("key", "value")

TARGET = 5


def log_p(model: GPT, tokens: Tensor) -> float:
    with torch.no_grad():
        return model(tokens)[0, -1].float().log_softmax(dim=0)[TARGET].item()


def cached(model: GPT, tokens: Tensor) -> KVCache:
    """Return a cache with spare capacity, which is filled with NaN."""
    cache = KVCache(model.config, dtype=model.dtype)
    cache.keys_LBGSD.fill_(math.nan)
    cache.values_LBGSD.fill_(math.nan)
    with torch.no_grad():
        for part in tokens.split([4, 1, tokens.shape[1] - 5], dim=1):
            model(part, cache)
    return cache


def expected_changes(model: GPT, tokens: Tensor, kind: Knockout) -> list[float]:
    whole, changes = log_p(model, tokens), []
    for position in range(tokens.shape[1]):
        with last_query_without(position, kind):
            changes.append(log_p(model, tokens) - whole)
    return changes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("knockout_step")
def test_knockout_effects_equal_a_full_forward_without_the_source(
    layout: str, kind: Knockout
) -> None:
    model, tokens = small_model(layout), random_tokens(1, 11)
    expected = expected_changes(model, tokens, kind)
    assert max(map(abs, expected)) > 0.02, "some changes must be large"
    cache = cached(model, tokens)
    changes = knock_out(model, cache, int(tokens[0, -1]), TARGET, range(11), kind)
    # float32 logits of up to 50, summed in another order.
    assert changes == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("knockout_step")
def test_int8_and_bfloat16_models_agree_within_rounding(kind: Knockout) -> None:
    tokens = random_tokens(1, 11)
    int8, half = small_model("llama-grouped"), small_model("llama-grouped").bfloat16()
    int8 = in_int8(int8)
    for model, tolerance in ((int8, 2e-4), (half, 0.3)):
        expected = expected_changes(model, tokens, kind)
        changes = knock_out(
            model, cached(model, tokens), int(tokens[0, -1]), TARGET, range(11), kind
        )
        assert changes == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_tokens", [6, 11])
def test_knockouts_use_the_longrope_frequencies_of_the_text(n_tokens: int, kind: Knockout) -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "attention_factor": 1.5}
    scaling = factors | {"rope_type": "longrope", "original_max_position_embeddings": 7}
    model = any_model("olmo2", rope_scaling=scaling)
    tokens = random_tokens(1, 11)
    cache = cached(model, tokens)  # the text is long enough for the long factors
    expected = expected_changes(model, tokens[:, :n_tokens], kind)
    hidden = [(position,) for position in range(n_tokens)]
    query = Query(n_tokens - 1, int(tokens[0, n_tokens - 1]), TARGET, hidden)
    [changes] = Knockouts(model, kind, None).changes(cache, [query])
    assert changes[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("knockout_step")
def test_a_knockout_does_not_change_the_cache(kind: Knockout) -> None:
    model, tokens = small_model("gpt2"), random_tokens(1, 11)
    cache, untouched = cached(model, tokens), cached(model, tokens)
    knock_out(model, cache, int(tokens[0, -1]), TARGET, range(11), kind)
    assert cache.length == untouched.length
    for ours, theirs in (
        (cache.keys_LBGSD, untouched.keys_LBGSD),
        (cache.values_LBGSD, untouched.values_LBGSD),
    ):
        assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


HEADS = ("0.1-2,1.*", "1.3", "0.0,1.0", "0.*")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("knockout_step")
def test_knockout_effects_in_some_heads_equal_a_full_forward(layout: str, kind: Knockout) -> None:
    model, tokens = small_model(layout), random_tokens(1, 11)
    cache, query = cached(model, tokens), int(tokens[0, -1])
    whole = log_p(model, tokens)
    for text in HEADS:
        selection = select_heads(2, 4, heads=text)
        expected = []
        for position in range(11):
            with last_query_without(position, kind, selection.heads_by_layer):
                expected.append(log_p(model, tokens) - whole)
        changes = knock_out(model, cache, query, TARGET, range(11), kind, selection)
        assert changes == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decode_step_and_plain_forward_agree_on_knockouts_of_several_queries(
    layout: str, kind: Knockout, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokens = small_model(layout), random_tokens(1, 14)
    cache = cached(model, tokens)
    generator = np.random.default_rng(1)
    queries = [
        knockout.Query(
            end,
            int(tokens[0, end]),
            TARGET + end,
            [generator.permutation(end + 1)[:n].tolist() for n in range(end + 1)],
        )
        for end in (13, 0, 7, 8)
    ]
    for heads in (None, "0.1,1.2-3"):
        selection = heads and select_heads(2, 4, heads=heads)
        fast = knockout.Knockouts(model, kind, selection or None)
        assert fast.batch_rows > 1
        with monkeypatch.context() as patch:
            patch.setattr(knockout, "find_ring", lambda _: None)
            plain = knockout.Knockouts(model, kind, selection or None)
        assert plain.batch_rows == 1
        for ours, theirs in zip(
            fast.changes(cache, queries), plain.changes(cache, queries), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.usefixtures("knockout_step")
def test_hiding_every_position_gives_an_empty_context_without_nan() -> None:
    model, tokens = small_model("llama-grouped"), random_tokens(1, 6)
    cache, whole = cached(model, tokens), log_p(model, tokens)
    with last_query_without(range(6), "value"):
        expected = log_p(model, tokens) - whole
    query = knockout.Query(5, int(tokens[0, -1]), TARGET, [range(6)])
    for kind in KINDS:
        [[[change, _]]] = knockout.Knockouts(model, kind).changes(cache, [query])
        assert change == pytest.approx(expected, abs=1e-4)


def test_knockout_batches_are_bounded_and_include_an_unchanged_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tokens = small_model(), random_tokens(1, 20)
    cache = cached(model, tokens)
    queries = [
        knockout.Query(end, int(tokens[0, end]), TARGET, [[i] for i in range(end + 1)])
        for end in (19, 3, 4, 9)
    ]
    knockouts = knockout.Knockouts(model)
    at_once = knockouts.changes(cache, queries)
    monkeypatch.setattr(knockout, "_MAX_ROWS", 8)
    batches = list(knockouts._batches(cache, queries))
    assert [[(n, len(q.hidden)) for n, q in batch] for batch in batches] == [
        [(0, 8)],
        [(0, 8)],
        [(0, 7)],
        [(1, 5)],
        [(2, 6)],
        [(3, 8)],
        [(3, 4)],
    ]
    assert all(not query.hidden[0] for batch in batches for _, query in batch)
    for ours, theirs in zip(at_once, knockouts.changes(cache, queries), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_knockouts_of_a_long_cache_are_split_into_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knockout, "find_ring", lambda _: None)
    model, tokens = small_model(), random_tokens(1, 11)
    cache, query = cached(model, tokens), int(tokens[0, -1])
    at_once = knock_out(model, cache, query, TARGET, range(11))
    rows: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    monkeypatch.setattr(knockout, "_MAX_CACHE_BYTES", 4 * cache.n_bytes * 11 // 24)
    changes = knock_out(model, cache, query, TARGET, range(11))
    assert rows == [5, 5, 4]
    assert changes == pytest.approx(at_once, abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "sources", "controls"),
    [
        ([0.4, 0.1, 0.3, 0.0, 0.2], [2, 4], [1, 3]),
        ([0.4, 0.2, 0.3, 0.1, 0.0], [2, 1], [3, 4]),  # the control nearest to 1 is already used
        ([0.4, 0.1, 0.1, 0.3, 0.1], [3], [2]),  # the earlier of two at equal distance
        ([0.5, 0.25, 0.25], [1], [None]),  # no weaker position
        ([0.5, 0.3, 0.2], [1, 2], [None, None]),  # only the sink is left
        ([0.0, 0.6, 0.4], [1], [2]),  # the sink is never a control
    ],
)
def test_a_control_is_the_nearest_weaker_position(
    weights: list[float], sources: list[int], controls: list[int | None]
) -> None:
    assert choose_controls(np.array(weights, np.float32), sources, sink=0) == controls


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["additive", "concat", "general", "dot"])
def test_selecting_every_head_for_a_knockout_equals_selecting_none(
    attention: str, kind: Knockout
) -> None:
    model, tokens = small_model("llama-grouped", attention=attention), random_tokens(1, 11)
    cache, query = cached(model, tokens), int(tokens[0, -1])
    whole = knock_out(model, cache, query, TARGET, range(11), kind)
    parts = knock_out(model, cache, query, TARGET, range(11), kind, select_heads(2, 4, heads="1.*"))
    knockouts = knockout.Knockouts(model, kind, select_heads(2, 4, heads="0.1"))
    knockouts._heads_LH = torch.ones(2, 4, dtype=torch.bool)
    [changes] = knockouts.changes(
        cache, [knockout.Query(10, query, TARGET, [[i] for i in range(11)])]
    )
    assert changes[:, 0] == pytest.approx(whole, abs=1e-4)
    assert np.abs(np.subtract(parts, whole)).max() > 1e-3
