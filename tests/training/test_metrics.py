"""metrics.jsonl: one line per event, truncated to the checkpoint when a run resumes."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
from small_models import small_model
from small_runs import config_of, run_until, trainer_of

from minigpt import files
from minigpt.text.tokens import PreparedData
from minigpt.training.events import EvalEvent, Event, SampleEvent, SaveEvent, StepEvent
from minigpt.training.metrics import MetricsLog
from minigpt.training.overfitting import EarlyStopEvent
from minigpt.training.reports.curves import read_curves
from minigpt.training.skipping import SkipEvent


def step(number: int) -> StepEvent:
    return StepEvent(
        step=number,
        progress=0.5,
        train_loss=1.25,
        lr=0.01,
        grad_norm=2.0,
        tokens_per_s=100.0,
        mfu=None,
        elapsed_s=3.0,
        remaining_s=3.0,
    )


def lines_of(path: Path) -> list[dict[str, object]]:
    text = path.read_text(encoding="utf-8")
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("event", [StepEvent, SkipEvent, EvalEvent, SaveEvent, EarlyStopEvent])
def test_the_page_on_watching_names_every_field_of_a_line(event: type[Event]) -> None:
    page = Path(__file__).parents[2] / "docs" / "watching.md"
    (row,) = re.findall(rf"^\| `{event.kind}` \| (.*)$", page.read_text("utf-8"), re.MULTILINE)
    names = {field.name for field in dataclasses.fields(event)} - {"folder"}
    assert {*re.findall(r"`(\w+)`", row)} == names


def test_each_event_except_samples_is_one_json_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    events: list[Event] = [
        step(1),
        EvalEvent(step=1, val_loss=1.5, bits_per_byte=2.1, n_tokens=10, elapsed_s=3.0, eval_s=0.1),
        SampleEvent(step=1, model=small_model()),
        SaveEvent(step=1, folder=tmp_path / "step-000001", val_loss=1.5, is_best=True),
    ]
    for event in events:
        log.write(event)
    lines = lines_of(path)
    assert [line["event"] for line in lines] == ["step", "eval", "save"]
    assert lines[0] == {
        "event": "step",
        "step": 1,
        "progress": 0.5,
        "train_loss": 1.25,
        "lr": 0.01,
        "grad_norm": 2.0,
        "tokens_per_s": 100.0,
        "mfu": None,
        "elapsed_s": 3.0,
        "remaining_s": 3.0,
    }
    assert lines[2] == {"event": "save", "step": 1, "val_loss": 1.5, "is_best": True}


def test_resuming_truncates_metrics_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for number in (5, 10, 15, 20):
        log.write(step(number))
    MetricsLog(path, from_step=10).write(step(15))
    assert [line["step"] for line in lines_of(path)] == [5, 10, 15]


def test_metrics_of_any_size_are_kept_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_READ_BYTES", 100)
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for number in range(5):
        log.write(step(number))
    MetricsLog(path, from_step=3)
    assert [line["step"] for line in lines_of(path)] == [0, 1, 2, 3]
    assert [point.steps for point in read_curves(tmp_path).train] == [0, 1, 2, 3]


@pytest.mark.parametrize("rest", ['{"event": "st', '{"event": "step", "step": 12', "\0\0\0\0"])
def test_an_incomplete_line_after_a_kill_is_dropped(rest: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(step(10))
    with path.open("a") as file:
        file.write(rest)
    MetricsLog(path, from_step=10).write(step(11))
    assert [line["step"] for line in lines_of(path)] == [10, 11]


def test_a_new_run_starts_a_new_metrics_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path).write(step(10))
    MetricsLog(path)
    assert lines_of(path) == []


@pytest.mark.integration
def test_metrics_of_a_resumed_run_equal_those_of_an_uninterrupted_one(
    data: PreparedData, tmp_path: Path
) -> None:
    def facts(path: Path) -> list[tuple[object, ...]]:
        names = ("event", "step", "train_loss", "val_loss", "lr", "grad_norm")
        return [tuple(line.get(name) for name in names) for line in lines_of(path)]

    config = config_of(max_steps=6, save_every=2)
    straight = MetricsLog(tmp_path / "straight.jsonl")
    for event in trainer_of(config, data, tmp_path / "straight").run():
        straight.write(event)

    first = trainer_of(config, data, tmp_path / "interrupted")
    log = MetricsLog(tmp_path / "interrupted.jsonl")
    events = (
        first.run()
    )  # as if killed at step 5: its lines are newer than the checkpoint at step 4
    for event in events:
        log.write(event)
        if event.step == 5:
            break
    events.close()
    second = trainer_of(config, data, tmp_path / "interrupted", resume=True)
    log = MetricsLog(tmp_path / "interrupted.jsonl", from_step=second.step)
    for event in run_until(second, 100):
        log.write(event)
    assert facts(tmp_path / "interrupted.jsonl") == facts(tmp_path / "straight.jsonl")
