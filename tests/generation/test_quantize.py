"""Weights in int8 or bfloat16: their values, memory and accuracy, and unsupported models."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from laid_out import in_bfloat16, in_int8
from live_bytes import LiveBytes
from small_models import LAYOUTS, random_tokens, small_model
from torch import nn

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.config import ModelConfig
from minigpt.errors import ConfigError
from minigpt.evaluation import evaluate
from minigpt.generation import api, loading
from minigpt.generation.fast import quantize
from minigpt.generation.fast.quantize import (
    WeightOnlyEmbedding,
    WeightOnlyLinear,
)
from minigpt.generation.fast.reading import prepare_for_decoding
from minigpt.model.gpt import GPT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_int8_weights_are_rounded_to_the_nearest_of_255_steps_per_output(
    layout: str, dtype: torch.dtype
) -> None:
    model = small_model(layout).to(dtype)
    before = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    model = in_int8(model)
    linears = dict(model.named_modules())
    assert not any(
        isinstance(module, (nn.Linear, nn.Embedding)) and name != "positions"
        for name, module in linears.items()
    )
    for name, module in before.items():
        if not isinstance(module, nn.Linear) and name != "embedding":
            continue
        rounded = linears[name]
        assert isinstance(rounded, (WeightOnlyLinear, WeightOnlyEmbedding))
        weight, scale = module.weight.float(), rounded.scale.float()
        assert isinstance(weight, torch.Tensor)
        for output in range(len(weight)):
            largest = max(abs(w) for w in weight[output].tolist())
            assert math.isclose(float(scale[output]), largest / 127, rel_tol=2**-8)
            assert int(rounded.weight[output].abs().max()) == 127
        off = (rounded.weight.float() * scale[:, None] - weight).abs()
        # half a step; slightly more for the largest weight where the scale is bfloat16
        assert (off <= scale[:, None] * (0.501 if dtype == torch.float32 else 1)).all()


@pytest.mark.parametrize("n_outputs", [24, 4096 + 7])  # larger layers are converted in parts
@torch.no_grad()
def test_an_int8_layer_equals_a_linear_layer_with_the_rounded_weight(n_outputs: int) -> None:
    linear = nn.Linear(40, n_outputs)
    weight = torch.randint(-127, 128, (n_outputs, 40), dtype=torch.int8)
    scale = torch.rand(n_outputs) / 100
    layer = WeightOnlyLinear(weight, scale)
    layer.bias = linear.bias
    linear.weight.copy_(weight.float() * scale[:, None])
    x = torch.randn(3, 5, 40)
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_float32_activations_use_the_bfloat16_weights(layout: str) -> None:
    plain = small_model(layout)
    for parameter in plain.parameters():
        parameter.copy_(parameter.bfloat16())
    model = in_bfloat16(plain)
    assert model.dtype == torch.float32
    assert isinstance(model.embedding, WeightOnlyEmbedding)
    assert model.embedding.weight.dtype == torch.bfloat16
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-4, atol=1e-4)


QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "int8": {"quantizes": True},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_moving_quantized_weights_into_tables_keeps_logits_and_weights(
    layout: str, kind: str
) -> None:
    options = {"activations": torch.float32} | QUANTIZATIONS[kind]
    before = prepare_for_decoding(small_model(layout), **options, joins=False)
    model = prepare_for_decoding(small_model(layout), **options)
    tokens = random_tokens(2, 20)
    torch.testing.assert_close(model(tokens), before(tokens), rtol=1e-4, atol=1e-4)
    one = tokens[:, :1]  # short enough to use the tables, which round to their dtype
    tolerance = 1e-4 if kind == "int8" else 0.1
    torch.testing.assert_close(model(one), before(one), rtol=tolerance, atol=tolerance)
    for (name, moved), kept in zip(model.named_modules(), before.modules(), strict=True):
        if isinstance(moved, (WeightOnlyLinear, WeightOnlyEmbedding)):
            assert isinstance(kept, (WeightOnlyLinear, WeightOnlyEmbedding))
            assert torch.equal(moved.weight, kept.weight), name


def n_bytes(model: GPT) -> int:
    """Return the bytes of all tensors of the model, including tables, each storage once."""
    seen: dict[int, int] = {}
    for module in model.modules():
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        table = getattr(module, "table", None)
        if table is not None:
            tensors.append(table._table)
        for tensor in tensors:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(seen.values())


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.25), ("bfloat16", 0.5)])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama"])
def test_quantized_weights_take_a_fraction_of_float32_memory(
    layout: str, kind: str, share: float
) -> None:
    shape = {"d_model": 256, "vocab_size": 512, "context_length": 8}
    plain, options = small_model(layout, **shape), QUANTIZATIONS[kind]
    layers = prepare_for_decoding(plain, **options, joins=False)
    assert n_bytes(layers) < (share + 0.03) * n_bytes(plain)
    tables = prepare_for_decoding(plain, **options)
    assert n_bytes(tables) < (share + 0.07) * n_bytes(plain)  # 8 more bytes per row of int8


@pytest.mark.parametrize("has_instructions", [False, True])
def test_bfloat16_is_weight_only_on_cpus_without_bfloat16_instructions(
    has_instructions: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "has_fast_bfloat16", lambda device: has_instructions)
    write_model(tmp_path, small_model("llama"), None)
    model = api.load(tmp_path, device="cpu", dtype="bfloat16").model
    assert model.dtype == (torch.bfloat16 if has_instructions else torch.float32)
    assert model.embedding.weight.dtype == torch.bfloat16


def test_int8_loses_less_than_half_a_percent_on_a_published_model(shared: Path) -> None:
    loaded = read_model(shared / "weights" / "stories260K")
    assert loaded.tokenizer is not None
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the "
        "park. One day, she saw a big, red ball. She wanted to play with it, but it was too high. "
        "Lily asked her mom to help. Her mom said yes and gave her the ball. Lily was very happy."
    )
    tokens = torch.tensor([loaded.tokenizer.encode_prompt(text)])
    lengths = np.ones(loaded.model.config.vocab_size)
    batches = [(tokens[:, :-1], tokens[:, 1:])]
    before = evaluate(loaded.model, batches, lengths).nats
    after = evaluate(in_int8(loaded.model), batches, lengths).nats
    assert before / tokens.numel() < 1.5  # the model was trained on such stories
    assert after != before
    assert abs(after - before) < 0.005 * before


@pytest.mark.integration
@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("layout", ["gpt2", "llama"])
def test_loading_and_evaluating_in_int8_peaks_below_float32(
    layout: str, ties: bool, tmp_path: Path
) -> None:
    shape = {"vocab_size": 2000, "n_layer": 6, "n_head": 4, "d_model": 64, "context_length": 32}
    model = GPT(ModelConfig(family=layout, tie_embeddings=ties, **shape))
    write_model(tmp_path, model, None)
    batch = random_tokens(1, 33, vocab_size=2000)
    peaks = []
    for choice in (None, "int8"):
        with LiveBytes() as live:
            loaded = loading.load(tmp_path, device="cpu", dtype="float32", quantize=choice).model
            evaluate(loaded, [(batch[:, :-1], batch[:, 1:])], np.ones(2000, np.int64))
        peaks.append(live.peak)
    n_bytes = sum(parameter.nbytes for parameter in model.parameters())
    assert n_bytes < peaks[0] < 2 * n_bytes  # checks that the weights are counted
    assert peaks[1] < peaks[0]


def test_int8_raises_on_devices_without_int8_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPT, "device", torch.device("mps"))
    with pytest.raises(ConfigError, match="int8 is not available on mps"):
        in_int8(small_model())


@pytest.mark.integration
def test_quantizing_a_large_weight_in_parts_gives_the_same_bits() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1000, 12_000).t()  # not contiguous, as GPT-2 stores its weights
    with LiveBytes() as live:
        layer = quantize.to_int8(weight, device=weight.device, dtype=torch.bfloat16)
    rounded = weight.bfloat16().contiguous()
    at_once = quantize.to_int8(rounded, device=weight.device, dtype=torch.bfloat16)
    assert torch.equal(layer.weight, at_once.weight)
    assert layer.scale is not None
    assert at_once.scale is not None
    assert torch.equal(layer.scale, at_once.scale)
    assert torch.equal(layer.scale, (weight.bfloat16().abs().amax(1).float() / 127).bfloat16())
    assert (
        live.peak - weight.nbytes < 2 * layer.weight.nbytes
    )  # no float32 copy of the whole weight
