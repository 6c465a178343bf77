"""The scores against plain loops, each other, and gradients by finite differences."""

import math
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from live_bytes import LiveBytes
from small_models import random_tokens, small_config, small_model
from torch import Tensor, nn

from minigpt.errors import ConfigError
from minigpt.model.cache import KVCache
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.gpt import GPT
from minigpt.model.scores import Score, causal_softmax, make_score, scaled_dot_score
from minigpt.model.variants import tanh_scores
from minigpt.model_config import ATTENTIONS

TANH = ("concat", "additive")
OTHERS = tuple(name for name in ATTENTIONS if name != "scaled_dot")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def parameters_of(name: str, n_head: int, d_head: int, n_hidden: int) -> dict[str, Tensor]:
    shapes = {
        "scaled_dot": {},
        "dot": {},
        "general": {"w": (n_head, d_head, d_head)},
        "concat": {"w": (n_head, n_hidden, 2 * d_head), "v": (n_head, n_hidden)},
        "additive": {
            "w_q": (n_head, n_hidden, d_head),
            "w_k": (n_head, n_hidden, d_head),
            "v": (n_head, n_hidden),
        },
    }[name]
    return {key: drawn(*shape, seed=i + 5) for i, (key, shape) in enumerate(shapes.items())}


def score_with(name: str, parameters: dict[str, Tensor], n_head: int, d_head: int) -> Score:
    """Build a score with these parameters, each of shape (H, A, ...)."""
    shape = {"n_head": n_head, "d_head": d_head, "n_kv_head": 1, "family": "llama"}
    score = make_score(small_config("llama", **shape | {"attention": name, "d_head": 2 * d_head}))
    score.d_head = d_head
    for key, value in parameters.items():
        setattr(score, key, nn.Parameter(value.flatten(0, 1)))
    return score


def scored(score: Score, q: Tensor, k: Tensor) -> Tensor:
    return score.score(score.fold(q), k)


def product(matrix: list[list[float]], vector: list[float]) -> list[float]:
    return [sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix]


def dot(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def plain_score(name: str, q: list[float], k: list[float], p: dict[str, Any]) -> float:
    """Return the score of one query and one key from the formula in its paper."""
    match name:
        case "scaled_dot":
            return dot(q, k) / math.sqrt(len(q))
        case "dot":
            return dot(q, k)
        case "general":
            return dot(q, product(p["w"], k))
        case "concat":
            return dot(p["v"], [math.tanh(x) for x in product(p["w"], q + k)])
        case _:
            hidden = zip(product(p["w_q"], q), product(p["w_k"], k), strict=True)
            return dot(p["v"], [math.tanh(a + b) for a, b in hidden])


@pytest.mark.parametrize("n_group", [1, 2, 4])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_each_score_equals_a_plain_loop(name: str, n_group: int) -> None:
    q, k = drawn(2, 4, 3, 5), drawn(2, n_group, 6, 5, seed=1)
    parameters = parameters_of(name, 4, 5, 7)
    score = scored(score_with(name, parameters, 4, 5).float(), q.float(), k.float())
    assert score.dtype == torch.float32
    expected = torch.empty(2, 4, 3, 6, dtype=torch.float64)
    for b, h, t, s in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        of_head = {key: p[h].tolist() for key, p in parameters.items()}
        key = k[b, h // (4 // n_group), s].tolist()
        expected[b, h, t, s] = plain_score(name, q[b, h, t].tolist(), key, of_head)
    # float32 sums of at most ten products, or of seven tanh terms.
    torch.testing.assert_close(score.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_gradients_of_each_score_equal_finite_differences(name: str) -> None:
    module = score_with(name, parameters_of(name, 4, 3, 2), 4, 3)
    names = [key for key, _ in module.named_parameters()]
    leaves = [drawn(2, 4, 2, 3), drawn(2, 2, 3, 3, seed=1)]
    leaves = [leaf.requires_grad_() for leaf in leaves] + list(module.parameters())

    def score(q: Tensor, k: Tensor, *values: Tensor) -> Any:
        class Scored(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, q: Tensor, k: Tensor) -> Tensor:
                return scored(self.module, q, k)

        given = {f"module.{key}": value for key, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Scored(), given, (q, k))

    assert torch.autograd.gradcheck(score, leaves)


def test_concat_with_concatenated_matrices_is_additive() -> None:
    q, k, p = drawn(2, 4, 3, 5), drawn(2, 2, 6, 5, seed=1), parameters_of("additive", 4, 5, 7)
    both = {"w": torch.cat((p["w_q"], p["w_k"]), dim=2), "v": p["v"]}
    concat, additive = score_with("concat", both, 4, 5), score_with("additive", p, 4, 5)
    torch.testing.assert_close(scored(concat, q, k), scored(additive, q, k))


def test_general_with_an_identity_matrix_is_dot_and_dot_is_unscaled_scaled_dot() -> None:
    q, k = drawn(2, 4, 3, 5), drawn(2, 2, 6, 5, seed=1)
    identity = torch.eye(5, dtype=torch.float64).expand(4, 5, 5)
    general, dotted = score_with("general", {"w": identity}, 4, 5), score_with("dot", {}, 4, 5)
    torch.testing.assert_close(scored(general, q, k), scored(dotted, q, k))
    torch.testing.assert_close(scaled_dot_score(q, k) * 5**0.5, scored(dotted, q, k))


def test_orthogonal_vectors_have_a_zero_dot_product_but_an_additive_score() -> None:
    q, k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    identity = torch.eye(2)[None]
    parameters = {"w_q": identity, "w_k": identity, "v": torch.ones(1, 2)}
    assert scored(score_with("dot", {}, 1, 2), q, k).item() == 0
    additive = score_with("additive", parameters, 1, 2)
    assert scored(additive, q, k).item() == pytest.approx(2 * math.tanh(1))


def score_of(name: str, *, dtype: torch.dtype = torch.float64) -> Score:
    """Build a random score for four heads of width eight in two groups."""
    score = make_score(small_config("llama-grouped", attention=name)).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(score.parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=i + 5))
    return score


@pytest.mark.parametrize("name", ["scaled_dot", "dot", "general"])
def test_folding_a_score_into_the_queries_gives_a_scaled_dot_product(name: str) -> None:
    score = score_of(name)
    q, k = drawn(2, 4, 3, 8), drawn(2, 2, 6, 8, seed=1)
    torch.testing.assert_close(scaled_dot_score(score.fold(q), k), scored(score, q, k))
    assert score.is_dot_product
    assert score.changes_queries == (not torch.equal(score.fold(q), q))


def unchunked_attention(
    score: Score, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return outputs and weights, computed from all queries and keys at once."""
    n_query, n_key = q.shape[2], k.shape[2]
    may_look = torch.ones(n_query, n_key, dtype=torch.bool).tril(n_key - n_query)
    if visible is not None:
        may_look = may_look & visible[:, None, None]
    weights = scored(score, q, k).masked_fill(~may_look, -torch.inf).softmax(-1).nan_to_num(0)
    return weights @ v.repeat_interleave(2, dim=1), weights


@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize(("n_query", "n_key"), [(1, 9), (9, 9), (5, 9)])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_chunked_attention_equals_unchunked_forward_and_backward(
    name: str, n_query: int, n_key: int, hides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two queries per chunk: 9 keys x 8 hidden values x 4 heads x 2 sequences each.
    monkeypatch.setattr(tanh_scores, "_MAX_HIDDEN", 2 * 9 * 8 * 4 * 2)
    score = score_of(name)
    visible = torch.ones(2, n_key, dtype=torch.bool)
    visible[0, :2] = visible[1, 3] = False  # the first query of one sequence sees no key
    visible_or_none = visible if hides else None
    gradients = []
    for is_whole in (True, False):
        q, k, v = (
            drawn(2, h, n, 8, seed=s) for s, (h, n) in enumerate([(4, n_query)] + 2 * [(2, n_key)])
        )
        leaves = [leaf.requires_grad_() for leaf in (q, k, v)] + list(score.parameters())
        if is_whole:
            context, weights = unchunked_attention(score, q, k, v, visible_or_none)
        else:
            context = score.attend(score.fold(q), k, v, visible_or_none)
        gradients.append((context, *torch.autograd.grad((context**2).sum(), leaves)))
    for chunked, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(chunked, whole)
    if not hides:
        rows = score.weights(score.fold(q), k)
        torch.testing.assert_close(rows, weights)
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[..., 0]))


@pytest.mark.integration
def test_chunked_gradients_equal_finite_differences(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tanh_scores, "_MAX_HIDDEN", 1)
    score = make_score(
        small_config(attention="additive", d_model=8, n_head=2, n_kv_head=1)
    ).double()
    leaves = [drawn(1, 2, 3, 4), drawn(1, 1, 4, 4, seed=1), drawn(1, 1, 4, 4, seed=2)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(
        lambda q, k, v, *_: score.attend(q, k, v), [*leaves, *score.parameters()]
    )


@pytest.mark.integration
@pytest.mark.parametrize("name", TANH)
def test_the_memory_of_tanh_scores_does_not_grow_with_queries_times_keys(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measure all live tensors, forward and backward, and those saved for the backward pass."""
    monkeypatch.setattr(tanh_scores, "_MAX_HIDDEN", 2**14)
    score = score_of(name, dtype=torch.float32)
    peaks, kept = [], []
    for n in (64, 256):
        q = drawn(1, 4, n, 8, dtype=torch.float32).requires_grad_()
        k, v = (drawn(1, 2, n, 8, seed=s, dtype=torch.float32).requires_grad_() for s in (1, 2))
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            context = score.attend(q, k, v)
        kept.append(sum(saved.values()))
        with LiveBytes() as live:
            score.attend(q, k, v).sum().backward()
        peaks.append(live.peak)
        assert context.shape == (1, 4, n, 8)
    # All hidden values of 256 queries take 8 MiB; a chunk takes 64 KiB, and a backward pass holds a
    # few chunks. All other memory grows with the number of queries: fourfold, not sixteenfold.
    assert peaks[1] < 2**20 < 4 * 256 * 256 * 8 * 4
    assert peaks[1] < 4 * peaks[0]
    assert kept[1] <= 4 * kept[0] < 2**20


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_recorded_rows_times_values_equal_the_head_outputs_in_every_layer(name: str) -> None:
    """Rows sum to 1, and rows times the values equal the head outputs."""
    model = small_model("qwen3", attention=name)
    cache = KVCache(model.config, batch_size=2)
    kept, contexts = KeptAttention(), []
    for block in model.blocks:
        block.attention.output.register_forward_pre_hook(lambda _, x: contexts.append(x[0]))
    for part in random_tokens(2, 12).split([7, 1, 4], dim=1):
        contexts.clear()
        model(part, cache, kept)
        weights = kept.weights(model)
        assert weights.shape == (2, 2, 4, part.shape[1], cache.length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        values = kept.last.values_LBGSD.repeat_interleave(4 // model.config.n_kv_head, dim=2)
        heads = (weights @ values).transpose(2, 3).flatten(3)
        torch.testing.assert_close(heads, torch.stack(contexts), rtol=1e-4, atol=1e-5)
        assert weights.shape[-1] == 1 or weights.std() > 0


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_masked_positions_change_nothing(name: str) -> None:
    model = small_model("llama-grouped", attention=name)
    tokens = random_tokens(2, 10)
    visible = torch.ones(2, 10, dtype=torch.bool)
    visible[:, 4] = False
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 61
    before, after = (model(t, visible_BS=visible)[:, 5:] for t in (tokens, other))
    assert torch.equal(before, after)
    assert not torch.equal(model(tokens)[:, 5:], before)


def initialised(name: str, seed: int = 1) -> GPT:
    model = GPT(small_config("qwen3", attention=name, d_model=64, d_head=16))
    model.init_weights(torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def test_general_is_initialized_to_equal_the_scaled_dot_product() -> None:
    general, scaled = initialised("general"), initialised("scaled_dot")
    score, plain = general.blocks[0].attention.score, scaled.blocks[0].attention.score
    q, k = drawn(1, 4, 5, 16, dtype=torch.float32), drawn(1, 1, 5, 16, seed=1, dtype=torch.float32)
    torch.testing.assert_close(score.weights(score.fold(q), k), plain.weights(q, k))


@pytest.mark.parametrize("name", TANH)
@torch.no_grad()
def test_initial_tanh_scores_have_about_the_size_of_scaled_dot_scores(name: str) -> None:
    q, k = (drawn(4, 4, 30, 16, seed=s, dtype=torch.float32) for s in (0, 1))
    sizes = []
    for seed in range(8):
        score = initialised(name, seed).blocks[0].attention.score
        sizes.append(scored(score, q, k).std())
    # Queries and keys of unit variance have scaled dot products of standard deviation 1; a tanh is
    # smaller than its argument, and 64 draws of v are known to a tenth.
    assert 0.4 < torch.stack(sizes).mean() < 1


@pytest.mark.parametrize("name", OTHERS)
def test_every_score_parameter_gets_a_gradient_in_the_first_step(name: str) -> None:
    model = initialised(name)
    for block in model.blocks:  # llama's branches start at zero and would block gradients
        torch.nn.init.normal_(block.attention.output.weight, std=0.1)
    torch.nn.init.normal_(model.unembedding.weight, std=0.1)
    model(random_tokens(2, 24)).logsumexp(dim=-1).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        if ".score." in parameter_name:
            assert parameter.grad is not None
            assert (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", OTHERS)
def test_score_parameters_are_counted(name: str) -> None:
    config = small_config("qwen3", attention=name)
    model = GPT.without_weights(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())


def test_tanh_score_flops_include_hidden_values_and_matrices() -> None:
    scaled, additive = (small_config(attention=name) for name in ("scaled_dot", "additive"))
    # 2 layers of 4 heads of 8: W and U are (8, 8), v (8,); 12 visible keys on average
    matrices, hidden = 2 * 4 * (2 * 64 + 8), 2 * 4 * 12 * 8
    more = training_flops_per_token(additive) - training_flops_per_token(scaled)
    # a sum and a tanh forward, and twice as much backward
    assert more == 6 * matrices + 6 * hidden


def test_an_unknown_score_raises_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown attention 'aditive'"):
        small_config(attention="aditive")


def test_weights_of_a_fully_masked_query_are_zero() -> None:
    q, k = drawn(1, 1, 2, 4), drawn(1, 1, 2, 4, seed=1)
    visible = torch.tensor([[False, True]])
    weights = causal_softmax(scaled_dot_score(q, k), visible)
    kernel = score_of("scaled_dot").attend(q, k, k, visible)
    assert (weights[0, 0, 0] == 0).all()
    torch.testing.assert_close(weights @ k, kernel)
