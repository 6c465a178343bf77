"""Inspection of model folders without reading weights, compared with published numbers."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import torch
from layout_models import OTHER_FAMILIES
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minigpt.checkpoint import stored_tensors
from minigpt.checkpoint.families import model_class, model_config_from_hf
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import write_model
from minigpt.checkpoint.tools.inspection import check, describe
from minigpt.errors import CheckpointError
from minigpt.model.gpt import GPT

LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
BLOCK = {
    "input_layernorm": [4096],
    "self_attn.q_proj": [4096, 4096],
    "self_attn.k_proj": [1024, 4096],
    "self_attn.v_proj": [1024, 4096],
    "self_attn.o_proj": [4096, 4096],
    "post_attention_layernorm": [4096],
    "mlp.gate_proj": [14336, 4096],
    "mlp.up_proj": [14336, 4096],
    "mlp.down_proj": [4096, 14336],
}


def write_sparse_8b(folder: Path) -> None:
    """Write the headers of Llama 3 8B and a sparse file for its 16 GB of weights."""
    blocks = {
        f"model.layers.{i}.{name}.weight": shape for i in range(32) for name, shape in BLOCK.items()
    }
    shapes: dict[str, list[int]] = {
        "model.embed_tokens.weight": [128256, 4096],
        **blocks,
        "model.norm.weight": [4096],
        "lm_head.weight": [128256, 4096],
    }
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape[0] * (shape[1] if shape[1:] else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(data).to_bytes(8, "little") + data)
        file.truncate(8 + len(data) + end)
    (folder / "config.json").write_text(json.dumps(LLAMA_8B))


class Headers:
    """A safetensors file that provides only names, shapes and dtypes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file = safe_open(*args, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def keys(self) -> list[str]:
        return self._file.keys()

    def get_slice(self, name: str) -> SimpleNamespace:
        tensor = self._file.get_slice(name)
        return SimpleNamespace(get_shape=tensor.get_shape, get_dtype=tensor.get_dtype)


def test_a_model_larger_than_memory_is_described_from_its_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """meta-llama/Meta-Llama-3-8B: 8,030,261,248 parameters, 128 KiB of cache per token in BF16."""
    write_sparse_8b(tmp_path)
    monkeypatch.setattr(stored_tensors, "safe_open", Headers)
    facts = describe(tmp_path)
    assert facts.n_parameters == 8_030_261_248
    assert facts.n_bytes == 2 * 8_030_261_248
    assert facts.bfloat16_cache_bytes_per_token == 128 * 1024
    assert len(facts.tensors) == 32 * 9 + 3
    assert facts.training_flops_per_token == 3 * facts.forward_flops_per_token
    # Two FLOPs per multiplied weight, and four per layer, width and half the context.
    n_multiplied = 8_030_261_248 - 128256 * 4096
    assert facts.forward_flops_per_token == 2 * n_multiplied + 4 * 32 * 4096 * 8192 // 2
    assert os.stat(tmp_path / "model.safetensors").st_blocks * 512 < 2**20, (
        "a sparse file must not use disk space"
    )


def test_tensors_are_listed_in_the_order_of_the_model(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model, None)
    facts = describe(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.name: t.shape for t in facts.tensors} == {n: (*t.shape,) for n, t in stored.items()}
    assert {t.name: t.n_bytes for t in facts.tensors} == {n: t.nbytes for n, t in stored.items()}
    assert facts.n_parameters == sum(p.numel() for p in model.parameters())
    names = [t.name for t in facts.tensors]
    assert names[0] in ("transformer.wte.weight", "model.embed_tokens.weight")
    is_tied = model.config.tie_embeddings
    assert ("lm_head.weight" in names) != is_tied
    assert is_tied or names[-1] == "lm_head.weight"


def test_the_output_projection_is_listed_last_whatever_its_name(tmp_path: Path) -> None:
    config = model_config_from_hf(OTHER_FAMILIES["gpt_neox"] | {"vocab_size": 257})
    write_model(tmp_path, model_class(config)(config), None)
    names = [tensor.name for tensor in describe(tmp_path).tensors]
    assert (names[0], names[-1]) == ("gpt_neox.embed_in.weight", "embed_out.weight")


def test_a_changed_byte_is_detected_only_with_a_manifest(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    with run.lock(), run.writing_step(1) as folder:
        write_model(folder, make(50, "qwen3"), None)
    folder = run.step_folder(1)
    assert check(folder, is_step=True).problem is None
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    verdict = check(folder, is_step=True)
    assert verdict.has_manifest
    assert str(verdict.problem).startswith("'model.safetensors' has changed")
    assert check(folder, is_step=False) == verdict
    (folder / "manifest.json").unlink()
    verdict = check(folder, is_step=False)
    assert (verdict.has_manifest, verdict.problem) == (False, None)
    assert "manifest.json is missing" in str(check(folder, is_step=True).problem)


def test_headers_that_do_not_fit_the_config_are_refused(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(50, "llama-tied"), None)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = torch.zeros(17)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' has shape \[17\]"):
        describe(tmp_path)
    assert "has shape [17], not [16]" in str(check(tmp_path, is_step=False).problem)


def test_an_unreadable_folder_is_reported_as_a_problem(
    make: Callable[[int, str], GPT], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    run = RunFolder(tmp_path / "run")
    with run.lock(), run.writing_step(1) as folder:
        write_model(folder, make(50, "qwen3"), None)
    monkeypatch.setattr("minigpt.checkpoint.manifest.sha256", fail)
    assert "The disk may be failing" in str(check(run.step_folder(1), is_step=True).problem)
    shutil.rmtree(run.step_folder(1))
    assert "manifest.json is missing" in str(check(run.step_folder(1), is_step=True).problem)
