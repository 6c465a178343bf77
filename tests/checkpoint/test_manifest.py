"""Manifests: damaged checkpoints are detected and skipped."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.resolve import resolve_model
from minigpt.errors import CheckpointError, MinigptWarning


def test_the_manifest_lists_every_file_of_the_step(run: RunFolder) -> None:
    manifest = json.loads((run.step_folder(2) / "manifest.json").read_text())
    assert manifest["files"]["training_state/momentum"] == {
        "bytes": 7,
        # sha256sum of "weights"
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert set(manifest["files"]) == {"config.json", "training_state/momentum"}


def test_a_changed_byte_is_detected_only_by_its_hash(run: RunFolder) -> None:
    (run.step_folder(2) / "training_state" / "momentum").write_text("Weights")
    verify(run.step_folder(2))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        verify(run.step_folder(2), hashes=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is missing": lambda folder: (folder / "training_state" / "momentum").unlink(),
    "has 3 bytes instead of 7": lambda folder: (folder / "training_state" / "momentum").write_text(
        "abc"
    ),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "lists no files": lambda folder: (folder / "manifest.json").write_text("{}"),
    "is not JSON": lambda folder: (folder / "manifest.json").write_text('{"files"'),
    "is damaged at '../../x'": lambda folder: (folder / "manifest.json").write_text(
        '{"files": {"../../x": {"bytes": 0}}}'
    ),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_step_is_skipped(run: RunFolder, says: str) -> None:
    run.point("best", 2)
    DAMAGES[says](run.step_folder(2))
    with pytest.raises(CheckpointError, match=says):
        verify(run.step_folder(2))
    for pointer in (run.latest(), run.best()):
        assert pointer is not None
        assert pointer.step == 1
    with pytest.warns(MinigptWarning, match=r"Step 1 is used\."):
        assert resolve_model(str(run.path)) == run.step_folder(1)
    DAMAGES[says](run.step_folder(1))
    assert run.latest() is None
    with pytest.raises(CheckpointError, match=says):
        resolve_model(str(run.path))
