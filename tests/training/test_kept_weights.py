"""Best and averaged weights of a run, its evaluations and early stopping."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import bits, config_of, data_of, differing, run_until, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.errors import DivergedError
from minigpt.evaluation import evaluate
from minigpt.text.batches import validation_windows
from minigpt.text.tokens import PreparedData
from minigpt.training.events import EvalEvent, SaveEvent, StepEvent
from minigpt.training.overfitting import (
    EVAL_SHARE,
    MIN_EVAL_TOKENS,
    EarlyStopEvent,
    text_settings,
    with_evaluations,
)
from minigpt.training.trainer import Trainer


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Return random letters, which a model soon overfits."""
    content = "".join(chr(97 + int(i)) for i in torch.randint(26, (900,), generator=seeded()))
    return data_of(content, tmp_path_factory.mktemp("short"))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def loss_of(folder: Path, trainer: Trainer) -> float:
    windows = validation_windows(trainer.val_tokens, 16, 10**6, 8)
    model = read_model(folder, dtype=torch.float32).model
    return evaluate(model, windows, trainer.data.tokenizer.token_byte_lengths).nats_per_token


OVERFITTING = {"max_steps": 120, "lr": 0.02, "embedding_lr": 0.02, "eval_tokens": 10**6}


@pytest.mark.integration
@pytest.mark.parametrize("average", [0.0, 0.9])
def test_best_has_the_lowest_loss_of_all_evaluations_not_only_of_checkpoints(
    average: float, short: PreparedData, tmp_path: Path
) -> None:
    config = config_of(eval_every=5, save_every=50, average=average, **OVERFITTING)
    trainer = trainer_of(config, short, tmp_path)
    events = list(trainer.run())
    losses = {event.step: event.val_loss for event in events if isinstance(event, EvalEvent)}
    best = RunFolder(tmp_path).best()
    assert best is not None
    assert losses[120] > min(losses.values()) + 0.5  # overfitted
    assert losses[best.step] == min(losses.values()) == best.facts["val_loss"]
    assert best.step not in (50, 100, 120)
    assert json.loads((tmp_path / "best.json").read_text())["step"] == best.step
    assert loss_of(best.folder, trainer) == pytest.approx(min(losses.values()), rel=1e-5)
    # A run cannot resume from it, so it is not the latest step even if it is the newest.
    latest = RunFolder(tmp_path).latest()
    assert latest is not None
    assert latest.step == 120


@pytest.mark.integration
def test_averaged_weights_equal_a_plain_loop_and_are_saved_only_if_better(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(max_steps=8, eval_every=4, save_every=4, average=0.4, eval_tokens=10**6)
    trainer = trainer_of(config, data, tmp_path)
    assert trainer.average is not None
    expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for event in trainer.run():
        if isinstance(event, StepEvent):
            weight = max(0.6, 8 / (event.step + 8))
            for name, p in trainer.model.named_parameters():
                expected[name] += weight * (p.detach() - expected[name])
        if isinstance(event, SaveEvent):
            raw = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
            own = trainer.checkpoints.validation().nats_per_token
            with trainer.average.in_model():
                averaged = trainer.checkpoints.validation().nats_per_token
            assert event.val_loss == min(own, averaged)
            left = read_model(event.folder).model.state_dict()
            better = expected if averaged < own else raw
            for name, tensor in better.items():
                torch.testing.assert_close(left[name], tensor, rtol=1e-5, atol=1e-6)
            assert differing(raw, dict(trainer.model.named_parameters())) == []


def all_bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    assert trainer.average is not None
    names = {p: name for name, p in trainer.model.named_parameters()}
    averages = {f"{names[p]}/average": a.clone() for p, a in trainer.average.tensors.items()}
    return bits(trainer) | averages


@pytest.mark.integration
@pytest.mark.parametrize("stop_at", [37, 60, 83])
@pytest.mark.parametrize("average", [0.5, 0.98])
def test_a_run_with_average_and_patience_resumes_with_the_same_bits(
    average: float, stop_at: int, short: PreparedData, tmp_path: Path
) -> None:
    facts = {"eval_every": 5, "save_every": 20, "average": average, "patience": 1.0}
    config = config_of(dropout=0.2, dropout_start=2.0, **facts, **OVERFITTING | {"max_steps": 400})
    straight = trainer_of(config, short, tmp_path / "straight")
    list(straight.run())
    first = trainer_of(config, short, tmp_path / "interrupted")
    run_until(first, stop_at)
    second = trainer_of(config, short, tmp_path / "interrupted", resume=True)
    assert differing(all_bits(second), all_bits(first)) == []
    list(second.run())
    assert second.step == straight.step
    assert differing(all_bits(second), all_bits(straight)) == []
    left = [RunFolder(tmp_path / name).best() for name in ("straight", "interrupted")]
    assert left[0] is not None
    assert left[1] is not None
    # Stopping evaluates one more step, which may be better.
    assert left[1].facts["val_loss"] <= left[0].facts["val_loss"]
    if left[1].step == left[0].step:
        tensors = [load_file(pointer.folder / "model.safetensors") for pointer in left if pointer]
        assert differing(tensors[0], tensors[1]) == []


@pytest.mark.integration
@pytest.mark.parametrize("save_every", [0, 5])
def test_a_run_whose_loss_rises_stops_early_and_saves_its_best_weights(
    save_every: int, short: PreparedData, tmp_path: Path
) -> None:
    limits = {"patience": 3.0, "save_every": save_every, "max_steps": 1000}
    config = config_of(eval_every=5, **OVERFITTING | limits)
    trainer = trainer_of(config, short, tmp_path)
    events = list(trainer.run())
    (stop,) = [event for event in events if isinstance(event, EarlyStopEvent)]
    losses = {event.step: event.val_loss for event in events if isinstance(event, EvalEvent)}
    best_step = min(losses, key=lambda step: losses[step])
    assert stop.best_step == best_step
    assert stop.step == trainer.step == best_step + 100 < 1000  # at least a hundred steps
    assert stop.epochs_since == pytest.approx(100 * 6 * 16 / len(trainer.train_tokens))
    best = RunFolder(tmp_path).best()
    assert best is not None
    assert best.step == best_step
    assert not trainer.was_stopped

    again = trainer_of(config, short, tmp_path, resume=True)
    assert again.is_early_stop_due
    assert list(again.run()) == []
    unlimited = replace(config, training=replace(config.training, patience=0.0, max_steps=200))
    on = trainer_of(unlimited, short, tmp_path, resume=True)
    assert not any(isinstance(event, EarlyStopEvent) for event in on.run())
    assert on.step == 200


@pytest.mark.integration
def test_a_stopped_run_ends_early_at_the_same_evaluation(
    short: PreparedData, tmp_path: Path
) -> None:
    config = config_of(eval_every=40, patience=3.0, **OVERFITTING | {"max_steps": 400})
    straight = trainer_of(config, short, tmp_path / "straight")
    *_, stop = [event for event in straight.run() if isinstance(event, EarlyStopEvent)]
    assert stop.step == stop.best_step + 120  # the first evaluation after a hundred steps
    run_until(trainer_of(config, short, tmp_path / "stopped"), stop.step - 10)
    resumed = trainer_of(config, short, tmp_path / "stopped", resume=True)
    assert not resumed.is_early_stop_due
    list(resumed.run())
    assert resumed.step == stop.step
    assert differing(bits(resumed), bits(straight)) == []


@pytest.mark.integration
def test_a_resumed_run_without_validation_text_never_ends_early(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(max_steps=130, patience=0.1)
    config = replace(config, data=replace(config.data, val_fraction=0.0))
    run_until(trainer_of(config, data, tmp_path), 120)
    resumed = trainer_of(config, data, tmp_path, resume=True)
    list(resumed.run())
    assert resumed.step == 130


@pytest.mark.integration
def test_dropout_starts_after_dropout_start_epochs(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(dropout=0.5, dropout_start=1.0, max_steps=80)
    late, none = (
        trainer_of(c, data, tmp_path / name)
        for name, c in {
            "late": config,
            "none": replace(config, model=replace(config.model, dropout=0.0)),
        }.items()
    )
    start = math.ceil(len(late.train_tokens) / (6 * 16))
    for _ in range(start):
        late.take_step(), none.take_step()
    assert differing(bits(late), bits(none)) == []
    late.take_step(), none.take_step()
    assert "blocks.0.mlp.up.weight" in differing(bits(late), bits(none))


@pytest.mark.parametrize("n_train_tokens", [300, 16_000, 380_000, 8_000_000])
@pytest.mark.parametrize("budget", [{"max_steps": 500}, {"max_steps": 6000}, {"max_minutes": 1.0}])
@pytest.mark.parametrize("average", [0.0, 0.98])
def test_a_run_evaluates_once_per_epoch_at_a_bounded_cost(
    n_train_tokens: int, budget: dict[str, Any], average: float
) -> None:
    shape = {"max_steps": 0, "eval_every": None, "eval_tokens": None, "average": average}
    n_val_tokens = n_train_tokens // 9
    config = config_of(**shape | budget)
    training = with_evaluations(config, n_train_tokens, n_val_tokens).training
    step_tokens = 6 * 16
    assert training.eval_every is not None
    assert training.eval_tokens is not None
    epoch = math.ceil(n_train_tokens / step_tokens)
    assert training.eval_every <= max(epoch, training.max_steps // 100)
    assert training.eval_every <= max(50, training.max_steps // 20)
    n_evaluated = min(training.eval_tokens, n_val_tokens)
    share = n_evaluated * (2 if average else 1) / 3 / (training.eval_every * step_tokens)
    assert share <= EVAL_SHARE or n_evaluated <= MIN_EVAL_TOKENS


def test_a_short_validation_text_is_evaluated_several_times_per_epoch() -> None:
    shape = {"max_steps": 500, "eval_every": None, "eval_tokens": None, "average": 0.98}
    config = config_of(**shape)
    every = [with_evaluations(config, 16_000, n).training.eval_every for n in (0, 99, 400, 10**5)]
    # 400 tokens in two passes are 2.8 steps of 96 tokens; an epoch has 167 steps.
    assert every == [50, 7, 28, 50]


@pytest.mark.parametrize("max_minutes", [0.5, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("max_steps", [0, 9000])
def test_evaluation_of_a_time_limited_run_costs_at_most_a_tenth_of_50_steps(
    max_minutes: float, max_steps: int
) -> None:
    limits = {"max_steps": max_steps, "max_minutes": max_minutes, "average": 0.98}
    config = config_of(eval_every=None, eval_tokens=None, batch_size=64, **limits)
    training = with_evaluations(config, 1_000_000, 100_000).training
    step_tokens = 64 * 16
    assert training.eval_tokens is not None
    assert training.eval_every is not None
    # A step is three forward passes; the weights and their average take one pass each.
    assert 2 / 3 * training.eval_tokens <= max(0.1 * 50 * step_tokens, 2 / 3 * MIN_EVAL_TOKENS)
    n_epoch = math.ceil(1_000_000 / step_tokens)
    assert training.eval_every <= n_epoch
    assert (training.eval_every == 50) == (max_minutes <= 1)


def test_explicit_evaluation_settings_are_not_overridden() -> None:
    training = with_evaluations(config_of(eval_every=0, eval_tokens=7), 1000, 100).training
    assert (training.eval_every, training.eval_tokens) == (0, 7)


def test_smaller_texts_get_more_dropout_and_fewer_steps() -> None:
    sizes = [7_000, 60_000, 380_000, 8_000_000]
    suited = [text_settings(size, 1_000_000, 1024) for size in sizes]
    dropouts = [settings.get("model", {}).get("dropout", 0.0) for settings in suited]
    assert dropouts == sorted(dropouts, reverse=True)
    assert dropouts[0] > 0 == dropouts[-1]
    steps = [
        settings["training"].get("max_epochs", math.inf) * size / 1024
        for settings, size in zip(suited, sizes, strict=True)
    ]
    assert steps == sorted(steps)
    assert steps[0] >= 200
    assert steps[-1] == math.inf


@pytest.mark.parametrize(
    ("kilobytes", "n_tokens", "dropout"), [(20, 14_772, 0.25), (60, 36_107, 0.1)]
)
def test_the_shortest_text_of_the_measurements_has_the_larger_dropout(
    kilobytes: int, n_tokens: int, dropout: float
) -> None:
    """Compare with docs/training.md: training tokens of tiny Shakespeare's beginning for nano."""
    n_parameters = 640_000 + 2 * 192 * (257 + kilobytes)
    assert text_settings(n_tokens, n_parameters, 1024)["model"]["dropout"] == dropout


def test_without_validation_text_the_best_step_is_the_latest(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(max_steps=6, eval_every=2, save_every=2, average=0.9, patience=1.0)
    trainer = trainer_of(config, data, tmp_path)
    trainer.val_tokens = replace(trainer.val_tokens, stop=trainer.val_tokens.start)
    events = list(trainer.run())
    assert not any(isinstance(event, EvalEvent) for event in events)
    saves = [event for event in events if isinstance(event, SaveEvent)]
    assert [(event.step, event.val_loss, event.is_best) for event in saves] == [
        (step, None, True) for step in (2, 4, 6)
    ]
    best = RunFolder(tmp_path).best()
    assert best is not None
    assert best.step == 6
    assert "No validation text" in (best.folder / "README.md").read_text()


def run_and_fail(trainer: Trainer, at_step: int, fail: Callable[[], Any]) -> dict[int, float]:
    """Run and call ``fail`` after an evaluation; return the validation losses so far."""
    losses: dict[int, float] = {}
    for event in trainer.run():
        if isinstance(event, EvalEvent):
            losses[event.step] = event.val_loss
        if losses and max(losses) == at_step:
            fail()
    return losses


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_a_diverging_run_saves_the_best_weights_since_its_last_checkpoint(
    average: float, data: PreparedData, tmp_path: Path
) -> None:
    facts = {"eval_every": 2, "save_every": 50, "max_steps": 60, "eval_tokens": 10**6}
    config = config_of("llama", average=average, **facts)
    trainer = trainer_of(config, data, tmp_path)

    def set_weight_to_nan() -> None:
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(math.nan)

    with pytest.raises(DivergedError) as caught:
        run_and_fail(trainer, 8, set_weight_to_nan)
    best = RunFolder(tmp_path).best()
    assert best is not None
    assert best.step == 8
    assert "The checkpoint of step 8 is kept" in str(caught.value)
    assert loss_of(best.folder, trainer) == pytest.approx(best.facts["val_loss"], rel=1e-5)
    assert RunFolder(tmp_path).latest() is None, "a run cannot resume from weights alone"


def test_any_error_saves_the_best_weights_too(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of("llama", eval_every=2, save_every=50, max_steps=60)
    trainer = trainer_of(config, data, tmp_path)

    def fail() -> None:
        monkeypatch.setattr(Trainer, "take_step", lambda self: (1 / 0, True)[1])

    with pytest.raises(ZeroDivisionError):
        run_and_fail(trainer, 4, fail)
    assert RunFolder(tmp_path).steps() == [4]
