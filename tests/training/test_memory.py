"""The estimated memory of a run, compared with what torch allocates."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import config_of, trainer_of
from torch.profiler import ProfilerActivity, profile

from minigpt.checkpoint.published_models import canonical
from minigpt.errors import ResourceError
from minigpt.text.tokens import PreparedData
from minigpt.training import kernels
from minigpt.training.reports import memory
from minigpt.training.reports.memory import estimate_memory, optimizer_values, require_memory


def allocated(call: Callable[[], Any]) -> tuple[int, int]:
    """Return the peak and the final bytes that torch allocated during a call."""
    gc.collect()  # otherwise garbage of earlier tests could be freed during the call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = call()
    assert profiled.profiler is not None
    recorded = profiled.profiler.kineto_results.events()
    events = [event for event in recorded if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most, now


@pytest.mark.integration
@pytest.mark.parametrize(
    ("layout", "training"),
    [
        ("qwen3", {}),
        ("gpt2", {"optimizer": "adamw", "micro_batch_size": 8}),
        ("llama", {}),
        ("llama", {"recompute": True}),
    ],
)
def test_estimated_memory_is_what_a_run_allocates(
    layout: str, training: dict[str, Any], data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(layout, batch_size=64, max_steps=3, **training)
    config = replace(config, model=replace(config.model, n_layer=4))
    made = []
    _, held = allocated(lambda: made.append(trainer_of(config, data, tmp_path)))
    trainer = made[0]
    _, moments = allocated(trainer.take_step)
    step, _ = allocated(trainer.take_step)
    estimate = estimate_memory(config, len(trainer.val_tokens), torch.float32)
    assert estimate["weights"] == pytest.approx(held, rel=0.02)  # plus rotary tables
    assert estimate["optimizer"] == pytest.approx(moments, rel=0.02)  # plus step counters
    # The formula ignores temporary tensors of the kernels.
    assert estimate["total"] == pytest.approx(held + moments + step, rel=0.1)


@pytest.mark.integration
@pytest.mark.parametrize("layout", ["qwen3", "llama"])
@pytest.mark.parametrize("length", [128, 256])
def test_estimated_memory_counts_the_weights_that_a_bfloat16_kernel_keeps(
    layout: str, length: int, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "has_fast_bfloat16", lambda device: True)
    config = config_of(layout, batch_size=4096 // length, max_steps=3)
    shape = {"n_layer": 4, "d_model": 128, "n_head": 4, "n_kv_head": 2, "context_length": length}
    config = replace(config, model=replace(config.model, **shape))
    made = []
    dtype = torch.bfloat16
    _, held = allocated(lambda: made.append(trainer_of(config, data, tmp_path, dtype=dtype)))
    _, moments = allocated(made[0].take_step)
    step, _ = allocated(made[0].take_step)
    estimate = estimate_memory(config, len(made[0].val_tokens), dtype)
    assert estimate["total"] == pytest.approx(held + moments + step, rel=0.05)


@pytest.mark.integration
@pytest.mark.parametrize("model_type", ["gpt_neox", "gemma2", "olmo2", "phi3"])
def test_estimated_memory_counts_the_saved_tensors_of_other_families(
    model_type: str, data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("llama", batch_size=64, max_steps=3)
    model = replace(config.model, n_layer=4, model_type=model_type, activation="gelu_tanh")
    own = {"attention_bias": "all"} if model_type == "gpt_neox" else {"qk_norm": False}
    model = replace(model, **own | ({"qk_norm": True} if model_type == "olmo2" else {}))
    config = replace(config, model=canonical(model))
    made = []
    _, held = allocated(lambda: made.append(trainer_of(config, data, tmp_path)))
    _, moments = allocated(made[0].take_step)
    step, _ = allocated(made[0].take_step)
    estimate = estimate_memory(config, len(made[0].val_tokens), torch.float32)
    assert estimate["weights"] == pytest.approx(held, rel=0.02)  # plus rotary tables
    assert estimate["total"] == pytest.approx(held + moments + step, rel=0.1)


@pytest.mark.integration
def test_estimated_memory_counts_an_evaluation_larger_than_a_step(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("llama", batch_size=1, eval_tokens=10**6)
    trainer = trainer_of(config, data, tmp_path)
    evaluation, _ = allocated(trainer.checkpoints.evaluate)
    step, _ = allocated(trainer.take_step)
    assert evaluation > step
    estimate = estimate_memory(config, len(trainer.val_tokens), torch.float32)
    held = estimate["weights"] + estimate["optimizer"]
    assert estimate["total"] == pytest.approx(held + evaluation, rel=0.15)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizer_state_has_the_estimated_size(
    optimizer: str, data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("gpt2-tied", optimizer=optimizer)
    config = replace(config, model=replace(config.model, n_layer=3))
    trainer = trainer_of(config, data, tmp_path)
    trainer.take_step()
    moments = [
        tensor
        for o in trainer.optimizers
        for state in o.state.values()
        for key, tensor in state.items()
        if key != "step"
    ]
    assert optimizer_values(config) == sum(tensor.numel() for tensor in moments)


@pytest.mark.parametrize(
    ("model", "training", "remedy"),
    [
        ({"n_layer": 2**12}, {}, "a smaller model"),
        ({"n_layer": 10**3, "d_model": 4096, "d_head": 0, "d_mlp": 0}, {}, "a smaller model"),
        ({}, {"batch_size": 10**6}, "a smaller --batch-size or training.micro_batch_size"),
    ],
)
def test_a_run_that_can_never_fit_is_refused(
    model: dict[str, Any], training: dict[str, Any], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "machine_bytes", lambda device: 10**8)
    config = config_of("llama", **training)
    config = replace(config, model=replace(config.model, **model))
    with pytest.raises(ResourceError, match=remedy):
        require_memory(config, torch.device("cpu"))


def test_a_run_that_fits_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lower bound is slightly below the estimate."""
    config = config_of("llama", batch_size=64)
    needed = estimate_memory(config, 1000, torch.float32)["total"]
    monkeypatch.setattr(memory, "machine_bytes", lambda device: needed)
    require_memory(config, torch.device("cpu"))
    require_memory(config_of("llama", batch_size=256), torch.device("cpu"), n_ranks=4)
    with pytest.raises(ResourceError):
        require_memory(config_of("llama", batch_size=640), torch.device("cpu"))
