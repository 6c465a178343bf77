"""Loss curves read from metrics.jsonl of finished and running runs."""

import json
import os
from pathlib import Path

import pytest
from small_runs import config_of, trainer_of

from minigpt.checkpoint.folder import CONFIG_FILE, METRICS_FILE
from minigpt.errors import CheckpointError
from minigpt.settings import to_toml
from minigpt.text.tokens import PreparedData
from minigpt.training.events import EvalEvent, StepEvent
from minigpt.training.metrics import logging_to
from minigpt.training.reports.curves import LossPoint, find_run, read_curves

STEP = '{"event": "step", "step": 3, "train_loss": 2.5, "elapsed_s": 1.5}\n'
EVAL = (
    '{"event": "eval", "step": 3, "val_loss": 2.25, "bits_per_byte": 3.5, "elapsed_s": 1.5}\n'
    '{"event": "save", "step": 3, "val_loss": 2.25, "is_best": true}\n'
)


def written(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METRICS_FILE).write_text(text, encoding="utf-8", errors="surrogateescape")
    return folder


def test_loss_curves_equal_the_losses_of_the_events(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(max_steps=4, batch_size=6, eval_every=2)
    trainer = trainer_of(config, data, tmp_path)
    with logging_to(tmp_path, None, from_step=0) as log:
        events = []
        for event in trainer.run():
            log(event)
            events.append(event)
    (tmp_path / CONFIG_FILE).write_text(to_toml(config))
    curves = read_curves(tmp_path)
    assert curves.tokenizer == "bytes"
    assert curves.train == tuple(
        LossPoint(e.step, e.step * 6 * 16, e.elapsed_s, e.train_loss)
        for e in events
        if isinstance(e, StepEvent)
    )
    assert curves.val == tuple(
        LossPoint(e.step, e.step * 6 * 16, e.elapsed_s, e.val_loss, e.bits_per_byte)
        for e in events
        if isinstance(e, EvalEvent)
    )
    assert [point.steps for point in curves.val] == [2, 4]


@pytest.mark.parametrize("half", ['{"event": "st', STEP[:-1], "\0\0\0"])
def test_an_incomplete_last_line_of_metrics_is_ignored(half: str, tmp_path: Path) -> None:
    curves = read_curves(written(tmp_path, STEP + EVAL + half))
    assert [(point.steps, point.loss) for point in curves.train] == [(3, 2.5)]
    assert [(point.loss, point.bits_per_byte) for point in curves.val] == [(2.25, 3.5)]


def test_the_number_of_tokens_is_unknown_without_a_config(tmp_path: Path) -> None:
    curves = read_curves(written(tmp_path, STEP))
    assert (curves.tokenizer, curves.train[0].tokens) == (None, None)
    (tmp_path / CONFIG_FILE).write_text("version = 99")
    assert read_curves(tmp_path).train[0].tokens is None


def test_nan_and_inf_losses_are_omitted_from_curves(tmp_path: Path) -> None:
    bad = "".join(STEP.replace("2.5", value) for value in ("NaN", "Infinity", "-Infinity"))
    assert [point.loss for point in read_curves(written(tmp_path, bad + STEP)).train] == [2.5]


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "no JSON",
        "\udcff",
        "[1]",
        "7",
        '"event"',
        '{"step": 1}',
        '{"event": "step", "step": 1}',
        STEP.strip().replace("2.5", '"a"'),
        STEP.strip().replace("2.5", "null"),
        STEP.strip().replace("3,", "1e999,"),
        "[" * 100_000,
    ],
)
def test_a_damaged_line_of_metrics_is_reported_with_its_number(bad: str, tmp_path: Path) -> None:
    message = r"line 2 of '.*metrics\.jsonl' is not a line of metrics"
    with pytest.raises(CheckpointError, match=message) as error:
        read_curves(written(tmp_path, f"{STEP}{bad}\n{STEP}"))
    assert str(error.value).isprintable()


def test_a_run_is_found_by_name_or_folder_and_defaults_to_the_newest(tmp_path: Path) -> None:
    old, new = (written(tmp_path / name, STEP) for name in ("old", "new"))
    os.utime(old / METRICS_FILE, (1, 1))
    (tmp_path / "not-a-run").mkdir()
    assert find_run("old", tmp_path) == find_run(str(old), tmp_path) == old
    assert find_run(None, tmp_path) == new
    assert json.loads((find_run("new", tmp_path) / METRICS_FILE).read_text())["step"] == 3


@pytest.mark.parametrize("spec", ["odl", "not-a-run", "x" * 5000, "a\0b", "\x1b[2J"])
def test_an_unknown_run_is_reported_safely_with_the_nearest_name(spec: str, tmp_path: Path) -> None:
    written(tmp_path / "old", STEP)
    (tmp_path / "not-a-run").mkdir()
    with pytest.raises(CheckpointError, match="old") as error:
        find_run(spec, tmp_path)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 300


def test_without_any_run_the_error_names_minigpt_train(tmp_path: Path) -> None:
    for spec in (None, "a"):
        with pytest.raises(CheckpointError, match="minigpt train"):
            find_run(spec, tmp_path / "nothing")
