"""Ablation and patching of heads and layers, compared with zeroed weights and plain loops."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from small_models import FAMILIES, LAYOUTS, SOFTCAP, any_model

import minigpt
from minigpt.errors import ConfigError, DataError
from minigpt.intervention_config import InterventionConfig
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.findings import Trace
from minigpt.tracing.interventions import intervene

TOKENIZER = BytesTokenizer()
PROMPT, OTHER = "to be or", "by me no"


MODELS = (*LAYOUTS, *FAMILIES, SOFTCAP)


def model_of(layout: str) -> GPT:
    return any_model(layout, vocab_size=257)


def traced(model: GPT, prompt: str = PROMPT, **options: Any) -> Trace:
    options = {"max_new_tokens": 4, "temperature": 1.0, "prompt_rows": True} | options
    trace = minigpt.trace(model, prompt, tokenizer=TOKENIZER, seed=4, **options)
    assert isinstance(trace, Trace)
    return trace


def assert_predicted_by(trace: Trace, log_p: torch.Tensor) -> None:
    """Check each token's probability against those of a full forward (T, V)."""
    for step in trace.steps:
        expected = log_p[step.token.position - 1, step.token.id].item()
        assert step.log_probability == pytest.approx(expected, abs=1e-3)


def ids_of(trace: Trace) -> torch.Tensor:
    return torch.tensor([[token.id for token in trace.tokens[:-1]]])


@torch.no_grad()
def plain(model: GPT, tokens: torch.Tensor, put: Any = None) -> tuple[torch.Tensor, list[Any]]:
    """Return log-probabilities and head outputs (T, H, D); ``put`` edits those of a layer."""
    outputs, hooks = [], []

    def hook(layer: int) -> Any:
        def change(_: Any, inputs: tuple[torch.Tensor]) -> torch.Tensor:
            z = inputs[0].unflatten(-1, (4, -1)).clone()
            if put is not None:
                put(layer, z[0])
            outputs.append(z[0])
            return z.flatten(2)

        return change

    for layer, attention in enumerate(model.attentions):
        hooks.append(attention.output.register_forward_pre_hook(hook(layer)))
    log_p = model(tokens).log_softmax(-1)[0]
    for one in hooks:
        one.remove()
    return log_p, outputs


@pytest.mark.parametrize("layout", MODELS)
def test_an_ablated_head_equals_zeroed_columns_of_the_output_projection(layout: str) -> None:
    model = model_of(layout)
    before = copy.deepcopy(model.state_dict())
    trace = traced(model, ablate="1.3,0.*")
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for layer, heads in ((0, range(4)), (1, [3])):
            weight = zeroed.attentions[layer].output.weight.unflatten(1, (4, -1))
            weight[:, list(heads)] = 0
    expected = traced(zeroed)
    assert [step.token for step in trace.steps] == [step.token for step in expected.steps]
    for one, other in zip(trace.steps, expected.steps, strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        assert one.row.weights_S == pytest.approx(other.row.weights_S, abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert [s.token for s in traced(model).steps] != [s.token for s in trace.steps]


@pytest.mark.parametrize("layout", MODELS)
def test_a_mean_ablated_head_outputs_its_prompt_mean_everywhere(layout: str) -> None:
    model = model_of(layout)
    trace = traced(model, ablate="0.1-2,1.0", ablate_mean=True)
    _, outputs = plain(model, torch.tensor([list(PROMPT.encode())]))

    def put(layer: int, z_THD: torch.Tensor) -> None:
        for head in ([1, 2], [0])[layer]:
            z_THD[:, head] = outputs[layer][:, head].mean(dim=0)

    assert_predicted_by(trace, plain(model, ids_of(trace), put)[0])


@pytest.mark.parametrize("position", [None, 0, 3, "all"])
@pytest.mark.parametrize("layout", MODELS)
def test_a_patched_run_equals_a_plain_forward_with_hooks(layout: str, position: Any) -> None:
    model = model_of(layout)
    trace = traced(model, patch_from=OTHER, patch="0.1,1.*", patch_position=position)
    _, outputs = plain(model, torch.tensor([list(OTHER.encode())]))
    places = range(8) if position == "all" else [7 if position is None else position]

    def put(layer: int, z_THD: torch.Tensor) -> None:
        for head in ([1], range(4))[layer]:
            for place in places:
                z_THD[place, head] = outputs[layer][place, head]

    assert_predicted_by(trace, plain(model, ids_of(trace), put)[0])
    assert trace.header.intervention == InterventionConfig(
        patch_from=OTHER, patch="0.1,1.*", patch_position="all" if position == "all" else places[0]
    )


def test_a_patch_remains_when_longrope_computes_the_prompt_again() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "attention_factor": 1.5}
    scaling = factors | {"rope_type": "longrope", "original_max_position_embeddings": 10}
    model = any_model("olmo2", rope_scaling=scaling, vocab_size=257)
    trace = traced(model, patch_from=OTHER, patch="0.1,1.*", patch_position=3)
    _, outputs = plain(model, torch.tensor([list(OTHER.encode())]))

    def put(layer: int, z_THD: torch.Tensor) -> None:
        for head in ([1], range(4))[layer]:
            if len(z_THD) > 3:
                z_THD[3, head] = outputs[layer][3, head]

    for step in trace.steps:  # the frequencies depend on the number of tokens
        log_p, _ = plain(model, ids_of(trace)[:, : step.token.position], put)
        expected = log_p[-1, step.token.id].item()
        assert step.log_probability == pytest.approx(expected, abs=1e-3)


def log_p_with_streams(
    model: GPT, tokens: torch.Tensor, streams: dict[int, torch.Tensor], places: list[int]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run block after block, patch the stream after some of them, and return all streams, too."""
    n = tokens.shape[1]
    x, rotary = model.embed(tokens), None
    if model.config.family == "gpt2":
        x = x + model.positions(torch.arange(n))
    else:
        rotary = model.rotary_cos[:n], model.rotary_sin[:n]
    seen = []
    for layer, block in enumerate(model.blocks):
        x = block(x, rotary)
        seen.append(x[0].clone())
        if layer in streams:
            x = torch.stack([streams[layer][t] if t in places else x[0, t] for t in range(n)])[None]
    return model.logits(x, 0).log_softmax(-1)[0], seen


@pytest.mark.parametrize(
    ("patch", "position"), [("0", None), ("1", None), ("1", 0), ("0-1", 3), ("0,1.2", "all")]
)
@pytest.mark.parametrize("layout", MODELS)
@torch.no_grad()
def test_a_patched_layer_equals_a_plain_loop_over_blocks(
    layout: str, patch: str, position: Any
) -> None:
    model = model_of(layout)
    trace = traced(model, patch_from=OTHER, patch=patch, patch_position=position, lens=True)
    places = list(range(8)) if position == "all" else [7 if position is None else position]
    _, streams = log_p_with_streams(model, torch.tensor([list(OTHER.encode())]), {}, [])
    layers = {"0": [0], "1": [1], "0-1": [0, 1], "0,1.2": [0]}[patch]
    _, outputs = plain(model, torch.tensor([list(OTHER.encode())]))

    def put(inputs: tuple[torch.Tensor]) -> torch.Tensor:
        z = inputs[0].unflatten(-1, (4, -1)).clone()
        for place in places:
            z[0, place, 2] = outputs[1][place, 2]
        return z.flatten(2)

    hook = None
    if "." in patch:
        output = model.attentions[1].output
        hook = output.register_forward_pre_hook(lambda _, inputs: put(inputs))
    kept = {layer: streams[layer] for layer in layers}
    log_p, _ = log_p_with_streams(model, ids_of(trace), kept, places)
    if hook is not None:
        hook.remove()
    assert_predicted_by(trace, log_p)
    for step in trace.steps:  # the last layer of the lens is the prediction
        assert step.lens is not None
        assert step.lens.log_probabilities[-1] == pytest.approx(step.log_probability, abs=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("patch", "says"),
    [
        ("1", "layer 1 patched at position 2 from"),
        ("0.1", "head 0.1 patched at position 2 from"),
        ("0.1,1", "heads and layers 0.1,1 patched at position 2 from"),
    ],
)
def test_an_intervention_names_what_it_patches(patch: str, says: str) -> None:
    config = InterventionConfig(patch_from=OTHER, patch=patch, patch_position=2)
    assert says in str(config)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ablate": "1.3"}, "head 1.3 set to 0"),
        ({"ablate": "1.3", "ablate_mean": True}, "head 1.3 set to its mean over the prompt"),
        ({"ablate": "1.3,2.0", "ablate_mean": True}, "heads 1.3,2.0 set to their mean over the"),
        ({"ablate": "1.*"}, "heads 1.* set to 0"),
    ],
)
def test_an_intervention_names_one_ablated_head_in_the_singular(
    options: dict[str, Any], says: str
) -> None:
    assert str(InterventionConfig(**options)).startswith(says)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [([1] * 25, "the prompt has 25 tokens, but the model sees 24"), ([257], "the token id 257")],
)
def test_a_patch_prompt_that_the_model_cannot_run_is_refused(tokens: list[int], says: str) -> None:
    model = model_of("llama")
    plans = [{"ablate": "0.0", "ablate_mean": True}]
    plans += [{"patch_from": "x", "patch": patch} for patch in ("0.0", "0")]
    for plan in plans:
        with pytest.raises(DataError, match=says):
            intervene(model, InterventionConfig(**plan), tokens, lambda _: tokens)


def test_in_python_the_patch_prompt_may_be_token_ids() -> None:
    model, ids = model_of("llama"), list(OTHER.encode())
    one, other = (traced(model, patch_from=p, patch="1.*") for p in (OTHER, ids))
    assert [(s.token, s.log_probability) for s in one.steps] == [
        (s.token, s.log_probability) for s in other.steps
    ]
    assert one.header.intervention == other.header.intervention
    with pytest.raises(ConfigError, match="token ids outside 0 to 256"):
        traced(model, patch_from=[1, 2, 3, 4, 5, 6, 7, 257], patch="1.*")


def test_patching_a_run_from_the_same_prompt_changes_nothing() -> None:
    model = model_of("llama")
    same = traced(model, patch_from=PROMPT, patch="*.*", patch_position="all")
    assert [s.token for s in same.steps] == [s.token for s in traced(model).steps]


@pytest.mark.parametrize(
    "options",
    [
        {"ablate": "1.3"},
        {"ablate": "0.*", "ablate_mean": True},
        {"patch_from": OTHER, "patch": "1.*"},
        {"patch_from": OTHER, "patch": "0", "patch_position": 3},
    ],
    ids=str,
)
def test_tracing_a_changed_model_changes_nothing(options: dict[str, Any]) -> None:
    model = model_of("llama-grouped")
    trace = traced(model, n_verified=2, lens=True, measure="both", roles=False, **options)
    items = list(
        minigpt.generate(
            model, PROMPT, tokenizer=TOKENIZER, seed=4, max_new_tokens=4, temperature=1.0, **options
        )
    )
    steps = [s for s in trace.steps if not s.is_given]
    assert [(s.token.id, s.log_probability) for s in steps] == [
        (item.step.token, item.step.log_probability) for item in items
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ablate": "2.0"}, "--ablate 2.0 is out of range: the model has layers 0 to 1"),
        ({"ablate": "0.4"}, "--ablate 0.4 is out of range: the model has heads 0 to 3"),
        ({"ablate_mean": True}, "--ablate-mean has no effect without --ablate"),
        ({"patch": "0.0"}, "--patch-from and --patch belong together"),
        ({"patch_from": OTHER}, "--patch-from and --patch belong together"),
        ({"patch_position": 1}, "--patch-position has no effect without --patch-from"),
        ({"patch_from": "short", "patch": "0.0"}, "it has 5, and the first has 8"),
        ({"patch_from": OTHER, "patch": "7.0"}, "--patch 7.0 is out of range"),
        ({"patch_from": OTHER, "patch": "2"}, "--patch 2 is out of range: the model has layers 0"),
        ({"patch_from": OTHER, "patch": "0.1,x"}, "--patch takes numbers and ranges"),
        ({"patch_from": OTHER, "patch": ""}, "--patch takes"),
        ({"patch_from": OTHER, "patch": "0,,1"}, "--patch takes numbers and ranges"),
        (
            {"patch_from": OTHER, "patch": "0.0", "patch_position": 8},
            "--patch-position must be a position of the prompt, 0 to 7",
        ),
        (
            {"patch_from": OTHER, "patch": "0.0", "roles": True},
            "roles are measured on random tokens",
        ),
    ],
)
def test_invalid_interventions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says.replace("(", r"\(")):
        traced(model_of("llama"), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ablate": "1.*"},
        {"patch_from": OTHER, "patch": "0.*", "patch_position": 2},
        {"patch_from": OTHER, "patch": "0", "patch_position": 2},
    ],
    ids=str,
)
def test_integrated_gradients_are_those_of_the_changed_model(options: dict[str, Any]) -> None:
    model, prompt = model_of("llama"), list(PROMPT.encode())
    trace = traced(model, measure="integrated", n_steps=4, **options)
    changed, _ = intervene(model, InterventionConfig(**options), prompt, TOKENIZER.encode_prompt)
    logits = changed(ids_of(trace))[0]
    for step in trace.steps[len(prompt) - 1 :]:
        expected = logits[step.token.position - 1, step.token.id].item()
        assert step.row.whole == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("layout", MODELS)
def test_logit_attribution_of_ablated_heads_equals_zeroed_columns_and_a_bias(
    layout: str, mean: bool
) -> None:
    model = model_of(layout)
    options: dict[str, Any] = {"ablate": "1.3,0.*", "ablate_mean": mean, "prompt_rows": False}
    trace = traced(model, measure="logit", has_heads=True, **options)
    _, outputs = plain(model, torch.tensor([list(PROMPT.encode())]))
    other = copy.deepcopy(model)
    for layer, heads in ((0, range(4)), (1, [3])):
        output = other.attentions[layer].output
        weight = output.weight.data.unflatten(1, (4, -1))
        if mean:
            mean_HD = outputs[layer].mean(dim=0)
            added = sum(weight[:, head] @ mean_HD[head] for head in heads)
            output.bias = torch.nn.Parameter(added + (0 if output.bias is None else output.bias))
        weight[:, list(heads)] = 0
    expected = traced(other, measure="logit", has_heads=True, prompt_rows=False)
    assert [step.token for step in trace.steps] == [step.token for step in expected.steps]
    for one, two in zip(trace.steps, expected.steps, strict=True):
        assert one.row.weights_S == pytest.approx(two.row.weights_S, abs=1e-4)
        assert one.row.whole == pytest.approx(two.row.whole, abs=1e-4)
        parts = dict(one.row.parts)
        parts["bias"] += parts.pop("intervention")
        assert parts == pytest.approx(dict(two.row.parts), abs=1e-4)
        assert one.row.total + sum(one.row.parts.values()) == pytest.approx(one.row.whole, abs=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("patch", ["0.1,1.*", "0", "1", "0,1.2", "0.1,1"])
@pytest.mark.parametrize("position", [3, "all"])
@pytest.mark.parametrize("layout", MODELS)
@torch.no_grad()
def test_logit_attribution_of_a_patched_model_is_complete_at_every_token(
    layout: str, position: Any, patch: str
) -> None:
    model = model_of(layout)
    options: dict[str, Any] = {"patch_from": OTHER, "patch": patch, "patch_position": position}
    trace = traced(model, measure="logit", has_heads=True, **options)
    plain_trace = traced(model, patch_from=OTHER, patch=patch, patch_position=position)
    changed, _ = intervene(
        model, InterventionConfig(**options), list(PROMPT.encode()), TOKENIZER.encode_prompt
    )
    stream: list[torch.Tensor] = []
    changed.final_norm.register_forward_pre_hook(lambda _, x: stream.append(x[0][0]))
    logits = changed(ids_of(trace))[0]
    _, outputs = plain(model, torch.tensor([list(OTHER.encode())]))
    cap = 3.0 if layout == SOFTCAP else None
    unembedding = model.unembedding or model.embedding
    for step, same in zip(trace.steps, plain_trace.steps, strict=True):
        row, query = step.row, step.token.position - 1
        assert step.log_probability == same.log_probability
        whole = torch.tensor(row.whole)
        shown = whole if cap is None else cap * (whole / cap).tanh()
        assert float(shown) == pytest.approx(logits[query, step.token.id].item(), abs=1e-3)
        assert row.total + sum(row.parts.values()) == pytest.approx(row.whole, abs=1e-3)
        assert abs(row.parts["rounding"]) < 1e-3
        is_patched = query < 8 if position == "all" else query == position
        assert ("intervention" in row.parts) == is_patched
        if not is_patched:
            continue
        assert row.heads is not None
        by_head = row.heads.sink + row.heads.weights.sum(axis=-1)  # all positions are stored
        gone = {"0.1,1.*": [(0, 1), *((1, h) for h in range(4))], "0,1.2": [(1, 2)]}
        for layer, head in gone.get(patch, []):
            assert by_head[layer, head] == 0
        if patch == "1":  # the entire stream is that of the other prompt
            assert not np.any(row.weights_S)
            assert row.parts["intervention"] + row.parts["bias"] == pytest.approx(
                row.whole, abs=1e-3
            )
        if patch == "0.1,1.*" and layout in LAYOUTS:
            x_C, w_C = stream[0][query], unembedding.weight[step.token.id]
            norm = model.final_norm
            if isinstance(norm, torch.nn.LayerNorm):
                scale = (x_C.var(correction=0) + norm.eps).sqrt()
            else:
                scale = (x_C.square().mean() + model.config.norm_eps).sqrt()
            added = 0.0
            for layer, head in gone[patch]:
                weight = model.attentions[layer].output.weight.unflatten(1, (4, -1))
                added_C = weight[:, head] @ outputs[layer][query, head]
                if isinstance(norm, torch.nn.LayerNorm):
                    added_C = added_C - added_C.mean()
                added += float((added_C * norm.weight / scale) @ w_C)
            assert row.parts["intervention"] == pytest.approx(added, abs=1e-3)


def test_a_function_assigned_to_forward_is_refused() -> None:
    model = any_model("gpt2", vocab_size=257)
    own = model.blocks[0].forward
    model.blocks[0].forward = lambda *args: own(*args)
    with pytest.raises(ConfigError, match="forward of a Block, so that hooks"):
        minigpt.trace(model, "abc", tokenizer=BytesTokenizer(), max_new_tokens=1, ablate="0.0")
