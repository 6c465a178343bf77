"""minigpt checkpoints prune."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from calls import ROOT, Run, error_line, flip_a_byte

from minigpt.checkpoint.folder import RunFolder

pytestmark = pytest.mark.usefixtures("runs")


def steps(runs: Path) -> list[int]:
    return RunFolder(runs / "checkpoints" / "tiny").steps()


@pytest.mark.parametrize(("keep", "left"), [((), [2, 4]), (("--keep", "1"), [2, 3, 4])])
def test_prune_keeps_best_latest_and_the_newest_others(
    run: Run, runs: Path, keep: tuple[str, ...], left: list[int]
) -> None:
    would = run("checkpoints", "prune", "tiny", *keep, "--dry-run", "--json")
    assert steps(runs) == [1, 2, 3, 4]
    size = sum(
        path.stat().st_size
        for step in {1, 2, 3, 4} - {*left}
        for path in (runs / "checkpoints" / "tiny" / f"step-00000{step}").rglob("*")
        if path.is_file()
    )
    done = run("checkpoints", "prune", "checkpoints/tiny", *keep, "--yes", "--json")
    assert (done.code, done.err, steps(runs)) == (0, "", left)
    facts = json.loads(done.out)
    assert facts == json.loads(would.out) | {"is_dry_run": False}
    assert facts["kept_steps"] == left
    assert [item["step"] for item in facts["removed"]] == sorted({1, 3} - {*left}, reverse=True)
    assert sum(item["n_bytes"] for item in facts["removed"]) == size
    again = run("checkpoints", "prune", "tiny", *keep, "--yes")
    assert (again.code, again.out, again.err) == (0, "", "nothing to remove\n")


def test_prune_reports_what_it_removes(run: Run, runs: Path) -> None:
    would = run("checkpoints", "prune", "tiny", "--dry-run")
    done = run("checkpoints", "prune", "tiny", "--yes")
    assert would.out.replace("would remove", "removed") == done.out
    assert re.fullmatch(
        r"removed checkpoints/tiny/step-000003, .* [kM]B\n"
        r"removed checkpoints/tiny/step-000001, .* [kM]B\n",
        done.out,
    )
    assert re.fullmatch(r"removed 2 checkpoints, .* [kM]B; steps 2, 4 stay\n", done.err)


@pytest.mark.integration
def test_prune_asks_on_a_terminal_and_no_removes_nothing(runs: Path) -> None:
    pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

    def answer(text: bytes) -> subprocess.CompletedProcess[str]:
        ours, theirs = pty.openpty()
        os.write(ours, text)
        try:
            return subprocess.run(
                [sys.executable, "-m", "minigpt", "checkpoints", "prune", "tiny"],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdin=theirs,
                capture_output=True,
                text=True,
                timeout=60,
            )
        finally:
            os.close(ours)
            os.close(theirs)

    said_no = answer(b"n\n")
    assert (said_no.returncode, said_no.stdout, steps(runs)) == (1, "", [1, 2, 3, 4])
    assert "to remove: checkpoints/tiny/step-000001, " in said_no.stderr
    assert re.search(
        r"Remove 2 checkpoints, .* [kM]B\? \[y/N\]: nothing was removed", said_no.stderr
    )
    said_yes = answer(b"y\n")
    assert (said_yes.returncode, steps(runs)) == (0, [2, 4])
    assert said_yes.stdout.count("removed ") == 2


def test_prune_without_a_terminal_needs_yes(run: Run, runs: Path) -> None:
    result = run("checkpoints", "prune", "tiny", stdin=b"y\n")
    assert "not a terminal. Pass --yes" in error_line(result)
    assert (result.code, steps(runs)) == (2, [1, 2, 3, 4])


def test_prune_of_a_training_run_fails_at_once(run: Run, runs: Path) -> None:
    with RunFolder(runs / "checkpoints" / "tiny").lock():
        result = run("checkpoints", "prune", "tiny", "--yes")
        assert "'tiny' is training" in error_line(result)
        assert (result.code, steps(runs)) == (7, [1, 2, 3, 4])
        assert run("checkpoints", "prune", "tiny", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["plain"], "'checkpoints/plain' is a model folder, not a run", 2),
        (["checkpoints/tiny/step-000001"], "is a model folder, not a run", 2),
        (["tinny"], "there is no run or model 'tinny'. Did you mean tiny?", 4),
        (["checkpoints"], "there is no run or model 'checkpoints'", 4),
        (["tiny", "--keep", "-1"], "--keep must be at least 0: it is -1", 2),
        (["tiny", "--keep", "few"], "--keep takes a whole number: it is 'few'", 2),
        ([], "missing argument 'RUN'", 2),
    ],
)
def test_prune_refuses_other_folders_and_bad_options(
    run: Run, runs: Path, words: list[str], said: str, code: int
) -> None:
    result = run("checkpoints", "prune", *words, "--yes")
    assert said in error_line(result)
    assert (result.code, steps(runs)) == (code, [1, 2, 3, 4])
    assert (runs / "checkpoints" / "plain" / "config.json").exists()


@pytest.mark.parametrize("step", [2, 4])
def test_prune_removes_nothing_if_a_kept_step_is_damaged(run: Run, runs: Path, step: int) -> None:
    flip_a_byte(runs / "checkpoints" / "tiny" / f"step-00000{step}")
    result = run("checkpoints", "prune", "tiny", "--yes")
    assert "nothing is removed, as a step to keep is damaged" in error_line(result)
    assert f"step-00000{step}" in result.err
    assert (result.code, steps(runs)) == (4, [1, 2, 3, 4])


def test_a_damaged_step_is_not_pruned(run: Run, runs: Path) -> None:
    (runs / "checkpoints" / "tiny" / "step-000001" / "model.safetensors").unlink()
    facts = json.loads(run("checkpoints", "prune", "tiny", "--yes", "--json").out)
    assert [item["step"] for item in facts["removed"]] == [3]
    assert facts["kept_steps"] == steps(runs) == [1, 2, 4]
