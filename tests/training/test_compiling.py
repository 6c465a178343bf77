"""Compiled training: when it is the default, that results do not change, and failures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import bits, config_of, differing, run_until, trainer_of
from torch import nn

from minigpt.commands.train.explanations import opening
from minigpt.config import ModelConfig
from minigpt.errors import ConfigError, MinigptWarning
from minigpt.text.tokens import PreparedData
from minigpt.training import compiling, fused
from minigpt.training.trainer import Trainer, TrainingLoss
from minigpt.training.world import World

CPU = torch.device("cpu")
N_PARAMETERS = 1_000_000
LONG = 60_000
"""Steps estimated to take 11 minutes on two threads with N_PARAMETERS and 96 tokens per step."""


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"max_steps": 2 * LONG}, True),
        ({"max_steps": LONG}, False),
        ({"max_steps": 0, "max_minutes": 10.0}, True),
        ({"max_steps": 0, "max_minutes": 9.0}, False),
        ({"max_steps": 2 * LONG * 50, "max_minutes": 9.0}, False),
        ({"max_steps": 10, "max_minutes": 60.0}, False),
        ({"max_steps": 10, "compile": True}, True),
        ({"max_steps": 2 * LONG * 50, "compile": False}, False),
    ],
)
def test_cpu_runs_of_over_ten_minutes_are_compiled_by_default(
    budget: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert compiling.is_compiled(config_of(**budget), 5 * N_PARAMETERS // 10, CPU) is expected
    # Twice the parameters on twice the threads take the same time.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert compiling.is_compiled(config_of(**budget), N_PARAMETERS, CPU) is expected


def test_other_devices_several_processes_and_lstms_are_not_compiled_by_default() -> None:
    config = config_of(max_steps=0, max_minutes=60.0)
    assert compiling.is_compiled(config, N_PARAMETERS, CPU)
    assert not compiling.is_compiled(config, N_PARAMETERS, torch.device("cuda"))
    assert not compiling.is_compiled(config, N_PARAMETERS, torch.device("mps"))
    assert not compiling.is_compiled(config, N_PARAMETERS, CPU, n_ranks=2)
    lstm = ModelConfig(
        arch="lstm-attention", vocab_size=257, context_length=16, n_layer=2, n_head=1, d_model=32
    )
    assert not compiling.is_compiled(replace(config, model=lstm), N_PARAMETERS, CPU)


@pytest.mark.integration
def test_default_compilation_is_announced_before_the_first_step(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(max_steps=0, max_minutes=60.0)
    for choice, expected in ((None, [compiling.NOTE]), (True, []), (False, [])):
        chosen = replace(config, training=replace(config.training, compile=choice))
        facts = opening(trainer_of(chosen, data, tmp_path / str(choice)))
        assert [fact for _, fact in facts if "compile" in fact] == expected


def run_of(data: PreparedData, folder: Path, **changes: Any) -> Trainer:
    """Return a run with two context lengths, two micro-batches and dropout."""
    settings = {"max_steps": 6, "micro_batch_size": 3, "context_warmup_length": 8} | changes
    trainer = trainer_of(config_of(dropout=0.2, **settings), data, folder)
    list(trainer.run())
    return trainer


@pytest.fixture
def compile_options(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace compilation by tracing; return the list of compilation options."""
    compile_, seen = torch.compile, []

    def traced(function: Any, **options: Any) -> Any:
        seen.append(options)
        return compile_(function, backend="eager", **options)

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", traced)
    return seen


@pytest.mark.integration
def test_compiling_changes_no_gradient_and_no_dropout_mask(
    compile_options: list[Any], data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fused, "fused_loss", lambda *run: None
    )  # use the modules, as compiled runs do
    straight = run_of(data, tmp_path / "eager", compile=False)
    assert compile_options == []
    compiled = run_of(data, tmp_path / "compiled", compile=True)
    assert compile_options == [
        {"dynamic": False}
    ]  # kernels must not depend on earlier compile_options
    assert differing(bits(compiled), bits(straight)) == []


def test_gradient_averaging_is_compiled_together_with_the_loss(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrappers: list[nn.Module] = []

    def replicate(world: World, loss: nn.Module) -> nn.Module:
        wrappers.append(nn.Sequential(loss))
        return wrappers[-1]

    compiled: list[Any] = []
    monkeypatch.setattr(World, "replicate", replicate)
    monkeypatch.setattr(torch, "compile", lambda module, **_: compiled.append(module) or module)
    trainer_of(config_of(compile=True), data, tmp_path)
    assert len(wrappers) == 1
    assert compiled == wrappers
    assert type(wrappers[0][0]) is TrainingLoss  # its graph contains the logits and their loss


@pytest.mark.integration
def test_a_compiled_run_that_is_stopped_and_resumed_ends_with_the_same_bits(
    compile_options: list[Any], data: PreparedData, tmp_path: Path
) -> None:
    straight = run_of(data, tmp_path / "straight", compile=True)
    config = straight.config
    first = trainer_of(config, data, tmp_path / "first")
    run_until(first, 4)
    second = trainer_of(config, data, tmp_path / "first", resume=True)
    list(second.run())
    assert second.moved_from is None
    assert differing(bits(second), bits(straight)) == []
    other = replace(config, training=replace(config.training, compile=False))
    moved = trainer_of(other, data, tmp_path / "first", resume=True).moved_from
    assert moved is not None
    assert "compiled" in moved


@pytest.mark.slow
def test_compiled_kernels_give_the_same_bits_after_resuming(
    data: PreparedData, tmp_path: Path
) -> None:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)  # with more threads, the compiler's default embedding gradient varies
    try:
        straight = run_of(data, tmp_path / "straight", compile=True)
        first = trainer_of(straight.config, data, tmp_path / "first")
        run_until(first, 4)
        torch._dynamo.reset()
        second = trainer_of(straight.config, data, tmp_path / "first", resume=True)
        list(second.run())
    finally:
        torch.set_num_threads(n_threads)
    assert differing(bits(second), bits(straight)) == []


class Failing:
    """A compiler that fails in the first forward or backward pass."""

    def __init__(self, function: Any, where: str) -> None:
        self.function, self.where = function, where

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        if self.where == "forward":
            raise RuntimeError("no C++ compiler\nwas found")
        loss = self.function(*arguments, **options)
        loss.register_hook(self.fail)
        return loss

    def fail(self, gradient: Any) -> None:
        raise RuntimeError("no C++ compiler\nwas found")


@pytest.mark.integration
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_compiler_failure_falls_back_to_eager_with_the_same_bits(
    where: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_of(data, tmp_path / "eager", compile=False)
    monkeypatch.setattr(torch, "compile", lambda f, **_: Failing(f, where))
    monkeypatch.setattr(compiling, "LONG_S", 0)
    with pytest.warns(MinigptWarning) as seen:
        found = run_of(data, tmp_path / "failed")
    assert [str(one.message) for one in seen] == [
        "training without torch.compile, which failed: no C++ compiler was found"
    ]
    assert differing(bits(found), bits(straight)) == []


@pytest.mark.integration
def test_a_run_whose_compilation_failed_is_resumed_without_it(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run_of(data, tmp_path / "eager", compile=False)
    monkeypatch.setattr(compiling, "LONG_S", 0)
    config = replace(straight.config, training=replace(straight.config.training, compile=None))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda f, **_: Failing(f, "forward"))
        first = trainer_of(config, data, tmp_path / "run")
        with pytest.warns(MinigptWarning, match="without torch.compile"):
            run_until(first, 4)
    again = trainer_of(config, data, tmp_path / "run", resume=True)  # the compiler works again
    assert again.moved_from is None
    assert [fact for _, fact in opening(again) if "compile" in fact] == [compiling.FAILED_NOTE]
    asked = replace(config, training=replace(config.training, compile=True))
    moved_from = trainer_of(asked, data, tmp_path / "run", resume=True).moved_from
    assert moved_from is not None
    assert "compiled" not in moved_from
    list(again.run())
    assert differing(bits(again), bits(straight)) == []
    assert trainer_of(config, data, tmp_path / "run", resume=True).compile_failed


def test_a_compiler_failure_is_an_error_if_compile_was_requested(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda f, **_: Failing(f, "forward"))
    with pytest.raises(ConfigError, match=r"^--compile: .* no C\+\+ compiler.*Use --no-compile\.$"):
        run_of(data, tmp_path / "failed", compile=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_gradient_equals_that_of_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, (3, 7), generator=generator)
    module = compiling.Embedding(6, 4, dtype=dtype)
    gradient = torch.randn(3, 7, 4, generator=generator).to(dtype)
    (ours,) = torch.autograd.grad(module(tokens), module.weight, gradient)
    rows = F.embedding(tokens, module.weight)
    assert torch.equal(module(tokens), rows)
    assert torch.equal(ours, torch.autograd.grad(rows, module.weight, gradient)[0])
