"""minigpt train stopped by a signal or a NaN loss, and then resumed."""

import json
import math
import re
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from calls import TINY, Run, proposed

from minigpt.checkpoint.folder import RunFolder
from minigpt.commands.train import stopping
from minigpt.commands.train.display import TrainingDisplay
from minigpt.training.events import EvalEvent, Event, StepEvent
from minigpt.training.trainer import Trainer

Start = Callable[..., "Popen[bytes]"]


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


def press_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Send a signal when a step is shown."""
    show = TrainingDisplay.show

    def show_and_press(display: TrainingDisplay, event: Event) -> None:
        show(display, event)
        if isinstance(event, StepEvent) and event.step == step:
            for _ in range(times):
                signal.raise_signal(number)

    monkeypatch.setattr(TrainingDisplay, "show", show_and_press)


def test_stop_signals_include_those_of_batch_systems() -> None:
    signals = stopping._stop_signals()
    assert {signal.SIGTERM, signal.SIGUSR1} <= set(signals)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_a_checkpoint_and_resuming_gives_the_same_bits(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]
    monkeypatch.setattr(stopping, "_stop_signals", lambda: [number])  # even under nohup
    with monkeypatch.context() as patch:
        press_at(2, number, patch)
        stopped = run("train", "corpus.txt", "--name", "a", *TINY)
    assert stopped.code == 128 + number
    assert RunFolder(Path("checkpoints/a")).steps() == [2]
    [words] = proposed(stopped.err, "resume")
    assert run(*words).code == 0
    weights = "step-000004/model.safetensors"
    straight = (trained / "checkpoints/tiny" / weights).read_bytes()
    assert Path("checkpoints/a", weights).read_bytes() == straight


def test_a_run_stopped_before_its_first_step_is_not_called_fine_tuning(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = TrainingDisplay.start

    def start_and_press(display: TrainingDisplay, trainer: Trainer) -> None:
        start(display, trainer)
        monkeypatch.setattr(Trainer, "_must_stop", lambda trainer: True)

    monkeypatch.setattr(TrainingDisplay, "start", start_and_press)
    result = run("train", "corpus.txt", "--name", "a", *TINY)
    assert RunFolder(Path("checkpoints/a")).steps() == [0]
    assert "(untrained: " in result.err
    assert "fine-tuning" not in result.err


@pytest.mark.integration
def test_the_command_that_resumes_keeps_the_number_of_threads(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    n_threads = torch.get_num_threads()
    try:
        with monkeypatch.context() as patch:
            press_at(2, signal.SIGTERM, patch)
            threads = ["--threads", str(n_threads + 1)]
            stopped = run("train", "corpus.txt", "--name", "a", *TINY, *threads)
        torch.set_num_threads(n_threads)
        [words] = proposed(stopped.err, "resume")
        assert "rounds differently" not in run(*words).err
    finally:
        torch.set_num_threads(n_threads)


def test_the_command_that_resumes_reads_a_validation_text_from_standard_input_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    press_at(2, signal.SIGTERM, monkeypatch)
    words = ["train", "corpus.txt", "--val", "-", "--name", "a", *TINY]
    stopped = run(*words, stdin=b"The queen said: once upon a time.\n" * 20)
    assert stopped.code == 143
    assert stopped.err.rstrip().endswith(" < THE_SAME_TEXT")


@pytest.mark.integration
def test_a_second_ctrl_c_exits_immediately_and_keeps_the_checkpoints(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        press_at(3, signal.SIGINT, patch, times=2)
        result = run("train", "corpus.txt", "--name", "a", *TINY, "--save-every", "2")
    assert result.code == 130
    assert RunFolder(Path("checkpoints/a")).steps() == [2]
    assert run("train", "--resume", "--name", "a").code == 0


def test_a_renamed_run_resumes_under_any_name_of_a_folder(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    Path("checkpoints/a").rename("checkpoints/my ü run")
    assert run("train", "--resume", "--name", "my ü run", "--max-steps", "5").code == 0
    assert RunFolder(Path("checkpoints/my ü run")).steps() == [4, 5]
    assert "is not a folder name" in run("train", "--resume", "--name", "../a").err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_repeated_signal_still_saves_a_checkpoint(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    number = signal.Signals[name]
    monkeypatch.setattr(stopping, "_stop_signals", lambda: [number])  # even under nohup
    press_at(3, number, monkeypatch, times=3)
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 128 + number
    assert RunFolder(Path("checkpoints/a")).steps() == [3]


def metrics(name: str) -> list[dict[str, Any]]:
    text = Path("checkpoints", name, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(name: str) -> list[float]:
    events = map(json.loads, Path(name, "metrics.jsonl").read_text().splitlines())
    return [event["train_loss"] for event in events if "train_loss" in event]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("before", "after"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_resumes_on_another_device(
    run: Run, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    words = [*TINY, "--dtype", "float32", "--device", before]
    assert run("train", "corpus.txt", "--name", "straight", *words).code == 0
    with monkeypatch.context() as patch:
        press_at(2, signal.SIGTERM, patch)
        assert run("train", "corpus.txt", "--name", "a", *words).code == 143
    result = run("train", "--resume", "--name", "a", "--device", after)
    assert result.code == 0
    assert "rounds differently" in result.err
    # float32 sums in another order
    assert losses("checkpoints/a") == pytest.approx(losses("checkpoints/straight"), rel=1e-3)


@pytest.mark.integration
def test_a_moved_run_sees_the_same_windows_and_reports_rounding_differences(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        press_at(2, signal.SIGTERM, patch)
        assert run("train", "corpus.txt", "--name", "a", *TINY).code == 143
    n_threads = torch.get_num_threads()
    torch.set_num_threads(n_threads + 1)
    try:
        result = run("train", "--resume", "--name", "a")
    finally:
        torch.set_num_threads(n_threads)
    assert result.code == 0
    [line] = [line for line in result.err.splitlines() if "rounds differently" in line]
    before, after = line.split("resumed on")
    assert f"threads: {n_threads})" in before
    assert f"threads: {n_threads + 1})" in after
    assert "rounds differently" in line
    # Sums may be split differently, but another window would have a clearly different loss.
    straight = losses(str(trained / "checkpoints/tiny"))
    assert losses("checkpoints/a") == pytest.approx(straight, rel=1e-4)
    assert len({round(loss, 3) for loss in straight}) == len(straight)
    again = run("train", "--resume", "--name", "a", "--max-steps", "5")
    assert "note " in again.err  # the last checkpoint was written with another number of threads


@pytest.mark.integration
def test_ctrl_c_on_a_separate_process_saves_and_prints_how_to_resume(
    run: Run, start: Start
) -> None:
    process = start("train", "corpus.txt", "--name", "a", *TINY, "--max-steps", "100000")
    metrics = Path("checkpoints/a/metrics.jsonl")
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    [step] = RunFolder(Path("checkpoints/a")).steps()
    command = err.decode().splitlines()[-1].split(maxsplit=1)
    assert command[0] == "resume"
    words = shlex.split(command[1])
    assert words[1:3] == ["-m", "minigpt"]  # as the program was called
    assert run(*words[3:], "--max-steps", str(step + 1)).code == 0
    assert Path(f"checkpoints/a/step-{step + 1:06d}").is_dir()


def make_step_nan(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the loss and the gradients of a step to NaN."""
    accumulate = Trainer._accumulate_gradients

    def nan_loss(trainer: Trainer) -> torch.Tensor:
        loss, factor = accumulate(trainer), math.nan if trainer.step + 1 == step else 1
        for parameter in trainer.model.parameters():
            assert parameter.grad is not None
            parameter.grad *= factor
        return loss * factor

    monkeypatch.setattr(Trainer, "_accumulate_gradients", nan_loss)


@pytest.mark.integration
def test_a_nan_is_reported_with_its_step_and_can_be_skipped_on_resume(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_step_nan(3, monkeypatch)
    words = ["--save-every", "1"]
    result = run("train", "corpus.txt", "--name", "a", *TINY, *words)
    assert result.code == 5
    line = result.err.splitlines()[-1]
    assert line.startswith("error: training diverged at step 3: loss nan, gradient norm nan, lr 0.")
    assert "The checkpoint of step 2 is kept. Try a lower --lr, or --on-nan skip" in line
    result = run("train", "--resume", "--name", "a", "--on-nan", "skip")
    assert result.code == 0
    assert re.search(r"\nstep +3  skipped: loss nan, .*  1 so far\n", result.err)
    lines = metrics("a")
    assert [line["step"] for line in lines if line["event"] == "skip"] == [3]
    assert [line["step"] for line in lines if line["event"] == "step"] == [1, 2, 4]


@pytest.mark.integration
def test_a_fine_tuning_run_that_stops_immediately_is_evaluated_once(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(trained / "checkpoints/tiny")
    words = ["train", "corpus.txt", "--from", model, "--name", "a", "--max-steps", "2"]
    words += ["--context-length", "32"]
    show = TrainingDisplay.show
    with monkeypatch.context() as patch:

        def show_and_press(display: TrainingDisplay, event: Event) -> None:
            show(display, event)
            if event.step == 0 and isinstance(event, EvalEvent):
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(TrainingDisplay, "show", show_and_press)
        stopped = run(*words)
    assert stopped.code == 143
    assert "did not lower" not in stopped.err, "nothing was trained yet"
    assert run("train", "--resume", "--name", "a").code == 0
    lines = metrics("a")
    kinds = [(line["event"], line["step"]) for line in lines]
    assert kinds == [("eval", 0), ("save", 0), ("step", 1), ("step", 2), ("eval", 2), ("save", 2)]
