"""The inventory of a checkpoints folder lists what was written."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.tools import inventory
from minigpt.checkpoint.tools.inventory import entry_of, inventory_of, take_inventory
from minigpt.errors import CheckpointError

LOSSES = {
    1: {"val_loss": 3.25, "bits_per_byte": 4.5},
    2: {"val_loss": 1.5, "bits_per_byte": 2.25},
    3: {"val_loss": 1.75, "bits_per_byte": 2.5},
}


@pytest.fixture(autouse=True)
def skip_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # saves time


def write_run(path: Path, *steps: int, model_type: object = "qwen3") -> RunFolder:
    run = RunFolder(path)
    with run.lock():
        for step in steps:
            with run.writing_step(step, **LOSSES.get(step, {})) as folder:
                (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
                (folder / "training_state").mkdir()
                (folder / "training_state" / "momentum").write_text("x" * 100 * step)
            run.point("latest", step)
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = write_run(tmp_path / "tales", 1, 2, 3)
    run.point("best", 2)
    return run


def test_each_step_is_listed_with_its_losses_and_marks(run: RunFolder) -> None:
    entry = entry_of(run.path)
    assert (entry.name, entry.is_run) == ("tales", True)
    seen = [
        (c.step, c.val_loss, c.bits_per_byte, c.is_best, c.is_latest) for c in entry.checkpoints
    ]
    assert seen == [
        (3, 1.75, 2.5, False, True),
        (2, 1.5, 2.25, True, False),
        (1, 3.25, 4.5, False, False),
    ]
    assert {c.layout for c in entry.checkpoints} == {"qwen3"}
    assert not any(c.damage for c in entry.checkpoints)


@pytest.mark.parametrize(
    "facts", [None, [1.75], {}, {"val_loss": "9.5"}, {"val_loss": [9.5]}, {"val_loss": True}]
)
def test_a_loss_that_is_not_a_number_is_left_out(run: RunFolder, facts: object) -> None:
    path = run.step_folder(3) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"facts": facts}))
    third, second, _ = entry_of(run.path).checkpoints
    assert (third.val_loss, third.bits_per_byte, third.damage) == (None, None, None)
    assert (second.val_loss, second.bits_per_byte) == (1.5, 2.25)


def test_the_size_counts_all_files_and_the_date_is_that_of_the_manifest(run: RunFolder) -> None:
    folder = run.step_folder(3)
    os.utime(folder / "manifest.json", (0, 1_700_000_000))
    step = entry_of(run.path).checkpoints[0]
    sizes = [
        os.path.getsize(os.path.join(place, name))
        for place, _, names in os.walk(folder)
        for name in names
    ]
    assert len(sizes) == 3
    assert step.n_bytes == sum(sizes) > 300
    assert step.written_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)


def test_a_damaged_step_is_marked_and_is_neither_best_nor_latest(run: RunFolder) -> None:
    (run.step_folder(3) / "training_state" / "momentum").write_text("x")
    (run.step_folder(2) / "config.json").unlink()
    third, second, first = entry_of(run.path).checkpoints
    assert "1 bytes instead of 300" in str(third.damage)
    assert "config.json is missing" in str(second.damage)
    assert (first.damage, first.is_best, first.is_latest) == (None, True, True)
    assert second.val_loss == 1.5  # the manifest still has it


@pytest.mark.parametrize("model_type", [None, 5, ["qwen3"], {}])
def test_a_model_type_that_is_not_a_string_is_ignored(tmp_path: Path, model_type: object) -> None:
    run = write_run(tmp_path / "odd", 1, model_type=model_type)
    assert entry_of(run.path).checkpoints[0].layout is None


def test_the_newest_run_is_listed_first_and_single_models_last(tmp_path: Path) -> None:
    for name, seconds in {"old": 10, "new": 30, "middle": 20}.items():
        folder = write_run(tmp_path / name, 5).step_folder(5)
        os.utime(folder / "manifest.json", (0, seconds))
    for name in ("a-model", "z-model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "gpt2"}')
        os.utime(tmp_path / name / "config.json", (0, 40 + (name == "z-model")))
    (tmp_path / "texts").mkdir()
    (tmp_path / "README.md").write_text("")
    entries = take_inventory(tmp_path)
    assert [e.name for e in entries] == ["new", "middle", "old", "z-model", "a-model"]
    assert [e.is_run for e in entries] == [True, True, True, False, False]
    (model,) = entries[-1].checkpoints
    assert (model.folder, model.layout, model.step) == (tmp_path / "a-model", "gpt2", None)
    assert (model.val_loss, model.is_best, model.damage) == (None, False, None)


def test_a_model_with_an_invalid_config_is_listed_as_damaged(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in str(entry_of(tmp_path).checkpoints[0].damage)


def test_the_inventory_accepts_a_folder_a_path_or_a_name(run: RunFolder, tmp_path: Path) -> None:
    entry = entry_of(run.path)
    for spec in (str(tmp_path), str(run.path), "tales"):
        assert inventory_of(spec, tmp_path) == [entry]
    (step,) = inventory_of(str(run.step_folder(2)))
    assert (step.name, step.is_run, len(step.checkpoints)) == ("step-000002", False, 1)
    (tmp_path / "empty").mkdir()
    assert inventory_of(str(tmp_path / "empty")) == []
    for spec in ("tails", "nul\0", "x" * 5000):
        with pytest.raises(CheckpointError, match=r"no run or model .* tales"):
            inventory_of(spec, tmp_path)


def removing(path: Path, call: Callable[[Path], None]) -> Callable[[Path], None]:
    def remove_and_call(folder: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        call(folder)

    return remove_and_call


def test_a_step_pruned_while_listing_is_omitted(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inventory, "verify", removing(run.step_folder(1), inventory.verify))
    assert [c.step for c in take_inventory(tmp_path)[0].checkpoints] == [3, 2]
    monkeypatch.setattr(inventory, "verify", removing(run.path, inventory.verify))
    assert take_inventory(tmp_path) == []


@pytest.mark.parametrize("seconds", [-1e12, -5e9, 0.0, 253402300800.0, 1e15])
def test_file_dates_work_for_any_time_in_every_time_zone(seconds: float) -> None:
    date = inventory._date(seconds)
    for hours in (-14, 14):
        assert f"{date.astimezone(timezone(timedelta(hours=hours))):%Y-%m-%d %H:%M}"
    if -6e10 < seconds < 2.5e11:
        assert date.timestamp() == seconds
