"""minigpt checkpoints average: the mean of a run's last steps is a regular model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from calls import Run, error_line
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.folder import RunFolder


@pytest.fixture(autouse=True)
def tiny(trained: Path, workplace: Path) -> RunFolder:
    """Return the run tiny with steps 1 to 4 that have different weights."""
    tiny = workplace / "checkpoints" / "tiny"
    shutil.copytree(trained / "checkpoints" / "tiny", tiny)
    run = RunFolder(tiny)
    whole = run.step_folder(4)
    for step in (1, 2, 3):
        with run.writing_step(step) as folder:
            shutil.copytree(
                whole, folder, ignore=shutil.ignore_patterns("manifest.json"), dirs_exist_ok=True
            )
            tensors = load_file(folder / "model.safetensors")
            save_file(
                {name: tensor * step for name, tensor in tensors.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
    return run


def test_the_average_of_the_last_steps_is_a_model_with_a_name(run: Run, tiny: RunFolder) -> None:
    result = run("checkpoints", "average", "tiny", "--last", "3")
    assert (result.code, result.err) == (0, "")
    assert result.out == "the mean of 3 checkpoints, steps 2 to 4, is in checkpoints/tiny-mean\n"
    mean = load_file("checkpoints/tiny-mean/model.safetensors")
    for name, tensor in load_file(tiny.step_folder(4) / "model.safetensors").items():
        torch.testing.assert_close(mean[name], tensor * 2)  # mean of 2, 3 and 1 times the tensor
    assert run("checkpoints", "verify", "tiny-mean").code == 0
    assert run("generate", "--model", "tiny-mean", "--max-new-tokens", "2", "The").code == 0
    assert not list(Path("checkpoints").glob(".*"))


def test_the_run_to_average_can_be_the_working_directory(
    run: Run, tiny: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.path)
    assert run("checkpoints", "average", ".", "--last", "2").code == 0
    assert (tiny.path.parent / "tiny-mean" / "config.json").exists()


def test_a_run_does_not_resume_from_a_mean_among_its_steps(run: Run, tiny: RunFolder) -> None:
    out = str(tiny.step_folder(9))
    assert run("checkpoints", "average", "tiny", "--last", "2", "--out", out).code == 0
    latest = tiny.latest()
    assert latest is not None
    assert latest.step == 4


def test_json_has_the_steps_and_the_folder(run: Run) -> None:
    words = ("--last", "2", "--until", "3", "--out", "x/mean", "--json")
    result = run("checkpoints", "average", "tiny", *words)
    assert json.loads(result.out) == {
        "run": "checkpoints/tiny",
        "steps": [2, 3],
        "folder": "x/mean",
    }
    assert Path("x/mean/tokenizer.json").exists()


def test_average_refuses_bad_input_in_one_line(run: Run, tiny: RunFolder) -> None:
    def refused(code: int, message: str, *words: str) -> None:
        result = run("checkpoints", "average", *words)
        assert result.code == code
        assert message in error_line(result)
        assert sorted(path.name for path in Path("checkpoints").iterdir()) == ["tiny"]

    refused(2, "the run 'tiny' has 4 checkpoints. Give fewer", "tiny")
    refused(2, "has 1 checkpoint up to step 1. Train", "tiny", "--last", "2", "--until", "1")
    refused(2, "--last must be at least 2: it is 1.", "tiny", "--last", "1")
    refused(2, "is a model folder, not a run", str(tiny.step_folder(4)), "--last", "2")
    refused(2, "'checkpoints/tiny' exists already", "tiny", "--last=2", "--out=checkpoints/tiny")
    refused(4, "there is no run or model 'tine'. Did you mean tiny?", "tine")
    weights = tiny.step_folder(3) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refused(4, "step-000003' is damaged", "tiny", "--last", "2")
