"""The plan of --dry-run equals the actual run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import config_of, trainer_of

from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.text.tokens import PreparedData
from minigpt.training.events import SaveEvent, StepEvent
from minigpt.training.reports import plan as plan_module
from minigpt.training.reports.plan import make_plan, parameters_by_part, tokens_to_measure
from minigpt.training.state import TrainingState
from minigpt.training.world import World


@pytest.fixture(autouse=True)
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_MEASURED_S", 0.05)
    # The memory estimate has its own tests.
    monkeypatch.setattr(plan_module, "estimate_memory", lambda *_: {"total": 4})


@pytest.mark.parametrize("layout", ["gpt2", "gpt2-tied", "qwen3"])
def test_parameters_by_part_add_up_to_the_model(layout: str) -> None:
    config = config_of(layout).model
    for n_layer in (1, 3):
        shape = replace(config, n_layer=n_layer)
        parts = parameters_by_part(shape)
        assert sum(parts.values()) == parameter_count(shape)
        assert parts["embedding"] == 257 * 32 + (16 * 32 if shape.family == "gpt2" else 0)
        assert parts.get("output", 0) == (0 if shape.tie_embeddings else 257 * 32)


@pytest.mark.integration
@pytest.mark.parametrize("save_dtype", ["auto", "bfloat16"])
def test_the_plan_equals_the_run(save_dtype: str, data: PreparedData, tmp_path: Path) -> None:
    limits = {"max_steps": 0, "max_epochs": 0.5, "save_dtype": save_dtype}
    config = config_of(micro_batch_size=3, context_warmup_length=4, **limits)
    plan = make_plan(config, data)
    trainer = trainer_of(config, data, tmp_path / "run")
    flops, n_passes = 0, 0

    def count(module: Any, inputs: Any) -> None:
        nonlocal flops, n_passes
        if module.training:
            n_passes += 1
            batch, length = inputs[0].shape
            shape = replace(config.model, context_length=length)
            flops += batch * length * training_flops_per_token(shape)

    trainer.model.register_forward_pre_hook(count)
    events = list(trainer.run())
    steps = [event.step for event in events if isinstance(event, StepEvent)]
    assert plan["max_steps"] == plan["n_steps_left"] == steps[-1] > 10
    assert plan["training_flops"] == flops
    assert plan["n_micro_batches"] * steps[-1] == n_passes
    assert (plan["n_train_tokens"], plan["n_val_tokens"]) == (
        len(trainer.train_tokens),
        len(trainer.val_tokens),
    )
    assert plan["step_tokens"] == 6 * 16
    assert plan["epochs"] == pytest.approx(0.5, abs=plan["step_tokens"] / plan["n_train_tokens"])
    [save] = [event for event in events if isinstance(event, SaveEvent)]
    n_bytes = sum(path.stat().st_size for path in save.folder.rglob("*.safetensors"))
    assert plan["checkpoint_bytes"] == pytest.approx(
        n_bytes, rel=0.1
    )  # plus headers, which are relatively large here


def test_the_estimated_time_covers_all_steps(data: PreparedData) -> None:
    config = config_of("llama", max_steps=30, batch_size=48, micro_batch_size=12)
    plan = make_plan(config, data)
    assert plan["step_s"] > 0
    assert plan["training_s"] == pytest.approx(30 * plan["step_s"])


def test_a_time_limit_is_planned_as_a_number_of_steps(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_measure", lambda *_: (0.0, 0.5))
    config = config_of(max_steps=0, max_minutes=2.0)
    plan = make_plan(config, data)
    assert (plan["max_steps"], plan["step_s"], plan["training_s"]) == (240, 0.5, 120)
    plan = make_plan(config, data, done=TrainingState(step=50, elapsed_s=60))
    assert (plan["max_steps"], plan["n_steps_left"], plan["training_s"]) == (170, 120, 60)
    for limit in (0, 30):  # less time than one step takes
        plan = make_plan(config_of(max_steps=limit, max_minutes=0.001), data)
        assert (plan["max_steps"], plan["training_s"]) == (1, 0.5)
    done = make_plan(config_of(max_steps=50), data, done=TrainingState(step=50))
    assert (done["n_steps_left"], done["training_s"], done["training_flops"], done["mfu"]) == (
        0,
        0,
        0,
        None,
    )


def test_a_plan_divides_work_and_adds_peak_flops_over_ranks(
    data: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_module, "_measure", lambda *_: (1e-12, 0.0))
    monkeypatch.setattr(plan_module, "peak_flops", lambda *_: 2e12)
    config = config_of(max_steps=8, batch_size=12, micro_batch_size=3)
    alone = make_plan(config, data)
    shared = make_plan(config, data, world=World(size=4))
    assert shared["training_flops"] == alone["training_flops"]
    assert shared["training_s"] == pytest.approx(alone["training_s"] / 4)
    assert (alone["n_micro_batches"], shared["n_micro_batches"]) == (4, 1)
    assert (alone["peak_flops"], shared["peak_flops"]) == (2e12, 8e12)
    assert alone["mfu"] == shared["mfu"] == pytest.approx(0.5)


def test_timed_steps_are_long_enough_to_hide_kernel_launches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan_module, "_MEASURED_S", 1.0)

    def pass_s(n_tokens: int) -> float:
        """Return a time: 20 ms for kernel launches plus 1 us per token."""
        return 0.02 + 1e-6 * n_tokens

    n_tokens = tokens_to_measure(pass_s, 64, 10_000_000)
    assert pass_s(n_tokens) / n_tokens == pytest.approx(1e-6, rel=0.1)
    assert pass_s(n_tokens) < 2
    assert tokens_to_measure(pass_s, 64, 4096) == 4096
    assert tokens_to_measure(lambda n: 10.0, 64, 4096) == 64
