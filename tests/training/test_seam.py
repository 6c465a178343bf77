"""A run resumed with another budget continues its learning rate without a jump."""

import json
from pathlib import Path

import pytest
from small_runs import bits, config_of, differing, run_until, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import MANIFEST, write_manifest
from minigpt.text.tokens import PreparedData
from minigpt.training.events import StepEvent
from minigpt.training.schedule import lr_scale
from minigpt.training.state import MAX_LR_RISE, STATE_FOLDER
from minigpt.training.trainer import Trainer


def rates(trainer: Trainer) -> list[float]:
    return [event.lr for event in trainer.run() if isinstance(event, StepEvent)]


@pytest.mark.integration
@pytest.mark.parametrize("schedule", ["wsd", "cosine", "linear", "constant"])
@pytest.mark.parametrize("longer", [12, 30])
def test_a_larger_budget_raises_the_learning_rate_by_at_most_a_fifth_per_step(
    schedule: str, longer: int, data: PreparedData, tmp_path: Path
) -> None:
    shape = {"schedule": schedule, "batch_size": 1}
    before = rates(trainer_of(config_of(max_steps=10, **shape), data, tmp_path))
    config = config_of(max_steps=longer, **shape)
    after = rates(trainer_of(config, data, tmp_path, resume=True))
    assert len(after) == longer - 10
    for last, now in zip([before[-1], *after], after, strict=False):
        assert now <= last * MAX_LR_RISE * (1 + 1e-9)
    scheduled = [
        config.training.lr * lr_scale(config.training, step / longer) for step in range(10, longer)
    ]
    assert all(now <= new * (1 + 1e-9) for now, new in zip(after, scheduled, strict=True))
    assert after[-1] == pytest.approx(scheduled[-1])  # it has reached the new schedule


@pytest.mark.integration
def test_without_a_larger_budget_the_learning_rate_follows_the_schedule(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of(max_steps=20, warmup_fraction=0.5)  # rises by more than a fifth per step
    run_until(trainer_of(config, data, tmp_path), 3)
    resumed = trainer_of(config, data, tmp_path, resume=True)
    assert resumed.seam is None
    expected = [0.01 * lr_scale(config.training, step / 20) for step in range(3, 20)]
    assert rates(resumed) == expected


@pytest.mark.integration
def test_a_run_interrupted_during_the_learning_rate_transition_keeps_its_bits(
    data: PreparedData, tmp_path: Path
) -> None:
    trainers = []
    for name in ("straight", "interrupted"):
        list(trainer_of(config_of(max_steps=4), data, tmp_path / name).run())
        trainers.append(trainer_of(config_of(max_steps=12), data, tmp_path / name, resume=True))
    list(trainers[0].run())
    run_until(trainers[1], 8)
    last = trainer_of(config_of(max_steps=12), data, tmp_path / "interrupted", resume=True)
    assert last.seam == trainers[0].seam
    assert last.seam is not None
    list(last.run())
    assert differing(bits(last), bits(trainers[0])) == []


def test_a_larger_budget_does_not_restart_the_context_warm_up(
    data: PreparedData, tmp_path: Path
) -> None:
    warmup = {"context_warmup_length": 4, "context_warmup_fraction": 0.5}
    run_until(trainer_of(config_of(max_steps=8, **warmup), data, tmp_path), 6)
    longer = trainer_of(config_of(max_steps=40, **warmup), data, tmp_path, resume=True)
    assert longer.progress < 0.5
    assert longer.context_length == 16


@pytest.mark.integration
def test_without_a_recorded_learning_rate_a_run_resumes_on_the_schedule(
    data: PreparedData, tmp_path: Path
) -> None:
    list(trainer_of(config_of(max_steps=3), data, tmp_path).run())
    folder = RunFolder(tmp_path).step_folder(3)
    old = {"step": 3, "elapsed_s": 1.0, "corpus": data.tokens.fingerprint}
    (folder / STATE_FOLDER / "progress.json").write_text(json.dumps(old))
    (folder / MANIFEST).unlink()
    write_manifest(folder, {})
    longer = trainer_of(config_of(max_steps=6), data, tmp_path, resume=True)
    assert longer.seam is None
    assert rates(longer)[0] == pytest.approx(0.01 * lr_scale(longer.config.training, 3 / 6))
