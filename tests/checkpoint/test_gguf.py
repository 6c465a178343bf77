"""The tensors of a GGUF file, read by gguf.GGUFReader, equal those of the model.

tests/checkpoint/test_llama_cpp.py compares with llama.cpp itself.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import folder_of, read
from layout_models import LAYOUTS, OTHER_FAMILIES
from live_bytes import LiveBytes
from safetensors.torch import load_file

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import write_model
from minigpt.checkpoint.tools.gguf import export_gguf
from minigpt.model.language_model import model_class
from minigpt.text.tokenizer import BytesTokenizer

gguf = pytest.importorskip("gguf", reason="needs the package gguf to read GGUF files")

EXPORTED = {
    "gpt2-tied": LAYOUTS["gpt2-tied"],
    "gpt2-untied": LAYOUTS["gpt2-untied"] | {"activation": "gelu_tanh"},
    **{name: LAYOUTS[name] for name in ("llama-grouped", "llama-biased", "mistral", "qwen2")},
    "qwen3": LAYOUTS["qwen3"],
}

BLOCK = {
    "gpt2": {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    },
    "llama": {
        "input_layernorm": "attn_norm",
        **{f"self_attn.{n}_proj": f"attn_{n}" for n in "qkv"},
        **{f"self_attn.{n}_norm": f"attn_{n}_norm" for n in "qk"},
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{n}_proj": f"ffn_{n}" for n in ("gate", "up", "down")},
    },
}

OUTSIDE = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}

"""Tensor names of Hugging Face -> GGUF, from the GGUF specification."""


def gguf_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if module in OUTSIDE:
        return f"{OUTSIDE[module]}.{suffix}"
    family = "gpt2" if module.startswith("transformer") else "llama"
    _, _, number, rest = module.split(".", 3)
    return f"blk.{number}.{BLOCK[family][rest]}.{suffix}"


def expected_tensor(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Transpose a Conv1D, and interleave query and key channels for the llama architecture."""
    if ".c_" in name and tensor.dim() == 2:
        return tensor.t().contiguous()
    if config["model_type"] in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        width = config["head_dim"]
        order = [
            head * width + half * width // 2 + i
            for head in range(len(tensor) // width)
            for i in range(width // 2)
            for half in range(2)
        ]
        return tensor[order]
    return tensor


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("layout", EXPORTED)
def test_gguf_tensors_equal_the_model_within_the_precision_of_their_type(
    layout: str, type_: str, tmp_path: Path
) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer(), **EXPORTED[layout])
    exported = export_gguf(folder, tmp_path / "m.gguf", type_)
    assert exported.n_bytes == (tmp_path / "m.gguf").stat().st_size
    config = json.loads((folder / "config.json").read_text())
    _, tensors = read(tmp_path / "m.gguf")
    stored = load_file(folder / "model.safetensors")
    assert tensors.keys() - {"rope_freqs.weight"} == set(map(gguf_name, stored))
    for name, tensor in stored.items():
        expected = expected_tensor(name, tensor, config)
        written = tensors[gguf_name(name)]
        assert tuple(written.shape[::-1]) == tuple(expected.shape), name
        is_exact = expected.dim() == 1 or "wpe" in name
        fits = expected.shape[-1] % 32 == 0
        kind = "f32" if is_exact else type_ if fits or type_ != "q8_0" else "f16"
        assert written.tensor_type.name.lower() == kind, name
        values = torch.from_numpy(gguf.dequantize(written.data, written.tensor_type).copy())
        values = values.view_as(expected)
        if kind == "q8_0":
            scale = expected.view(-1, 32).abs().amax(1, keepdim=True) / 127
            error = (values - expected).view(-1, 32).abs()
            assert (error <= scale * 0.51 + 1e-3 * scale * 127).all(), name
        else:
            dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[kind]
            assert torch.equal(values, expected.to(dtype).float()), name


def test_scaled_rope_is_written_as_divisors_of_the_frequencies(tmp_path: Path) -> None:
    scaling = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_theta": 500_000.0}
    scaling |= {"rope_original_context": 64, "rope_high_freq_factor": 4.0}
    folder = folder_of(tmp_path / "model", BytesTokenizer(), d_head=32, **scaling)
    export_gguf(folder, tmp_path / "m.gguf", "f16")
    factors = read(tmp_path / "m.gguf")[1]["rope_freqs.weight"].data
    for i, factor in enumerate(factors):  # as in Llama 3.1's reference implementation
        wavelength = 2 * math.pi * 500_000.0 ** (2 * i / 32)
        if wavelength < 64 / 4.0:
            expected = 1.0
        elif wavelength > 64 / 1.0:
            expected = 8.0
        else:
            smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
            expected = 1 / ((1 - smooth) / 8.0 + smooth)
        assert factor == pytest.approx(expected, rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize("type_", ["f32", "q8_0"])
def test_gguf_export_loads_one_tensor_at_a_time(type_: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer(), n_layer=20, d_mlp=640)
    stored = load_file(folder / "model.safetensors")
    with LiveBytes() as live:
        export_gguf(folder, tmp_path / "m.gguf", type_)
    largest = max(tensor.nbytes for tensor in stored.values())
    assert largest <= live.peak < 4 * largest < sum(t.nbytes for t in stored.values()) / 8


@pytest.mark.parametrize("layout", OTHER_FAMILIES)
def test_every_tensor_of_another_family_has_a_gguf_name(layout: str, tmp_path: Path) -> None:
    """Their logits are compared in tests/checkpoint/test_llama_cpp.py."""
    config = model_config_from_hf(OTHER_FAMILIES[layout] | {"vocab_size": 257})
    model = model_class(config)(config)
    model.init_weights(torch.Generator().manual_seed(7))
    write_model(tmp_path / "model", model.eval(), BytesTokenizer())
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    facts, tensors = read(tmp_path / "m.gguf")
    architecture = facts["general.architecture"]
    stored = load_file(tmp_path / "model" / "model.safetensors")
    extra = {name for name in tensors if name.startswith("rope_f")}
    copies = int(config.tie_embeddings and architecture in ("gptneox", "olmo2"))
    assert len(tensors) - len(extra) - copies == len(stored)
    assert facts[f"{architecture}.context_length"] <= config.context_length
    if architecture.startswith("gemma"):
        norm = torch.from_numpy(tensors["output_norm.weight"].data.copy())
        assert torch.equal(norm, stored["model.norm.weight"] + 1)
    if architecture == "gptneox":
        theirs = stored["gpt_neox.layers.1.attention.query_key_value.weight"]
        value_of_head_2 = theirs[2 * 24 + 16 : 2 * 24 + 24]
        written = torch.from_numpy(tensors["blk.1.attn_qkv.weight"].data.copy())
        assert torch.equal(written[64 + 16 : 64 + 24], value_of_head_2)


def test_large_matrices_are_converted_in_chunks_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(tmp_path / "model", BytesTokenizer())
    export_gguf(folder, tmp_path / "whole.gguf", "q8_0")
    monkeypatch.setattr("minigpt.checkpoint.tools.gguf._VALUES_AT_ONCE", 200)
    quantize, sizes = gguf.quantize, []
    monkeypatch.setattr(gguf, "quantize", lambda r, k: sizes.append(r.size) or quantize(r, k))
    export_gguf(folder, tmp_path / "parts.gguf", "q8_0")
    assert max(sizes) <= 200
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()
