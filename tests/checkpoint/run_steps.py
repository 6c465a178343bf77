"""Writing and checking steps of a run folder."""

from typing import Any

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify


def write_step(run: RunFolder, step: int, text: str = "weights", **facts: Any) -> None:
    with run.writing_step(step, **facts) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "training_state").mkdir()
        (folder / "training_state" / "momentum").write_text(text)
    run.point("latest", step, **facts)


def assert_complete(run: RunFolder, *steps: int) -> None:
    """Check that the latest checkpoint is one of ``steps``, complete, without leftover files."""
    latest = run.latest()
    assert latest is not None
    assert latest.step in steps
    verify(latest.folder, hashes=True)
    assert not [path.name for path in run.path.glob(".*") if path.name != ".lock"]
