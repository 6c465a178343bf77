"""Every fast decode step gives the results of the plain float32 GPT.forward."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kept_attention import KeptAttention
from laid_out import in_bfloat16, in_int8
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor, nn

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import products, supports
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.reading import prepare_for_decoding
from minigpt.generation.forward import PlainForward, make_forward
from minigpt.model.gpt import GPT

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in LAYOUTS} | {
    "qwen2": ("llama", {"attention_bias": "qkv", "n_kv_head": 2}),
    "llama-biased": ("llama", {"attention_bias": "all", "mlp_bias": True, "d_head": 6}),
    **{name: ("llama-grouped", {"attention": name}) for name in ("general", "concat")},
    **{name: ("gpt2", {"attention": name}) for name in ("dot", "additive")},
    "qwen3-biased": ("qwen3", {"attention_bias": "all", "n_kv_head": 4, "tie_embeddings": True}),
}
KINDS = ["float32", "bfloat16", "widened-bfloat16", "int8", "int8-bfloat16"]
# Relative error of the logits, as a norm over the vocabulary. float32 sums in another order;
# bfloat16 rounds each activation to 1 part in 256, some tens of times; widened weights round only
# the inputs and outputs of a table.
TOLERANCE = {
    "float32": 2e-5,
    "bfloat16": 0.06,
    "widened-bfloat16": 0.03,
    "int8": 2e-5,
    "int8-bfloat16": 0.06,
}
CHUNKS = [5, 1, 1, 1, 4, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]


def pair(kind: str, shape: str = "qwen3") -> tuple[GPT, GPT]:
    """Return a model, and a float32 model that has its weights after rounding."""
    layout, changes = SHAPES[shape]
    model = small_model(layout, **changes)
    if "bfloat16" in kind:
        model = model.to(torch.bfloat16)
    plain = copy.deepcopy(model).float()
    if "widened" in kind:
        model = in_bfloat16(model)
    if "int8" in kind:
        model = in_int8(model)
        copy_rounded_weights(model, plain)
    return model, plain


@torch.no_grad()
def copy_rounded_weights(model: GPT, plain: GPT) -> None:
    modules = dict(model.named_modules())
    for name, module in plain.named_modules():
        if isinstance(module, nn.Linear) or name == "embedding":
            rounded: Any = modules[name]
            module.weight.copy_(rounded.weight.float() * rounded.scale.float()[:, None])


def assert_near(logits: Tensor, expected: Tensor, kind: str) -> None:
    assert logits.dtype == torch.float32
    assert logits.shape == expected.shape
    off = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert off.max() < TOLERANCE[kind]


@torch.no_grad()
def plain_logits(model: GPT, tokens: Tensor) -> Tensor:
    return model(tokens)[:, -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_eager_logits_equal_a_plain_float32_forward_at_every_position(
    shape: str, kind: str
) -> None:
    model, plain = pair(kind, shape)
    tokens = random_tokens(1, 24)
    fused = make_forward(model, capacity=24)
    assert isinstance(fused, EagerForward)
    for part in tokens.split(CHUNKS, dim=1):
        logits = fused.feed(part)
        assert_near(logits, plain_logits(plain, tokens[:, : fused.cache.length]), kind)


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_weight_tables_give_the_same_logits_on_cpus_with_a_slow_mkl(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_slow_matvec", lambda device: True)
    monkeypatch.setattr(products, "MatrixProduct", None)  # a matmul would fail
    model, plain = pair("float32", shape)
    tokens = random_tokens(1, 8)
    fused = EagerForward(model, capacity=24)
    for part in tokens.split([3, 1, 1, 1, 1, 1], dim=1):
        logits = fused.feed(part)
        assert_near(logits, plain_logits(plain, tokens[:, : fused.cache.length]), "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "llama-grouped"])
@pytest.mark.parametrize("n_rows", [2, 18])
def test_rows_of_a_batch_equal_single_rows(n_rows: int, shape: str, kind: str) -> None:
    model, plain = pair(kind, shape)
    fused = EagerForward(model, capacity=24)
    rows = random_tokens(1, 5).expand(n_rows, -1)

    def feed(n_new: int) -> None:
        nonlocal rows
        new = random_tokens(len(rows), n_new, seed=rows.shape[1])
        rows = torch.cat((rows, new), dim=1)
        assert_near(fused.feed(new), plain_logits(plain, rows), kind)

    fused.feed(rows[:1])
    fused.keep([0] * n_rows)
    for n_new in (1, 1, 3, 1):
        feed(n_new)
    kept = [n_rows - 1, 0]
    fused.keep(kept)
    rows = rows[kept]
    feed(1)
    fused.cache.truncate(6)
    rows = rows[:, :6]
    feed(1)
    feed(1)
    fused.keep([1])
    rows = rows[[1]]
    feed(1)
    fused.cache.truncate(0)
    rows = rows[:, :0]
    feed(1)
    feed(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_recording_in_the_fast_step_equals_recording_in_plain_forward(
    shape: str, kind: str
) -> None:
    model, plain = pair(kind, shape)
    tokens = random_tokens(1, 12)
    recorder, expected = KeptAttention(), KeptAttention()
    watched = EagerForward(model, capacity=12, recorder=recorder)
    alone = EagerForward(model, capacity=12)
    reference = PlainForward(plain, capacity=12, recorder=expected)
    for part in tokens.split([7, 1, 1, 1, 1, 1], dim=1):
        assert torch.equal(watched.feed(part), alone.feed(part))
        reference.feed(part)
    assert len(recorder.passes) == len(expected.passes) == 6
    for shown, wanted in zip(recorder.passes, expected.passes, strict=True):
        for name in ("weights_LBHS", "context_LBHD", "values_LBGSD"):
            ours, theirs = getattr(shown, name), getattr(wanted, name)
            assert ours.shape == theirs.shape
            assert (ours.float() - theirs).norm() < TOLERANCE[kind] * theirs.norm()


def storage_bytes(model: GPT) -> int:
    """Return the bytes of all parameter storage_bytes, each counted once."""
    kept = {
        p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()
    }
    return sum(kept.values())


@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2"])
def test_laying_out_weights_for_decoding_keeps_one_copy_of_each_weight_and_its_values(
    shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_slow_matvec", lambda device: False)
    model, plain = pair("float32", shape)
    before, values = storage_bytes(model), copy.deepcopy(model.state_dict())
    model = prepare_for_decoding(model)
    assert storage_bytes(model) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name])
    for block in model.blocks:
        attention = block.attention
        product = products.make_product([attention.query, attention.key, attention.value])
        assert product.weight_IO.data_ptr() == attention.query.weight.data_ptr()
    tokens = random_tokens(2, 9)
    torch.testing.assert_close(plain_logits(model, tokens), plain_logits(plain, tokens))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_model_laid_out_for_decoding_is_not_repacked_and_keeps_no_second_copy(
    shape: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "has_slow_matvec", lambda device: True)
    if not products.max_table_rows(dtype):
        pytest.skip("needs a CPU with kernels for weight tables")
    layout, changes = SHAPES[shape]
    model = small_model(layout, **changes).to(dtype)
    plain, tokens = copy.deepcopy(model), random_tokens(1, 9)
    model = prepare_for_decoding(model)
    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    monkeypatch.setattr(products, "MatvecTable", None)  # packing again would fail
    fused = EagerForward(model, capacity=24)
    for part in tokens.split([6, 1, 1, 1], dim=1):
        expected = plain_logits(plain.float(), tokens[:, : fused.cache.length + part.shape[1]])
        kind = "float32" if dtype == torch.float32 else "bfloat16"
        assert_near(fused.feed(part), expected, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_constructor_does_not_change_the_weights_layout(kind: str) -> None:
    model, _ = pair(kind, "llama")

    def storage_layout() -> list[tuple[str, int, tuple[int, ...]]]:
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return [(name, t.data_ptr(), t.stride()) for name, t in tensors]

    before = storage_layout()
    EagerForward(model, capacity=24)
    assert storage_layout() == before


class Subclass(GPT):
    """A stand-in for a model family with another forward pass."""


def test_only_gpt_itself_is_supported() -> None:
    model = small_model()
    assert supports(model)
    assert supports(model, compile=True)
    assert not supports(small_model(attention="dot"), compile=True)
    other = Subclass(model.config).eval()
    assert not supports(other)
    assert not supports(other, compile=True)
    assert type(make_forward(other, capacity=8)) is PlainForward
    with pytest.raises(ConfigError, match="--no-compile"):
        make_forward(other, capacity=8, compile=True)


class HalfLinear(nn.Linear):
    """A stand-in for an adapter that has a weight, but does not only multiply with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def _replace_mlp(model: GPT) -> None:
    model.blocks[0].mlp = nn.Tanh()


def _replace_linear(model: GPT) -> None:
    old = model.blocks[1].mlp.down
    model.blocks[1].mlp.down = HalfLinear(old.in_features, old.out_features, old.bias is not None)


def _assign_forward(model: GPT) -> None:
    block = model.blocks[0]
    block.forward = lambda *args, own=block.forward: own(*args) * 1.5


def _swap_blocks(model: GPT) -> None:
    model.blocks[0], model.blocks[1] = model.blocks[1], model.blocks[0]


@pytest.mark.parametrize("layout", ["gpt2", "llama"])
@pytest.mark.parametrize("change", [_replace_mlp, _replace_linear, _assign_forward, _swap_blocks])
def test_a_model_with_replaced_modules_decodes_with_its_own_forward(
    layout: str, change: Callable[[GPT], None]
) -> None:
    model = small_model(layout)
    change(model)
    forward, tokens = make_forward(model, capacity=9), random_tokens(1, 9)
    assert type(forward) is PlainForward
    expected = model(tokens)
    logits = [forward.feed(part) for part in tokens.split([4, 1, 1, 1, 1, 1], dim=1)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 3:], rtol=1e-4, atol=1e-5)


def test_a_model_in_training_mode_uses_its_own_forward() -> None:
    assert type(make_forward(small_model().train(), capacity=8)) is PlainForward


def test_a_full_context_and_a_full_cache_raise() -> None:
    model = small_model("llama-grouped")
    fused = EagerForward(model, capacity=6)
    fused.feed(random_tokens(1, 6))
    with pytest.raises(ValueError, match="the cache holds 6 positions; 7 were asked for"):
        fused.feed(random_tokens(1, 1))
    assert fused.cache.length == 6
    fused = EagerForward(model, capacity=30)
    fused.feed(random_tokens(1, 24))
    with pytest.raises(ValueError, match="the model sees 24 positions; 25 were given"):
        fused.feed(random_tokens(1, 1))


GPT2 = {
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 208,
    "tie_word_embeddings": False,
}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 208,
}


@pytest.mark.integration
@pytest.mark.parametrize("settings", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_200_greedy_tokens_equal_transformers(settings: dict[str, Any], tmp_path: Any) -> None:
    from minigpt.checkpoint.model_folder import read_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by its imports
        transformers = pytest.importorskip(
            "transformers", reason="needs transformers as the oracle"
        )
        config = transformers.AutoConfig.for_model(
            **settings, vocab_size=61, bos_token_id=None, eos_token_id=None
        )
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                # Larger biases would make all generated tokens the same.
                std = 0.1 if name.endswith("bias") else 1.0
                parameter.normal_(std=std, generator=generator)
        theirs.save_pretrained(tmp_path)
        prompt = random_tokens(1, 8)
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=200,
            do_sample=False,
            pad_token_id=0,
        )[0, 8:].tolist()
    assert len(set(expected)) > 10  # any model could fall into a loop of a few tokens
    decoder = Decoder(read_model(tmp_path).model, prompt[0].tolist())
    assert isinstance(decoder.forward, EagerForward)
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=200)
    assert [step.token for step in decoder.generate(sampling, seed=0)] == expected
