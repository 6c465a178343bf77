"""NaN and inf losses: a run stops with its last good checkpoint, or skips the steps."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import bits, config_of, differing, run_until, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.errors import DivergedError
from minigpt.text.tokens import PreparedData
from minigpt.training.events import EvalEvent, Event, SaveEvent, StepEvent
from minigpt.training.metrics import MetricsLog
from minigpt.training.skipping import MAX_SKIPPED_IN_A_ROW, SkipEvent
from minigpt.training.trainer import Trainer


def set_weight(trainer: Trainer, value: float) -> None:
    with torch.no_grad():
        trainer.model.blocks[0].mlp.up.weight[3, 4] = value


def run_and_set_weight(trainer: Trainer, *, after_step: int, value: float) -> None:
    for event in trainer.run():
        if isinstance(event, SaveEvent) and event.step == after_step:
            set_weight(trainer, value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_run_raises_and_leaves_the_last_finite_checkpoint(
    value: float, data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of("llama", save_every=2), data, tmp_path)
    with pytest.raises(DivergedError) as caught:
        run_and_set_weight(trainer, after_step=4, value=value)
    message = str(caught.value)
    assert message.startswith("training diverged at step 5: loss nan, gradient norm nan, lr 0.01.")
    assert "The checkpoint of step 4 is kept. Try a lower --lr" in message
    latest, best = RunFolder(tmp_path).latest(), RunFolder(tmp_path).best()
    assert latest is not None
    assert best is not None
    for pointer in (latest, best):
        tensors = read_model(pointer.folder).model.state_dict().values()
        assert all(tensor.isfinite().all() for tensor in tensors)
    assert latest.step == 4


@pytest.mark.parametrize("cadence", [{"save_every": 2}, {"eval_every": 1, "save_every": 3}])
def test_a_run_that_diverged_between_two_log_lines_saves_nothing(
    cadence: dict[str, int], data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("llama", log_every=1000, max_steps=20, sample_every=1, **cadence)
    trainer = trainer_of(config, data, tmp_path)
    first = cadence["save_every"] + 1
    with pytest.raises(DivergedError, match=rf"at step {first}: loss nan, gradient norm nan, lr"):
        run_and_set_weight(trainer, after_step=cadence["save_every"], value=math.nan)
    assert RunFolder(tmp_path).steps() == [cadence["save_every"]]


def test_weights_with_a_nan_from_the_last_update_are_not_saved(
    data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of(save_every=2), data, tmp_path)
    events = trainer.run()
    while (event := next(events)).step < 4:
        pass
    assert isinstance(event, StepEvent)
    set_weight(trainer, math.nan)
    with pytest.raises(DivergedError) as caught:
        next(events)
    assert str(caught.value).startswith(
        f"training diverged at step 4: validation loss nan, gradient norm {event.grad_norm:.4g}, lr"
    )
    assert RunFolder(tmp_path).steps() == [2]


def test_a_far_too_high_learning_rate_is_reported_as_divergence(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(
        "gpt2", optimizer="adamw", lr=1e25, embedding_lr=1e25, warmup_fraction=0.0, max_steps=50
    )
    with pytest.raises(DivergedError):
        list(trainer_of(config, data, tmp_path).run())
    assert RunFolder(tmp_path).steps() == []


def test_stopping_a_diverged_run_saves_nothing(data: PreparedData, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(log_every=1000), data, tmp_path)
    set_weight(trainer, math.nan)
    trainer.request_stop()
    with pytest.raises(DivergedError):
        list(trainer.run())
    assert RunFolder(tmp_path).steps() == []


def make_losses_nan(trainer: Trainer, *steps: int, micro_batch: int = 0) -> None:
    """Set the logits of one micro-batch of each step to NaN, without changing weights."""
    n_seen: dict[int, int] = {}

    def hook(module: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        step = trainer.step + 1
        if not module.training:
            return logits
        n_seen[step] = n_seen.get(step, 0) + 1
        is_spoilt = step in steps and n_seen[step] == micro_batch + 1
        return logits * math.nan if is_spoilt else logits

    trainer.model.register_forward_hook(hook)


@pytest.mark.integration
def test_the_first_diverged_step_is_named_even_if_logging_is_rare(
    data: PreparedData, tmp_path: Path
) -> None:
    watched = trainer_of(config_of(max_steps=20), data, tmp_path / "watched")
    lrs = {event.step: event.lr for event in watched.run() if isinstance(event, StepEvent)}
    trainer = trainer_of(config_of(max_steps=20, log_every=1000), data, tmp_path / "run")
    make_losses_nan(trainer, 14)
    with pytest.raises(DivergedError) as caught:
        list(trainer.run())
    assert str(caught.value) == (
        f"training diverged at step 14: loss nan, gradient norm nan, lr {lrs[14]:.3g}. Nothing was "
        "saved yet. Try a lower --lr, or --on-nan skip to skip these steps."
    )


@pytest.mark.parametrize("on_nan", ["stop", "skip"])
def test_a_loss_above_the_divergence_threshold_ends_the_run(
    on_nan: str, data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("gpt2", lr=10.0, embedding_lr=10.0, on_nan=on_nan, max_steps=40)
    with pytest.raises(
        DivergedError, match=r"loss \d[^,]*, gradient norm \d[^,]*, lr \d"
    ) as caught:
        list(trainer_of(config, data, tmp_path).run())
    loss = float(str(caught.value).split("loss ")[1].split(",")[0])
    assert 100 * math.log(257) < loss < math.inf


@pytest.mark.integration
def test_a_falling_loss_never_counts_as_divergence(data: PreparedData, tmp_path: Path) -> None:
    config = config_of("llama", lr=1.0, embedding_lr=1.0, max_steps=40)
    losses = [e.train_loss for e in trainer_of(config, data, tmp_path).run() if hasattr(e, "lr")]
    assert max(losses) > 2 * math.log(257) > losses[-1]


@pytest.mark.integration
@pytest.mark.parametrize("micro_batch", [0, 1])
def test_a_skipped_step_leaves_parameters_and_optimizers_unchanged(
    micro_batch: int, data: PreparedData, tmp_path: Path
) -> None:
    training = {"max_steps": 8, "micro_batch_size": 3, "log_every": 2}
    plain = trainer_of(config_of("qwen3", dropout=0.2, **training), data, tmp_path / "plain")
    steps = {optimizer: optimizer.step for optimizer in plain.optimizers}

    def skipping(step: Callable[..., Any]) -> Callable[..., Any]:
        return lambda: None if plain.step + 1 in (2, 5) else step()

    for optimizer, step in steps.items():
        optimizer.step = skipping(step)  # type: ignore[method-assign]
    expected = [(e.step, e.train_loss) for e in plain.run() if isinstance(e, StepEvent)]

    config = config_of("qwen3", dropout=0.2, on_nan="skip", **training)
    trainer = trainer_of(config, data, tmp_path / "skipping")
    make_losses_nan(trainer, 2, 5, micro_batch=micro_batch)
    events = list(trainer.run())
    assert differing(bits(trainer), bits(plain)) == []
    skips = [(e.step, e.n_skipped) for e in events if isinstance(e, SkipEvent)]
    assert skips == [(2, 1), (5, 2)]
    logged = [(e.step, e.train_loss) for e in events if isinstance(e, StepEvent)]
    assert logged == expected[1:], "step 2 must be reported as skipped"


def test_skipping_nan_steps_changes_nothing_if_all_losses_are_finite(
    data: PreparedData, tmp_path: Path
) -> None:
    trainers = []
    for on_nan in ("stop", "skip"):
        trainers.append(trainer_of(config_of(on_nan=on_nan), data, tmp_path / on_nan))
        list(trainers[-1].run())
    assert differing(bits(trainers[0]), bits(trainers[1])) == []


@pytest.mark.integration
def test_too_many_skipped_steps_in_a_row_end_the_run(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(on_nan="skip", max_steps=50, save_every=2)
    nan_steps = [
        *range(5, 4 + MAX_SKIPPED_IN_A_ROW),
        *range(20, 20 + MAX_SKIPPED_IN_A_ROW),
    ]
    trainer = trainer_of(config, data, tmp_path)
    make_losses_nan(trainer, *nan_steps)
    events: list[Event] = []
    with pytest.raises(DivergedError) as caught:
        events.extend(trainer.run())
    assert str(caught.value).startswith(
        f"training diverged at step {19 + MAX_SKIPPED_IN_A_ROW}: loss nan, gradient norm nan, lr "
    )
    assert f"{MAX_SKIPPED_IN_A_ROW} steps in a row were skipped. The checkpoint of step 28" in str(
        caught.value
    )
    assert [e.step for e in events if isinstance(e, SkipEvent)] == nan_steps[:-1]
    latest = RunFolder(tmp_path).latest()
    assert latest is not None
    tensors = read_model(latest.folder).model.state_dict().values()
    assert all(tensor.isfinite().all() for tensor in tensors)


@pytest.mark.integration
def test_a_resumed_run_continues_counting_skipped_steps(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(on_nan="skip", max_steps=8)
    straight = trainer_of(config, data, tmp_path / "straight")
    make_losses_nan(straight, 2, 6)
    list(straight.run())
    first = trainer_of(config, data, tmp_path / "interrupted")
    make_losses_nan(first, 2, 6)
    run_until(first, 4)
    second = trainer_of(config, data, tmp_path / "interrupted", resume=True)
    make_losses_nan(second, 2, 6)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for event in second.run():
        log.write(event)
    assert differing(bits(second), bits(straight)) == []

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    lines = [json.loads(text, parse_constant=refuse) for text in log.path.read_text().splitlines()]
    [skip] = [line for line in lines if line["event"] == "skip"]
    assert (skip["step"], skip["n_skipped"]) == (6, 2)
    assert skip["train_loss"] is skip["grad_norm"] is None
    assert skip["lr"] > 0


def test_evaluations_and_checkpoints_due_at_a_skipped_step_still_happen(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(on_nan="skip", max_steps=4, save_every=2)
    trainer = trainer_of(config, data, tmp_path)
    make_losses_nan(trainer, 2, 4)
    seen = [(type(e), e.step) for e in trainer.run()]
    assert seen == [
        (StepEvent, 1),
        (SkipEvent, 2),
        (EvalEvent, 2),
        (SaveEvent, 2),
        (StepEvent, 3),
        (SkipEvent, 4),
        (EvalEvent, 4),
        (SaveEvent, 4),
    ]
