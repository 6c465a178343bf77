"""A knockout equals a forward pass in which the last query lacks a position."""

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from knocking_out import knock_out
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.generation.fast import compiled
from minigpt.generation.fast.quantize import quantize_int8
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis import knockout
from minigpt.tracing.analysis.knockout import choose_controls
from minigpt.tracing.analysis.roles import without_heads
from minigpt.tracing.analysis.tally import CauseTally, rank_correlation
from minigpt.tracing.analysis_config import AnalysisConfig, Knockout
from minigpt.tracing.events import Source, Token
from minigpt.tracing.findings import CauseCheck, Effect, TraceFooter, TraceStep
from minigpt.tracing.head_lists import select_heads
from minigpt.tracing.tracer import trace

KINDS: tuple[Knockout, ...] = ("key", "value")
TARGET = 5


@contextmanager
def last_query_without(
    hidden: int | Sequence[int], kind: Knockout, heads: Sequence[Sequence[int]] | None = None
) -> Iterator[None]:
    """The oracle: plain attention in which the last query lacks positions.

    Args: heads, those of each layer that lack them; None for all.
    """
    positions = [hidden] if isinstance(hidden, int) else list(hidden)
    calls = itertools.count()

    def attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        n_shared = q.shape[1] // k.shape[1]
        k = k.float().repeat_interleave(n_shared, dim=1)
        v = v.float().repeat_interleave(n_shared, dim=1)
        n = q.shape[2]
        score = q.float() @ k.mT / math.sqrt(q.shape[3])
        for query, key in itertools.product(range(n), range(n)):
            if key > query:
                score[..., query, key] = -math.inf
        layer = next(calls)
        chosen = range(q.shape[1]) if heads is None else heads[layer]
        for head, position in itertools.product(chosen, positions):
            if kind == "key":
                score[:, head, n - 1, position] = -math.inf
        weight = score.softmax(dim=-1)
        for head, position in itertools.product(chosen, positions):
            if kind == "value":
                weight[:, head, n - 1, position] = 0  # the others do not grow
        return (weight @ v).to(q.dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        yield


def log_p(model: GPT, tokens: Tensor) -> float:
    with torch.no_grad():
        return model(tokens)[0, -1].float().log_softmax(dim=0)[TARGET].item()


def expected_changes(model: GPT, tokens: Tensor, kind: Knockout) -> list[float]:
    whole, changes = log_p(model, tokens), []
    for position in range(tokens.shape[1]):
        with last_query_without(position, kind):
            changes.append(log_p(model, tokens) - whole)
    return changes


def cached(model: GPT, tokens: Tensor) -> KVCache:
    """A cache with spare capacity, NaN where it is not filled."""
    cache = KVCache(model.config, dtype=model.dtype)
    cache.keys_LBGSD.fill_(math.nan)
    cache.values_LBGSD.fill_(math.nan)
    with torch.no_grad():
        for part in tokens.split([4, 1, tokens.shape[1] - 5], dim=1):
            model(part, cache)
    return cache


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("way")
def test_a_change_equals_that_of_a_full_forward_whose_last_query_lacks_the_source(
    layout: str, kind: Knockout
) -> None:
    model, tokens = small_model(layout), random_tokens(1, 11)
    expected = expected_changes(model, tokens, kind)
    assert max(map(abs, expected)) > 0.02, "some changes are large"
    cache = cached(model, tokens)
    changes = knock_out(model, cache, int(tokens[0, -1]), TARGET, range(11), kind)
    # float32 logits of up to 50, in another order of sums.
    assert changes == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("way")
def test_int8_and_bfloat16_models_agree_within_rounding(kind: Knockout) -> None:
    tokens = random_tokens(1, 11)
    int8, half = small_model("llama-grouped"), small_model("llama-grouped").bfloat16()
    quantize_int8(int8)
    for model, tolerance in ((int8, 2e-4), (half, 0.3)):
        expected = expected_changes(model, tokens, kind)
        changes = knock_out(
            model, cached(model, tokens), int(tokens[0, -1]), TARGET, range(11), kind
        )
        assert changes == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("way")
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


@pytest.fixture(params=["fast", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute knockouts through the decode step, or through the model's own forward."""
    if request.param == "plain":
        monkeypatch.setattr(knockout, "has_ring", lambda _: False)
    return str(request.param)


HEADS = ("0.1-2,1.*", "1.3", "0.0,1.0", "0.*")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("way")
def test_a_knockout_in_some_heads_equals_a_full_forward_where_only_these_lack_the_source(
    layout: str, kind: Knockout
) -> None:
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
def test_the_decode_step_and_the_plain_forward_agree_for_queries_of_several_tokens(
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
            patch.setattr(knockout, "has_ring", lambda _: False)
            plain = knockout.Knockouts(model, kind, selection or None)
        assert plain.batch_rows == 1
        for ours, theirs in zip(
            fast.changes(cache, queries), plain.changes(cache, queries), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.usefixtures("way")
def test_hiding_every_position_leaves_no_context_and_no_nan() -> None:
    model, tokens = small_model("llama-grouped"), random_tokens(1, 6)
    cache, whole = cached(model, tokens), log_p(model, tokens)
    with last_query_without(range(6), "value"):
        expected = log_p(model, tokens) - whole
    query = knockout.Query(5, int(tokens[0, -1]), TARGET, [range(6)])
    for kind in KINDS:
        [[[change, _]]] = knockout.Knockouts(model, kind).changes(cache, [query])
        assert change == pytest.approx(expected, abs=1e-4)


def test_batches_are_bounded_and_each_has_a_row_that_hides_nothing(
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
    monkeypatch.setattr(knockout, "has_ring", lambda _: False)
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
        ([0.4, 0.2, 0.3, 0.1, 0.0], [2, 1], [3, 4]),  # the nearest of 1 is taken
        ([0.4, 0.1, 0.1, 0.3, 0.1], [3], [2]),  # the earlier of two
        ([0.5, 0.25, 0.25], [1], [None]),  # no less weight
        ([0.5, 0.3, 0.2], [1, 2], [None, None]),  # none but the sink is left
        ([0.0, 0.6, 0.4], [1], [2]),  # never the sink
    ],
)
def test_a_control_is_the_nearest_weaker_position(
    weights: list[float], sources: list[int], controls: list[int | None]
) -> None:
    assert choose_controls(np.array(weights, np.float32), sources, sink=0) == controls


def test_the_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [1, 8, 27, 64]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [9, 7, 3, -5]) == pytest.approx(-1)
    # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)), Spearman 1904.
    x, y = [86, 97, 99, 100, 101, 103, 106, 110, 112, 113], [2, 20, 28, 27, 50, 29, 7, 17, 6, 12]
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * 194 / (10 * 99))
    # Ties share the mean of their ranks: 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_correlation([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    for nothing_to_rank in (([], []), ([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3])):
        assert rank_correlation(*nothing_to_rank) is None


def test_rank_correlations_with_ties_equal_a_plain_loop() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        x, y = generator.integers(0, 6, (2, 15)).tolist()

        def ranks(values: list[int]) -> list[float]:
            return [
                sum(other < value for other in values)
                + (sum(other == value for other in values) + 1) / 2
                for value in values
            ]

        expected = np.corrcoef(ranks(x), ranks(y))[0, 1]
        assert rank_correlation(x, y) == pytest.approx(expected)


def effect(weight: float, change: float, control_of: int | None = None) -> Effect:
    return Effect(Source(Token(1, 1, b"a"), weight), change, control_of)


def check_cause(effects: Sequence[Effect]) -> CauseCheck | None:
    tally = CauseTally()
    tally.add(TraceStep(0, Token(9, 9, b"b"), -1.0, (), "", None, effects=tuple(effects)))
    return tally.check()


def test_the_cause_check_covers_all_sources_and_controls() -> None:
    assert check_cause([]) is None
    check = check_cause([effect(0.5, -2.0), effect(0.3, 1.0), effect(0.1, -0.5, 0)])
    assert check is not None
    assert (check.n_sources, check.n_controls) == (2, 1)
    assert (check.mean_effect, check.mean_control_effect) == (1.5, 0.5)
    assert check.rank_correlation == pytest.approx(1)
    alone = check_cause([effect(0.5, -2.0)])
    assert alone is not None
    assert (alone.n_controls, alone.mean_control_effect, alone.rank_correlation) == (0, 0.0, None)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_without_heads_equals_zeroed_columns_of_the_output_projection(layout: str) -> None:
    model, planted = small_model(layout), small_model(layout)
    tokens, d_head = random_tokens(2, 9), model.config.d_head
    for layer, head in [(0, 1), (1, 0), (1, 3)]:
        weight = planted.blocks[layer].attention.output.weight
        weight[:, head * d_head : (head + 1) * d_head] = 0
    before = model(tokens)
    with without_heads(model, 0, [1]), without_heads(model, 1, [0, 3]):
        torch.testing.assert_close(model(tokens), planted(tokens))
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)


TOKENIZER = BytesTokenizer()


def steps_of(
    model: GPT, prompt: list[int], *, n_tokens: int = 6, compiles: bool = False, **config: Any
) -> tuple[list[TraceStep], TraceFooter]:
    _, *steps, footer = trace(
        model,
        TOKENIZER,
        prompt,
        SamplingConfig(max_new_tokens=n_tokens),
        AnalysisConfig(**config),
        seed=2,
        compiles=compiles,
    )
    assert isinstance(footer, TraceFooter)
    return [step for step in steps if isinstance(step, TraceStep)], footer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["float32", "bfloat16", "int8", "graph"])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama-grouped"])
def test_knockouts_change_no_token_and_no_bit_of_the_trace(
    layout: str, way: str, kind: Knockout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(n_verified: int) -> list[TraceStep]:
        model = small_model(layout, vocab_size=257)
        if way == "bfloat16":
            model.bfloat16()
        elif way == "int8":
            quantize_int8(model)
        return steps_of(
            model,
            list(b"to be or"),
            compiles=way == "graph",
            n_verified=n_verified,
            knockout=kind,
            roles=n_verified > 0,
        )[0]

    monkeypatch.setattr(
        compiled,
        "load_step",
        lambda step, **_: lambda given: list(step(*given[:3], given[3:-2], given[-2:])),
    )
    for checked, plain in zip(run(3), run(0), strict=True):
        assert (checked.token, checked.log_probability) == (plain.token, plain.log_probability)
        assert np.array_equal(checked.row.weights_S, plain.row.weights_S)
        assert len([e for e in checked.effects if e.control_of is None]) == 3
        assert plain.effects == ()


@pytest.mark.parametrize("n_sources", [0, 2])
def test_a_trace_knocks_out_the_strongest_sources_even_if_it_shows_fewer(n_sources: int) -> None:
    model = small_model("qwen3", vocab_size=257)
    prompt = list(b"to be or")
    steps, footer = steps_of(model, prompt, n_verified=3, n_sources=n_sources, sink=2)
    tokens = list(prompt)
    for step in steps:
        row = step.row.weights_S
        strongest = sorted({*range(len(row))} - {2}, key=lambda i: -row[i])[:3]
        sources = [e for e in step.effects if e.control_of is None]
        controls = [e for e in step.effects if e.control_of is not None]
        assert [e.source.token.position for e in sources] == strongest
        assert step.effects == (*sources, *controls)
        chosen = choose_controls(row, strongest, sink=2)
        assert [chosen[e.control_of or 0] for e in controls] == [
            e.source.token.position for e in controls
        ]
        seen = torch.tensor([tokens])
        with torch.no_grad():
            whole = model(seen)[0, -1].log_softmax(dim=0)[step.token.id].item()
            for e in step.effects:
                position = e.source.token.position
                assert e.source.weight == row[position]
                assert e.source.token.id == tokens[position]
                with last_query_without(position, "key"):
                    changed = model(seen)[0, -1].log_softmax(dim=0)[step.token.id].item()
                assert e.change == pytest.approx(changed - whole, abs=2e-4)
        tokens.append(step.token.id)
    assert footer.cause == check_cause([e for step in steps for e in step.effects])


@pytest.mark.parametrize("heads", [None, "1.1,0.2-3"])
@pytest.mark.usefixtures("way")
def test_verify_all_gives_the_effect_of_every_position(heads: str | None) -> None:
    model, prompt = small_model("llama-grouped", vocab_size=257), list(b"to be or")
    steps, footer = steps_of(model, prompt, n_verified="all", verify_heads=heads, n_sources=3)
    chosen = heads and select_heads(2, 4, heads=heads).heads_by_layer
    tokens = list(prompt)
    weights, changes = [], []
    for step in steps:
        assert step.changes_S is not None
        assert step.kept is None
        for position, change in enumerate(step.changes_S):
            with torch.no_grad():
                whole = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=0)[step.token.id]
                with last_query_without(position, "key", chosen or None):
                    without = model(torch.tensor([tokens]))[0, -1].log_softmax(dim=0)
            assert change == pytest.approx((without[step.token.id] - whole).item(), abs=2e-4)
        largest = np.argsort(-abs(step.changes_S), kind="stable")[:3].tolist()
        assert [e.source.token.position for e in step.effects] == largest
        assert [e.change for e in step.effects] == step.changes_S[largest].tolist()
        weights += step.row.weights_S.tolist()
        changes += abs(step.changes_S).tolist()
        tokens.append(step.token.id)
    assert footer.cause is not None
    assert (footer.cause.n_sources, footer.cause.n_controls) == (len(weights), 0)
    assert footer.cause.rank_correlation == rank_correlation(weights, changes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("way")
def test_the_sources_and_the_sink_alone_equal_a_full_forward_without_all_else(
    kind: Knockout,
) -> None:
    model, prompt = small_model("gpt2", vocab_size=257), list(b"to be or")
    steps, _ = steps_of(model, prompt, n_verified=2, knockout=kind, sink=1)
    tokens = list(prompt)
    for step in steps:
        seen = {1} | {e.source.token.position for e in step.effects if e.control_of is None}
        others = [position for position in range(len(tokens)) if position not in seen]
        with torch.no_grad():
            whole = model(torch.tensor([tokens]))[0, -1]
            with last_query_without(others, kind):
                alone = model(torch.tensor([tokens]))[0, -1]
        target = step.token.id
        change = (alone.log_softmax(dim=0) - whole.log_softmax(dim=0))[target].item()
        assert step.kept is not None
        assert step.kept.change == pytest.approx(change, abs=2e-4)
        assert step.kept.logit_change == pytest.approx((alone - whole)[target].item(), abs=2e-4)
        tokens.append(target)


def test_an_interrupted_trace_ends_with_a_footer_about_the_steps_so_far() -> None:
    model = small_model("llama", vocab_size=257)
    events = trace(
        model,
        TOKENIZER,
        list(b"to be"),
        SamplingConfig(max_new_tokens=12),
        AnalysisConfig(n_verified=2),
        seed=2,
    )
    next(events)
    for step in (next(events), next(events), next(events)):
        assert isinstance(step, TraceStep)
        assert step.effects
    footer = events.throw(KeyboardInterrupt)
    assert isinstance(footer, TraceFooter)
    assert (footer.n_tokens, footer.finish) == (3, None)
    assert footer.cause is not None
    assert footer.cause.n_sources == 6


def test_a_single_token_has_no_source_to_knock_out() -> None:
    model = small_model("gpt2", vocab_size=257)
    steps, footer = steps_of(model, [97], n_tokens=1, n_verified=3)
    assert (steps[0].effects, footer.cause) == ((), None)
    steps, _ = steps_of(model, [97, 98], n_tokens=1, n_verified=3)
    assert [e.source.token.position for e in steps[0].effects] == [1], "the query's own"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["additive", "concat", "general", "dot"])
def test_a_knockout_in_every_head_of_another_score_equals_one_without_a_choice_of_heads(
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


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_positions_are_knocked_out_of_the_queries_of_the_prompt_too(n_tokens: int) -> None:
    model, prompt = small_model("llama-grouped", vocab_size=257), list(b"to be or")
    steps, footer = steps_of(model, prompt, n_tokens=n_tokens, n_verified="all", prompt_rows=True)
    assert (len(steps), footer.n_tokens) == (len(prompt) - 1 + n_tokens, n_tokens)
    tokens = prompt + [step.token.id for step in steps[len(prompt) - 1 :]]
    for step in steps[1:]:
        assert step.changes_S is not None
        seen = torch.tensor([tokens[: step.token.position]])
        with torch.no_grad():
            whole = model(seen)[0, -1].log_softmax(dim=0)[step.token.id]
            for position, change in enumerate(step.changes_S):
                with last_query_without(position, "key"):
                    without = model(seen)[0, -1].log_softmax(dim=0)[step.token.id]
                assert change == pytest.approx((without - whole).item(), abs=2e-4)
