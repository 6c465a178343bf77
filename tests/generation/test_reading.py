"""Weights prepared while loading have the same values and no second copy."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.checkpoint.model_folder import write_model
from minigpt.generation import loading
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import products
from minigpt.generation.fast.quantize import WeightOnlyLinear
from minigpt.generation.loading import load
from minigpt.model.gpt import GPT

OPTIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "float32-tables": {},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16-weights": {"dtype": "bfloat16"},
    "int8": {"quantize": "int8"},
}


@pytest.fixture(params=OPTIONS)
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    is_fast = request.param == "bfloat16"
    monkeypatch.setattr(products, "has_slow_matvec", lambda _: request.param == "float32-tables")
    for module in (loading, products):
        monkeypatch.setattr(module, "has_fast_bfloat16", lambda _: is_fast)
    return OPTIONS[request.param]


def outputs_of(model: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
    decoder = Decoder(model, tokens[0, :6].tolist(), compile=False)
    return [decoder.prompt_logits, *(decoder.logits([int(t)]).clone() for t in tokens[0, 6:])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_laid_out_while_they_are_read_give_the_same_bits(
    layout: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, small_model(layout), None)
    plain = load(tmp_path, device="cpu", **options).model
    read = load(tmp_path, device="cpu", for_decoding=True, **options).model
    assert read.dtype == plain.dtype
    tokens = random_tokens(1, 9)
    expected = outputs_of(plain, tokens)
    monkeypatch.setattr(products.torch.Tensor, "t", None)  # copying a weight again would fail
    monkeypatch.setattr(products, "MatvecTable", None)
    for ours, theirs in zip(outputs_of(read, tokens), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_model_loaded_for_a_compiled_step_keeps_each_weight_contiguous(tmp_path: Path) -> None:
    write_model(tmp_path, small_model("gpt2"), None)
    for options in ({"compile": True}, {"compile": True, "quantize": "int8"}):
        model = load(tmp_path, device="cpu", for_decoding=True, **options).model  # type: ignore[arg-type]
        assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    eager = load(tmp_path, device="cpu", for_decoding=True).model
    kept = [module for module in eager.modules() if isinstance(module, WeightOnlyLinear)]
    assert kept or not all(parameter.is_contiguous() for parameter in eager.parameters())


_PEAK = """
import sys
from pathlib import Path

import torch

import minigpt.generation.fast
from minigpt.generation.decoder import Decoder
from minigpt.generation.loading import load


def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def decoded(folder):
    options = {"dtype": "bfloat16"} if sys.argv[1] == "bfloat16" else {}
    options |= {"quantize": "int8"} if sys.argv[1] == "int8" else {}
    model = load(Path(folder), device="cpu", for_decoding=True, compile=False, **options).model
    Decoder(model, [1, 2, 3], max_new_tokens=4).logits([4])


torch.set_num_threads(1)
decoded(sys.argv[2])
before = status("VmRSS")
decoded(sys.argv[3])
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's peak memory")
@pytest.mark.parametrize(("kind", "n_bytes"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
@pytest.mark.parametrize("layout", ["gpt2-tied", "llama"])
def test_peak_memory_of_loading_is_bounded_by_the_weights_and_one_tensor(
    layout: str, kind: str, n_bytes: int, tmp_path: Path
) -> None:
    shape = {"d_model": 512, "d_head": 64, "n_head": 8, "vocab_size": 8192, "n_layer": 8}
    shape |= {"n_kv_head": 8, "d_mlp": 2048}
    large = small_model(layout, **shape)
    assert isinstance(large, GPT)
    n_weights = sum(parameter.numel() for parameter in large.parameters())
    write_model(tmp_path / "large", large, None)
    write_model(tmp_path / "small", small_model(layout), None)
    words = [kind, str(tmp_path / "small"), str(tmp_path / "large")]
    peak = subprocess.check_output([sys.executable, "-c", _PEAK, *words], text=True)
    largest = 4 * max(
        parameter.numel() for parameter in large.parameters()
    )  # in the file's float32
    room = 16e6  # for the allocator and buffers of the libraries
    assert int(peak) < 1.25 * n_bytes * n_weights + largest + room
    if n_bytes > 1:
        assert int(peak) < 2 * n_bytes * n_weights  # no second copy, even with this allowance


_IMPORTS = """
import sys
from pathlib import Path

from minigpt.generation.decoder import Decoder
from minigpt.generation.loading import load

for options in ({}, {"dtype": "bfloat16"}, {"quantize": "int8"}):
    for folder in sys.argv[1:]:
        model = load(Path(folder), device="cpu", for_decoding=True, **options).model
        Decoder(model, [1, 2, 3], max_new_tokens=4).logits([4])
        found = {"sympy", "torch._dynamo"} & set(sys.modules)
        assert not found, (folder, options, found)
"""


@pytest.mark.integration
def test_loading_and_decoding_a_model_imports_no_compiler(tmp_path: Path) -> None:
    for layout in LAYOUTS:
        write_model(tmp_path / layout, small_model(layout), None)
    folders = [str(tmp_path / layout) for layout in LAYOUTS]
    environment = os.environ | {"MINIGPT_CACHE_DIR": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", _IMPORTS, *folders], env=environment, check=True)


_FAULTS = """
import resource
import sys
from pathlib import Path

import torch

from minigpt.generation.loading import load

load(Path(sys.argv[1]), device="cpu", quantize="int8", for_decoding=True)
torch.ones(2**21)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**21)
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize())
"""


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_temporary_tensors_reuse_memory_after_a_model_is_loaded(tmp_path: Path) -> None:
    write_model(tmp_path, small_model("gpt2"), None)
    faulted = subprocess.check_output([sys.executable, "-c", _FAULTS, str(tmp_path)], text=True)
    assert int(faulted) < 2**25  # ten tensors of 2**23 bytes if each is returned at once
