"""Direct logit attribution: contributions of heads and positions to the token's logit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from copying import CONTEXT, copying_model, doubled
from kept_attention import KeptAttention
from laid_out import in_int8
from small_models import FAMILIES, LAYOUTS, any_model, random_tokens, small_model
from small_traces import small_trace
from torch import Tensor

import minigpt
from minigpt.checkpoint.model_folder import write_model
from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.model.variants.lstm import LSTM
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis import roles
from minigpt.tracing.analysis.measures import Measured, Prediction
from minigpt.tracing.analysis.observer import find_alternative
from minigpt.tracing.analysis.recorder import MeasureRecorder


def logit_of(model: GPT, tokens: Tensor, target: int, against: int | None = None) -> Measured:
    recorder = MeasureRecorder(model, measures=("logit",))
    model(tokens, recorder=recorder)
    return last_logit(recorder, tokens[0].tolist(), target, against)


def last_logit(
    recorder: MeasureRecorder, tokens: list[int], target: int, against: int | None = None
) -> Measured:
    prediction = Prediction(recorder.attention, tokens, target, against)
    [found] = recorder.measured_late("logit", [prediction])
    return found


@torch.inference_mode()
def test_hooks_of_a_tied_embedding_do_not_change_the_output_projection() -> None:
    model = small_model("llama", tie_embeddings=True)
    tokens = random_tokens(1, 7, vocab_size=model.config.vocab_size)
    with model.embedding.register_forward_hook(lambda *call: call[2] * 1.5 + 0.2):
        logit = model(tokens)[0, -1, 5].item()
        found = logit_of(model, tokens, 5)
    assert found.whole == pytest.approx(logit, abs=1e-4)


def plain_loop(model: GPT, tokens: Tensor, w_C: Tensor) -> Tensor:
    """Return the attribution (L, H, S), one head, position and product at a time (the oracle).

    With its scale held constant, the final norm is linear: a part of the stream, centred by a
    LayerNorm, divided by the scale of the entire stream.
    """
    states: list[Tensor] = []
    hook = model.final_norm.register_forward_pre_hook(lambda _, x: states.append(x[0][0, -1]))
    branches: list[Tensor] = []  # attention output of each layer, before a norm that follows it
    hooks = [
        block.attention_post_norm.register_forward_pre_hook(
            lambda _, x: branches.append(x[0][0, -1])
        )
        for block in model.blocks
    ]
    kept = KeptAttention()
    model(tokens, recorder=kept)
    for one in (hook, *hooks):
        one.remove()
    x_C, norm = states[0], model.final_norm
    centred_C = x_C - x_C.mean() if isinstance(norm, torch.nn.LayerNorm) else x_C
    rms = (centred_C.square().mean() + model.config.norm_eps).sqrt()
    gain_C = getattr(norm, "gain", norm.weight)
    n_head = model.config.n_head
    brought = torch.zeros(model.config.n_layer, n_head, tokens.shape[1])
    for layer, block in enumerate(model.blocks):
        values = kept.last.values_LBGSD[layer, 0]
        output = block.attention.output.weight.unflatten(1, (n_head, -1))  # (C, H, D)
        for head in range(n_head):
            for position in range(tokens.shape[1]):
                value_D = values[head * len(values) // n_head, position]
                added_C = kept.last.weights_LBHS[layer, 0, head, position] * (
                    output[:, head] @ value_D
                )
                post_norm = block.attention_post_norm
                if not isinstance(post_norm, torch.nn.Identity):
                    size = branches[layer].square().mean() + model.config.norm_eps
                    added_C = added_C * post_norm.gain / size.sqrt()
                if isinstance(norm, torch.nn.LayerNorm):
                    added_C = added_C - added_C.mean()
                brought[layer, head, position] = (added_C * gain_C / rms) @ w_C
    return brought


def unembedding(model: GPT) -> Tensor:
    layer = model.embedding if model.unembedding is None else model.unembedding
    return layer.weight


@pytest.mark.parametrize("against", [None, 11])
@pytest.mark.parametrize("layout", [*LAYOUTS, *FAMILIES])
@torch.no_grad()
def test_rows_equal_a_loop_over_heads_and_positions(layout: str, against: int | None) -> None:
    model, tokens = any_model(layout), random_tokens(1, 13)
    w_C = unembedding(model)[5] - (0 if against is None else unembedding(model)[against])
    measured = logit_of(model, tokens, 5, against)
    expected = plain_loop(model, tokens, w_C)
    torch.testing.assert_close(measured.rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [*LAYOUTS, *FAMILIES])
@torch.no_grad()
def test_rows_and_parts_sum_to_the_logit_of_the_token(model: str) -> None:
    network, tokens = any_model(model), random_tokens(1, 13)
    logits = network(tokens, logits_to_keep=1)[0, -1]
    for target, against in ((5, None), (60, None), (5, 11)):
        measured = logit_of(network, tokens, target, against)
        expected = logits[target] - (0 if against is None else logits[against])
        total = measured.rows.sum() + sum(measured.parts.values())
        torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(measured.whole, expected, rtol=0, atol=1e-4)
        assert (
            abs(float(measured.parts["rounding"])) < 1e-4
        )  # no contribution is hidden in rounding


@torch.no_grad()
def test_a_softcapped_logit_is_attributed_before_its_cap() -> None:
    model, tokens = any_model("gemma2-softcap"), random_tokens(1, 9)
    whole = logit_of(model, tokens, 5).whole
    assert whole is not None
    capped = 3 * (whole / 3).tanh()
    torch.testing.assert_close(capped, model(tokens)[0, -1, 5], rtol=0, atol=1e-4)


@pytest.mark.parametrize("layout", [*LAYOUTS, *FAMILIES])
@torch.no_grad()
def test_attribution_in_decode_steps_equals_a_full_forward(layout: str) -> None:
    model, tokens = any_model(layout), random_tokens(1, 12)
    recorder = MeasureRecorder(model, measures=("logit",))
    decoder = Decoder(model, tokens[0, :8].tolist(), recorder)
    for length in range(9, 13):
        decoder.logits([int(tokens[0, length - 1])])
        measured = last_logit(recorder, tokens[0, :length].tolist(), 5)
        expected = logit_of(model, tokens[:, :length], 5)
        torch.testing.assert_close(measured.rows, expected.rows, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(measured.whole, expected.whole, rtol=0, atol=1e-4)


@torch.no_grad()
def test_int8_weights_are_attributed_with_their_dequantized_values() -> None:
    for layout in ("gpt2-tied", "llama"):
        model, tokens = small_model(layout), random_tokens(1, 9)
        model = in_int8(model)
        measured = logit_of(model, tokens, 5)
        torch.testing.assert_close(measured.whole, model(tokens)[0, -1, 5], rtol=0, atol=1e-3)
        assert abs(float(measured.parts["rounding"])) < 1e-3


@pytest.mark.integration
def test_the_source_of_a_copied_token_has_the_largest_attribution() -> None:
    model = copying_model()
    generator = torch.Generator().manual_seed(5)
    n_repeated, n_found = CONTEXT // 2, 0
    for tokens in doubled(8, n_repeated, generator):
        recorder = MeasureRecorder(model, measures=("logit",))
        for end in (n_repeated + 4, n_repeated + 8):
            cache = KVCache(model.config)
            with torch.no_grad():
                model(tokens[None, :end], cache, recorder)
                measured = last_logit(recorder, tokens[:end].tolist(), int(tokens[end]))
            # An induction head copies from the token's first occurrence.
            n_found += int(measured.rows.sum(dim=(0, 1)).argmax()) == end - n_repeated
    assert n_found == 16


@pytest.mark.parametrize("model", ["gpt2", "llama-grouped", "olmo2"])
@torch.no_grad()
def test_the_logit_effect_of_a_head_is_the_mean_of_its_rows_over_the_copy(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roles, "_N_TOKENS", 24)
    network = any_model(model)
    sequences = roles.repeated_sequences(network, seed=3)
    effects = [
        logit_of(network, tokens[None, :end], int(tokens[end])).rows.sum(dim=2)
        for tokens in sequences
        for end in range(len(tokens) // 2 + 1, len(tokens))
    ]
    found = roles.head_logits(network, seed=3)
    expected = torch.stack(effects).mean(dim=0)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_heads_that_are_not_selected_are_a_separate_part_of_the_total() -> None:
    every, one = small_trace(measure="logit"), small_trace(measure="logit", heads="1.2")
    for a, b in zip(every.steps, one.steps, strict=True):
        assert "other_heads" not in a.row.parts
        assert b.row.parts["other_heads"] == pytest.approx(a.row.total - b.row.total, abs=1e-5)
        for row in (a.row, b.row):
            assert row.whole == pytest.approx(row.total + sum(row.parts.values()), abs=1e-4)
            assert row.total == pytest.approx(float(row.weights_S.sum()), abs=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("layout", ["llama", "llama-grouped"])
@torch.no_grad()
def test_attribution_equals_one_from_hidden_states_of_transformers(
    layout: str, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = small_model(layout), random_tokens(1, 13)
    write_model(tmp_path, model, None)
    other = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.float32
    ).eval()
    kept: dict[str, list[Tensor]] = {"v_proj": [], "mlp": [], "norm": []}
    for layer in other.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda _, x, y: kept["v_proj"].append(y[0]))
        layer.mlp.register_forward_hook(lambda _, x, y: kept["mlp"].append(y[0, -1]))
    other.model.norm.register_forward_pre_hook(lambda _, x: kept["norm"].append(x[0][0, -1]))
    out = other(tokens, output_attentions=True, output_hidden_states=True)
    [x_C] = kept["norm"]
    rms = (x_C.square().mean() + other.config.rms_norm_eps).sqrt()
    u_C = other.lm_head.weight[5] * other.model.norm.weight / rms
    n_head, d_head = other.config.num_attention_heads, model.config.d_head
    rows = []
    for layer, weights_HTS, v_SX in zip(
        other.model.layers, [a[0] for a in out.attentions], kept["v_proj"], strict=True
    ):
        values_HSD = v_SX.unflatten(1, (-1, d_head)).transpose(0, 1)
        values_HSD = values_HSD.repeat_interleave(n_head // len(values_HSD), dim=0)
        output_HCD = layer.self_attn.o_proj.weight.unflatten(1, (n_head, d_head)).transpose(0, 1)
        rows.append(weights_HTS[:, -1] * (values_HSD @ output_HCD.mT @ u_C))
    measured = logit_of(model, tokens, 5)
    torch.testing.assert_close(measured.rows, torch.stack(rows), rtol=1e-4, atol=1e-5)
    embedding, mlp = out.hidden_states[0][0, -1] @ u_C, sum(kept["mlp"]) @ u_C
    torch.testing.assert_close(measured.parts["embedding"], embedding, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.parts["mlp"], mlp, rtol=1e-4, atol=1e-5)
    assert measured.whole == pytest.approx(out.logits[0, -1, 5].item(), abs=1e-4)


def test_the_alternative_is_the_first_token_of_its_text() -> None:
    alone, several = (small_trace(measure="logit", against=text) for text in ("b", "be"))
    assert alone.header.against is not None
    assert several.header.against is not None
    assert (alone.header.against.n_tokens, several.header.against.n_tokens) == (1, 2)
    assert several.header.against.data == b"b"
    for a, b in zip(alone.steps, several.steps, strict=True):
        assert a.row.whole == b.row.whole


def test_a_contrast_in_python_is_the_difference_of_two_logits() -> None:
    model, tokenizer, prompt = small_model("llama", vocab_size=257), BytesTokenizer(), "to be"
    trace = minigpt.trace(
        model, prompt, tokenizer=tokenizer, seed=1, max_new_tokens=5, measure="logit", against="x"
    )
    assert trace.header.against.data == b"x"
    ids = torch.tensor([[token.id for token in trace.tokens]])
    logits_TV = model(ids)[0]
    for step in trace.steps:
        logits_V = logits_TV[step.token.position - 1]
        whole = (logits_V[step.token.id] - logits_V[ord("x")]).item()
        assert step.row.whole == pytest.approx(whole, abs=1e-4)
        assert step.row.total + sum(step.row.parts.values()) == pytest.approx(whole, abs=1e-4)


class Spaced:
    """A tokenizer that adds a space before the start of a text, like SentencePiece."""

    def encode(self, text: str, *, is_start: bool = True, special: bool = False) -> list[int]:
        """Return bytes, or 3 for a special token."""
        if special and text == "<|x|>":
            return [3]
        return list(((" " if is_start else "") + text).encode())

    def unencodable(self, text: str) -> set[str]:
        """Return the characters that are not ASCII."""
        return {c for c in text if not c.isascii()}

    def token_bytes(self, token: int) -> bytes:
        """Return the byte of a token."""
        return bytes([token])


def test_an_alternative_continues_a_text_and_may_be_a_special_token() -> None:
    def first(text: str, *, special: bool = False) -> int:
        return find_alternative(Spaced(), text, special=special).id  # type: ignore[arg-type]

    assert first("king") == ord("k")
    assert first(" king") == ord(" ")
    assert first("<|x|>") == ord("<")
    assert first("<|x|>", special=True) == 3
    with pytest.raises(ConfigError, match="no token for '…' in the text of --against, 'k…'"):
        first("k…")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"measure": "weight", "against": "x"}, "--against compares .* logit"),
        ({"measure": "both", "against": "x"}, "--against compares"),
        ({"measure": "logit", "against": ""}, "--against needs a token"),
        ({"measure": "logit", "reduce": "max"}, "--reduce max does not apply"),
        ({"measure": "logit", "reduce": "rollout"}, "--reduce rollout requires"),
        ({"measure": "gradient", "heads": "0.1"}, "--heads has no effect on --measure gradient"),
        ({"measure": "integrated", "layers": "0"}, "--layers has no effect"),
    ],
    ids=str,
)
def test_options_that_do_not_apply_to_a_measure_are_refused(
    config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small_trace(**config)


def test_models_without_linear_logits_are_refused_by_name() -> None:
    shape: dict[str, Any] = {"vocab_size": 61, "context_length": 24, "n_layer": 1, "n_head": 1}
    lstm = LSTM(ModelConfig(arch="lstm-attention", d_model=8, **shape)).eval()
    with pytest.raises(ConfigError, match=r"\(LSTM\).*no residual stream"):
        MeasureRecorder(lstm, measures=("logit",))

    class Scaled(GPT):
        def logits(self, x: Tensor, logits_to_keep: int) -> Tensor:
            return 2 * super().logits(x, logits_to_keep)

    with pytest.raises(ConfigError, match=r"\(Scaled\).*overrides how logits are computed"):
        MeasureRecorder(Scaled(small_model().config), measures=("logit",))


@pytest.mark.parametrize("name", ["final_norm", "unembedding"])
def test_a_hook_between_the_residual_stream_and_the_logits_is_refused(name: str) -> None:
    model = small_model("llama", vocab_size=257, tie_embeddings=False)
    options: Any = {"tokenizer": BytesTokenizer(), "seed": 1, "max_new_tokens": 1}
    with (
        getattr(model, name).register_forward_hook(lambda *call: call[2] * 2),
        pytest.raises(ConfigError, match=f"the forward hooks of its {name} may change the logits"),
    ):
        minigpt.trace(model, "to", measure="logit", **options)
    assert minigpt.trace(model, "to", measure="logit", **options).steps


@pytest.mark.integration
def test_sampling_does_not_depend_on_the_measure() -> None:
    plain = small_trace()
    for measure in ("logit", "gradient", "integrated"):
        watched = small_trace(measure=measure, has_heads=True)
        assert [(s.token, s.log_probability) for s in watched.steps] == [
            (s.token, s.log_probability) for s in plain.steps
        ]
