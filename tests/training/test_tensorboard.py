"""TensorBoard's reader finds each point of a run exactly once, however often it was resumed."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_runs import config_of, trainer_of

from minigpt.checkpoint.folder import METRICS_FILE
from minigpt.text.tokens import PreparedData
from minigpt.training.events import StepEvent
from minigpt.training.metrics import TENSORBOARD_FOLDER, logging_to

Points = list[tuple[int, float]]
TAGS = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "bits_per_byte/val": "bits_per_byte",
    "lr": "lr",
    "grad_norm": "grad_norm",
    "tokens_per_s": "tokens_per_s",
}


@pytest.fixture
def accumulator() -> Any:
    """Return TensorBoard's reader of event files."""
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="needs TensorBoard to read its files: pip install 'minigpt-attention[tensorboard]'",
    )
    return module.EventAccumulator


def read(events: Any) -> dict[str, Points]:
    events.Reload()
    names = events.Tags()["scalars"]
    return {name: [(s.step, s.value) for s in events.Scalars(name)] for name in names}


def logged(run: Path) -> dict[str, Points]:
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text().splitlines()]
    return {
        tag: [
            (line["step"], pytest.approx(line[name], rel=1e-6))  # stored as float32
            for line in lines
            if line["event"] != "save" and name in line
        ]
        for tag, name in TAGS.items()
    }


def train(data: PreparedData, run: Path, *, kill_at: int = 0, resume: bool = False) -> None:
    """Train to step 6, or abort at a step that has no checkpoint yet."""
    config = config_of(max_steps=6, save_every=2, eval_every=3)
    trainer = trainer_of(config, data, run, resume=resume)
    report_to = None if resume else "tensorboard"
    with logging_to(run, report_to, from_step=trainer.step) as log:
        for event in trainer.run():
            log(event)
            if event.step == kill_at:
                return


def test_every_scalar_of_a_resumed_run_is_logged_once(
    data: PreparedData, tmp_path: Path, accumulator: Any
) -> None:
    train(data, tmp_path, kill_at=5)  # its points at step 5 are newer than the checkpoint at step 4
    train(data, tmp_path, resume=True)
    expected = logged(tmp_path)
    assert [step for step, _ in expected["loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in expected["loss/val"]] == [2, 3, 4, 6]
    assert read(accumulator(str(tmp_path / TENSORBOARD_FOLDER))) == expected


def test_mfu_is_logged_if_it_is_known(tmp_path: Path, accumulator: Any) -> None:
    with logging_to(tmp_path, "tensorboard", from_step=0) as log:
        for number, mfu in ((1, None), (2, 0.25)):
            log(StepEvent(number, 0.5, 1.25, 0.01, 2.0, 100.0, mfu, 3.0, 3.0))
    assert read(accumulator(str(tmp_path / TENSORBOARD_FOLDER)))["mfu"] == [(2, 0.25)]


@pytest.mark.parametrize("report_to", [None, "none"])
def test_a_run_without_report_to_writes_no_event_files(
    report_to: str | None, tmp_path: Path
) -> None:
    board = tmp_path / TENSORBOARD_FOLDER
    with logging_to(tmp_path, report_to, from_step=4):
        assert not board.exists()
    board.mkdir()  # an earlier part of the run used TensorBoard
    with logging_to(tmp_path, "none", from_step=4):
        assert not list(board.iterdir())
