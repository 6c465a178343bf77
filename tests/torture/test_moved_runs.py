"""A run folder that is moved, deleted or damaged while the run trains."""

import shutil
from pathlib import Path

import pytest
from small_runs import bits, config_of, data_of, differing, text, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.errors import ResourceError
from minigpt.training.metrics import MetricsLog, logging_to


@pytest.mark.integration
@pytest.mark.parametrize("how", ["moved", "deleted", "replaced"])
@pytest.mark.parametrize("writes_metrics", [True, False])
def test_moving_a_run_folder_during_training_ends_the_run_in_one_line(
    how: str, writes_metrics: bool, tmp_path: Path
) -> None:
    data = data_of(text(400), tmp_path)
    config = config_of(max_steps=6, save_every=2)
    run, elsewhere = RunFolder(tmp_path / "run"), tmp_path / "elsewhere"

    def train() -> None:
        with run.lock(), logging_to(run.path, "none", from_step=None) as write:
            trainer = trainer_of(config, data, run.path)
            trainer.folder = run
            for event in trainer.run():
                if event.step == 3 and run.path.exists() and not elsewhere.exists():
                    shutil.move(run.path, elsewhere)
                    if how == "deleted":
                        shutil.rmtree(elsewhere)
                        elsewhere.mkdir()
                    if how == "replaced":
                        run.path.mkdir()
                if writes_metrics:
                    write(event)

    with pytest.raises(ResourceError, match="moved or deleted while the run was train") as caught:
        train()
    assert caught.value.exit_code == 6
    assert "\n" not in str(caught.value)
    if how != "deleted":
        shutil.rmtree(run.path, ignore_errors=True)
        shutil.move(elsewhere, run.path)
        resumed = trainer_of(config, data, run.path, resume=True)
        assert resumed.step == 2
        list(resumed.run())
        straight = trainer_of(config, data, tmp_path / "straight")
        list(straight.run())
        assert differing(bits(resumed), bits(straight)) == []


@pytest.mark.parametrize(
    "damage",
    [
        b'\xff\xfe{"event": "step", "step": 1}\n',
        b'{"event": "step", "step": 1\n',
        b"[]\n",
        b'{"event": "step"}\n',
        b'{"step": "1"}\n',
        b"\x00" * 64 + b"\n",
        b"[" * 10_000 + b"}\n",
        b'{"event": "step", "step": 1}',
    ],
)
def test_a_damaged_line_of_metrics_does_not_stop_a_resume(damage: bytes, tmp_path: Path) -> None:
    good = [b'{"event": "step", "step": %d}\n' % i for i in range(1, 6)]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"".join(good[:2]) + (damage if damage.endswith(b"\n") else b"") + good[2])
    if not damage.endswith(b"\n"):
        path.write_bytes(path.read_bytes() + damage)
    MetricsLog(path, from_step=2)
    assert path.read_bytes() == b"".join(good[:2])
