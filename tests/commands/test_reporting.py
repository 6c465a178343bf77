"""train --report-to: TensorBoard logs only if requested."""

import shutil
import sys
from pathlib import Path

import pytest
from calls import TINY, Run, error_line


@pytest.fixture(autouse=True)
def without_tensorboard(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained / "corpus.txt", workplace)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # makes importing it fail


def test_without_tensorboard_the_error_names_the_extra_before_training(run: Run) -> None:
    result = run("train", "corpus.txt", "--name", "a", *TINY, "--report-to", "tensorboard")
    assert result.code == 2
    assert "pip install 'minigpt-attention[tensorboard]'" in error_line(result)
    assert not Path("checkpoints").exists()


@pytest.mark.parametrize("words", [[], ["--report-to", "none"]])
def test_without_report_to_tensorboard_is_not_needed(run: Run, words: list[str]) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY, *words).code == 0
    assert Path("checkpoints/a/metrics.jsonl").exists()
    assert not Path("checkpoints/a/tensorboard").exists()


@pytest.mark.integration
def test_resuming_a_run_with_tensorboard_requires_it(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    Path("checkpoints/a/tensorboard").mkdir()
    resume = ["train", "--resume", "--name", "a", "--max-steps", "6"]
    refused = run(*resume)
    assert refused.code == 2
    assert "none" in refused.err
    assert run(*resume, "--report-to", "none").code == 0


def test_an_unknown_report_target_gets_the_nearest_suggestion(run: Run) -> None:
    result = run("train", "corpus.txt", "--report-to", "tensorbord")
    assert result.code == 2
    assert "Did you mean tensorboard?" in error_line(result)
