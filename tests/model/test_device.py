"""The requested device and dtype, or an error that names the available ones."""

import pytest
import torch

from minigpt.errors import ConfigError
from minigpt.generation.fast.products import has_slow_matvec
from minigpt.model.cost import peak_flops
from minigpt.model.device import autocast, has_fast_bfloat16, resolve_device, resolve_dtype

CPU = torch.device("cpu")


def test_auto_selects_the_fastest_available_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == CPU
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cpu") == CPU


def test_an_unavailable_device_is_an_error_that_names_the_available_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError) as caught:
        resolve_device("cuda")
    assert str(caught.value) == ("device cuda is not available here. Use auto or one of: cpu.")


@pytest.mark.parametrize(
    ("abilities", "is_fast"),
    [({"avx512_bf16": True}, True), ({"bf16": True}, True), ({"avx2": True}, False), ({}, False)],
)
def test_auto_selects_bfloat16_on_a_cpu_with_bfloat16_instructions(
    monkeypatch: pytest.MonkeyPatch, abilities: dict[str, bool], is_fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities)
    assert has_fast_bfloat16(CPU) == is_fast
    assert resolve_dtype("auto", CPU) == (torch.bfloat16 if is_fast else torch.float32)
    assert resolve_dtype("bfloat16", CPU) == torch.bfloat16
    assert resolve_dtype("float32", CPU) == torch.float32


def test_autocast_computes_products_in_the_requested_dtype() -> None:
    x = torch.ones(2, 2)
    with autocast(CPU, torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with autocast(CPU, torch.float32):
        assert (x @ x).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_flops_are_those_of_the_datasheet_or_unknown(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda"), torch.bfloat16) == peak
    assert peak_flops(torch.device("cuda"), torch.float32) is None
    assert peak_flops(CPU, torch.bfloat16) is None


@pytest.mark.parametrize(
    ("name", "has_mkl", "is_slow"),
    [
        ("AMD EPYC 9R14 96-Core Processor", True, True),
        ("AMD EPYC 9R14 96-Core Processor", False, False),
        ("Intel Xeon 2.50GHz", True, False),
    ],
)
def test_matvec_is_considered_slow_on_cpus_not_made_by_intel(
    name: str, has_mkl: bool, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: has_mkl)
    assert has_slow_matvec(CPU) == is_slow
    assert not has_slow_matvec(torch.device("cuda"))
