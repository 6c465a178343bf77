"""minigpt train: its output and files, how it stops, and how it resumes."""

import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest
import torch
from calls import TINY, Run, error_line

from minigpt.checkpoint.folder import RunFolder
from minigpt.commands.train import stopping
from minigpt.commands.train.display import TrainingDisplay
from minigpt.presets import PRESETS
from minigpt.settings import read_toml
from minigpt.training.events import EvalEvent, Event, StepEvent
from minigpt.training.trainer import Trainer

Start = Callable[..., "Popen[bytes]"]


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


def proposed(err: str, label: str) -> list[list[str]]:
    """Return the commands below a label at the end of stderr, as words after the program's."""
    lines = err[err.index(f"\n{label}") + 1 :].splitlines()
    commands = [shlex.split(line[7:]) for line in lines]
    assert all(command[0].endswith("minigpt") for command in commands), commands
    return [command[1:] for command in commands]


def test_the_last_lines_name_the_checkpoint_its_loss_and_next_commands(run: Run) -> None:
    result = run("train", "corpus.txt", "--name", "my-run", *TINY)
    assert (result.code, result.out) == (0, "")
    best = json.loads(Path("checkpoints/my-run/best.json").read_text())
    said = re.search(
        r"\nbest +(\S+): val loss ([\d.]+) nats/token, ([\d.]+) bits/byte\n", result.err
    )
    assert said
    assert Path(said[1], "model.safetensors").is_file()
    assert float(said[2]) == pytest.approx(best["val_loss"], abs=5e-5)
    assert float(said[3]) == pytest.approx(best["bits_per_byte"], abs=5e-5)
    commands = proposed(result.err, "next")
    assert [words[0] for words in commands] == ["generate", "attention-trace"]
    for words in commands:
        assert run(*words).code == 0


def test_a_preset_adapts_to_the_requested_heads_and_layout(run: Run) -> None:
    nano = PRESETS["nano"]["model"]
    assert nano["n_kv_head"] % 3, "three heads must not fit by themselves"
    short = ["--max-steps", "1", "--context-length", "64", "--n-layer", "1", "--batch-size", "1"]
    for name, words in (
        ("heads", ["--n-head", "3"]),
        ("wide", ["--d-model", "24", "--n-head", "2"]),
        ("gpt2", ["--family", "gpt2"]),
    ):
        assert run("train", "corpus.txt", "--name", name, *short, *words).code == 0
    made = {
        name: read_toml(Path("checkpoints", name, "config.toml"))["model"]
        for name in ("heads", "wide", "gpt2")
    }
    assert (made["heads"]["n_head"], made["heads"]["n_kv_head"]) == (3, 1)
    assert made["wide"]["d_mlp"] == 64  # Llama's 8/3 of the width, not the preset's
    assert (made["gpt2"]["n_kv_head"], made["gpt2"]["d_mlp"]) == (6, 4 * nano["d_model"])


def test_the_model_card_keeps_the_command_that_started_the_run(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "carded", *TINY).code == 0
    words = shlex.join(["train", "corpus.txt", "--name", "carded", *TINY])
    first = Path("checkpoints/carded/step-000004/README.md").read_text()
    assert words in first
    assert run("train", "--resume", "--name", "carded", "--max-steps", "6").code == 0
    second = Path("checkpoints/carded/step-000006/README.md").read_text()
    assert words in second
    best = json.loads(Path("checkpoints/carded/latest.json").read_text())
    assert f"Validation loss: {best['val_loss']:.4f} nats/token" in second
    assert "Steps: 6," in second


def test_a_file_name_that_is_not_utf_8_is_accepted(run: Run) -> None:
    name = os.fsdecode(b"\xff.txt")
    shutil.copy("corpus.txt", name)
    assert run("train", name, *TINY).code == 0
    [card] = Path("checkpoints").glob("*/step-000004/README.md")
    assert card.read_text(encoding="utf-8").isascii()


def test_proposed_commands_fit_a_short_context(run: Run) -> None:
    result = run("train", "corpus.txt", *TINY, "--context-length", "8")
    assert result.code == 0
    assert all(run(*words).code == 0 for words in proposed(result.err, "next"))


def test_a_pipe_gets_the_facts_without_control_bytes(run: Run) -> None:
    err = run("train", "corpus.txt", "--sample-every", "2", *TINY).err
    assert all(line.isprintable() for line in err.split("\n"))
    assert err.count("sample") == 2
    for fact in ("2,971 tokens (bytes)", "2 layers, 2 heads, width 16", "4 steps on cpu", "4/4"):
        assert fact in err


def test_settings_win_in_the_order_preset_file_option_set(run: Run) -> None:
    Path("a.toml").write_text("[training]\nlr = 0.5\nbeta1 = 0.5\nbeta2 = 0.5\nseed = 5\n")
    words = ["--config", "a.toml", "--lr", "0.25", "--set", "training.beta1=0.125"]
    assert run("train", "corpus.txt", "--name", "a", *TINY, *words).code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    momentum = PRESETS["nano"]["training"]["momentum"]
    assert (training["momentum"], training["seed"]) == (momentum, 5)
    assert (training["lr"], training["beta1"], training["beta2"]) == (0.25, 0.125, 0.5)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs /dev/fd")
def test_a_config_file_can_be_a_pipe(run: Run) -> None:
    """As in --config <(command): a pipe can be read only once."""
    reader, writer = os.pipe()
    os.write(writer, b"[training]\nseed = 5\n")
    os.close(writer)
    words = ["--config", f"/dev/fd/{reader}", *TINY]
    assert run("train", "corpus.txt", "--name", "a", *words).code == 0
    os.close(reader)
    assert read_toml(Path("checkpoints/a/config.toml"))["training"]["seed"] == 5


def test_a_run_can_be_repeated_from_its_own_config(run: Run, trained: Path) -> None:
    config = trained / "checkpoints/tiny/config.toml"
    assert run("train", "--config", str(config), "--name", "again").code == 0
    weights = "step-000004/model.safetensors"
    before = (trained / "checkpoints/tiny" / weights).read_bytes()
    assert Path("checkpoints/again", weights).read_bytes() == before


def test_a_preset_adapts_to_the_batch_and_context_of_the_user(run: Run) -> None:
    words = ["--context-length", "40", "--batch-size", "6", "--tokenizer", "bytes"]
    result = run("train", "corpus.txt", "--preset", "small", "--name", "a", *TINY, *words)
    assert result.code == 0, result.err
    assert read_toml(Path("checkpoints/a/config.toml"))["training"]["micro_batch_size"] == 2
    assert run("train", "corpus.txt", "--name", "b", *TINY, *words).code == 0


def test_one_limit_replaces_the_other(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY, "--max-steps", "3").code == 0
    result = run("train", "--resume", "--name", "a", "--max-minutes", "0.0001")
    assert result.code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (training["max_steps"], training["max_minutes"]) == (0, 0.0001)


def test_derived_names_contain_text_and_preset_and_never_collide(run: Run) -> None:
    Path("odd name;$(x).v2.txt").write_text(Path("corpus.txt").read_text())
    words = ["train", "odd name;$(x).v2.txt", *TINY, "--max-steps", "1"]
    assert run(*words).code == run(*words).code == 0
    assert {path.name for path in Path("checkpoints").iterdir()} == {
        "odd-name-x-nano",
        "odd-name-x-nano-2",
    }


def test_without_a_text_the_tales_are_trained_on(run: Run) -> None:
    assert run("train", *TINY).code == 0
    config = read_toml(Path("checkpoints/tales-nano/config.toml"))
    assert config["data"]["paths"] == ["builtin:tales"]
    assert config["data"]["val_split"] == "documents"
    assert run("train", "--resume", "--max-steps", "5").code == 0
    for name in ("builtin", "builtin:tales"):  # the same text by another name
        assert run("train", name, "--resume", "--max-steps", "5").code == 0
    evaluated = run("evaluate")
    assert evaluated.code == 0
    assert "text builtin:tales: the run's own" in evaluated.err


def test_a_run_that_is_older_than_the_tales_resumes_with_the_prose_of_python(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path))
    prose = tmp_path / f"builtin-1-python-{platform.python_version()}.jsonl"
    prose.write_text(json.dumps({"text": "Return the path of a file.\n" * 90}))
    assert run("train", "builtin:python", *TINY).code == 0
    config = Path("checkpoints/python-nano/config.toml")
    text = config.read_text()
    older = re.sub(r'paths = \[\s*"builtin:python",\s*\]', "paths = []", text)
    assert older != text
    config.write_text(older)
    assert run("train", "--resume", "--max-steps", "5").code == 0
    assert "text builtin:python: the run's own" in run("evaluate").err
    result = run("train", "builtin:tales", "--resume", "--max-steps", "6")
    assert "the corpus is not the one that this run started with" in error_line(result)


def test_text_on_standard_input_is_trained_on_and_resumed_with(run: Run) -> None:
    text = Path("corpus.txt").read_bytes()
    assert run("train", "-", *TINY, stdin=text).code == 0
    assert Path("checkpoints/stdin-nano/step-000004").is_dir()
    assert run("train", "--resume", "--max-steps", "5", stdin=text).code == 0
    assert Path("checkpoints/stdin-nano/step-000005").is_dir()


def test_a_budget_can_be_raised_and_a_moved_text_named_anew(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    Path("corpus.txt").rename("moved.txt")
    words = ["--max-steps", "6", "--eval-every", "1", "--save-every", "5", "--lr", "0.001"]
    result = run("train", "moved.txt", "--resume", *words)
    assert result.code == 0
    assert "from step 4 on" in result.err
    assert RunFolder(Path("checkpoints/a")).steps() == [4, 5, 6]


def test_resuming_a_complete_run_changes_nothing(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    weights = Path("checkpoints/a/step-000004/model.safetensors")
    before = weights.read_bytes(), weights.stat().st_mtime_ns
    result = run("train", "--resume", "--name", "a")
    assert result.code == 0
    assert "already complete" in result.err
    assert before == (weights.read_bytes(), weights.stat().st_mtime_ns)


def press_at(step: int, number: int, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Let a signal come when a step is shown."""
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


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_saves_and_the_resumed_run_equals_an_uninterrupted_one(
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


def test_a_second_ctrl_c_exits_immediately_and_keeps_the_checkpoints(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        press_at(3, signal.SIGINT, patch, times=2)
        result = run("train", "corpus.txt", "--name", "a", *TINY, "--save-every", "2")
    assert result.code == 130
    assert RunFolder(Path("checkpoints/a")).steps() == [2]
    assert run("train", "--resume", "--name", "a").code == 0


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
    # float32, in another order of sums.
    assert losses("checkpoints/a") == pytest.approx(losses("checkpoints/straight"), rel=1e-3)


def test_a_moved_run_continues_with_the_same_windows_and_notes_the_rounding(
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
    # Sums in other parts, if at all; another window's loss is another number.
    straight = losses(str(trained / "checkpoints/tiny"))
    assert losses("checkpoints/a") == pytest.approx(straight, rel=1e-4)
    assert len({round(loss, 3) for loss in straight}) == len(straight)
    again = run("train", "--resume", "--name", "a", "--max-steps", "5")
    assert "note " in again.err  # the last checkpoint is of other threads


def test_a_closed_stderr_does_not_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    assert RunFolder(Path("checkpoints/a")).steps() == [4]


def test_ctrl_c_on_a_real_process_saves_and_prints_how_to_resume(run: Run, start: Start) -> None:
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
    assert words[1:3] == ["-m", "minigpt"]  # as it was called
    assert run(*words[3:], "--max-steps", str(step + 1)).code == 0
    assert Path(f"checkpoints/a/step-{step + 1:06d}").is_dir()


def plan_lines(out: str) -> dict[str, str]:
    return {line[:19].strip(): line[19:].strip() for line in out.splitlines()}


def test_a_dry_run_prints_the_plan_and_leaves_nothing(run: Run) -> None:
    words = ["train", "corpus.txt", "--name", "a", *TINY, "--dry-run"]
    result = run(*words)
    assert (result.code, result.err) == (0, "")
    assert not Path("checkpoints").exists()
    assert all(len(line) <= 80 for line in result.out.splitlines())
    facts = json.loads(run(*words, "--json").out)
    assert not Path("checkpoints").exists()
    assert run(*words[:-1]).code == 0
    weights = Path("checkpoints/a/step-000004/model.safetensors").stat().st_size
    assert 4 * facts["n_parameters"] == pytest.approx(weights, rel=0.2)  # and a header
    assert (facts["max_steps"], facts["step_tokens"]) == (4, 2 * 64)
    assert facts["n_train_tokens"] + facts["n_val_tokens"] == 2971
    assert facts["memory"]["total"] > 16 * facts["n_parameters"] > 0
    assert facts["peak_flops"] is facts["mfu"] is None
    assert facts["training_s"] > 0
    shown = plan_lines(result.out)
    assert shown["parameters"].split()[0] == f"{facts['n_parameters']:,}"
    assert shown["steps"].split()[:2] == ["4", "4"]
    assert "MFU unknown" in shown["device"]


def test_a_dry_run_says_whether_the_run_is_compiled(run: Run) -> None:
    words = ["train", "corpus.txt", *TINY, "--set", "training.max_epochs=0", "--dry-run"]
    long = [*words, "--set", "training.max_steps=100000000"]
    for call, expected in (
        (words, ""),
        (long, "uncompiled, unlike the run (--no-compile)"),
        ([*long, "--no-compile"], ""),
        ([*words, "--compile"], "uncompiled, unlike the run"),
    ):
        result = run(*call)
        assert (result.code, result.err) == (0, "")
        assert all(len(line) <= 80 for line in result.out.splitlines())
        assert plan_lines(result.out)["a step"].partition("ms")[2].strip() == expected
        assert json.loads(run(*call, "--json").out)["is_compiled"] is bool(expected)


def test_a_dry_run_of_a_resumed_run_plans_what_is_left(run: Run, trained: Path) -> None:
    shutil.copytree(trained / "checkpoints", "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in Path("checkpoints").rglob("*")}
    words = ["--resume", "--name", "tiny", "--max-steps", "10", "--dry-run", "--json"]
    result = run("train", *words)
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    assert (facts["max_steps"], facts["n_steps_left"]) == (10, 6)
    assert {path: path.stat().st_mtime_ns for path in Path("checkpoints").rglob("*")} == before


def test_json_without_a_dry_run_is_refused(run: Run) -> None:
    result = run("train", "corpus.txt", *TINY, "--json")
    assert "--json is for --dry-run" in error_line(result)
    assert result.code == 2


def test_epochs_become_steps_and_resume_as_steps(run: Run) -> None:
    n_train = int(2971 * 0.9)
    at = TINY.index("--max-steps")
    words = ["train", "corpus.txt", "--name", "a", *TINY[:at], *TINY[at + 2 :]]
    result = run(*words, "--max-epochs", "0.2")
    assert result.code == 0
    n_steps = -(-n_train // 5 // 128)
    assert f"{n_steps} steps (0.2 epochs)" in result.err
    config = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (config["max_epochs"], config["max_steps"]) == (0.2, n_steps)
    assert "already complete" in run("train", "--resume").err
    assert run("train", "--resume", "--max-epochs", "0.3").code == 0
    last = RunFolder(Path("checkpoints/a")).steps()[-1]
    assert last == -(-n_train * 3 // 10 // 128)
    assert run("train", "--resume", "--max-steps", str(last + 1)).code == 0
    config = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (config["max_epochs"], config["max_steps"]) == (0, last + 1)


def spoil_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss of a step be no number."""
    loss = Trainer._loss

    def spoilt(trainer: Trainer, *batch: torch.Tensor) -> torch.Tensor:
        return loss(trainer, *batch) * (math.nan if trainer.step + 1 == step else 1)

    monkeypatch.setattr(Trainer, "_loss", spoilt)


def test_a_nan_is_reported_with_its_step_and_can_be_skipped_on_resume(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_step(3, monkeypatch)
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


def test_a_model_larger_than_memory_is_refused_before_it_is_created(run: Run) -> None:
    size = ["--n-layer", "4096", "--d-model", "65536", "--n-head", "64"]
    result = run("train", "no-such-text.txt", *size)
    assert result.code == 6
    line = error_line(result)
    assert "training needs at least" in line
    assert "Use a smaller model" in line
    assert not Path("checkpoints").exists()


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
        assert run(*words).code == 143
    assert run("train", "--resume", "--name", "a").code == 0
    lines = metrics("a")
    kinds = [(line["event"], line["step"]) for line in lines]
    assert kinds == [("eval", 0), ("save", 0), ("step", 1), ("step", 2), ("eval", 2), ("save", 2)]


def test_another_score_works_from_the_option_to_the_trace(run: Run, trained: Path) -> None:
    words = ["train", str(trained / "corpus.txt"), "--name", "other", *TINY]
    plan = json.loads(run(*words, "--attention", "additive", "--dry-run", "--json").out)
    assert plan["parameters"]["attention"] == 2 * (4 * 16 * 16 + 2 * 8 + 2 * 8 * (8 + 8 + 1))
    assert run(*words, "--attention", "additive", "--max-steps", "2").code == 0
    assert 'attention = "additive"' in Path("checkpoints/other/config.toml").read_text()
    error = error_line(run("train", "--resume", "--attention", "dot"))
    assert "--resume cannot change model.attention: it is 'additive' in this run" in error
    assert run("train", "--resume", "--max-steps", "3").code == 0
    ending = ["The king", "--temperature", "0", "--max-new-tokens", "5", "--json"]
    generated = json.loads(run("generate", *ending).out)
    header, *steps, footer = map(json.loads, run("attention-trace", *ending).out.splitlines())
    assert "".join(step["certain_text"] for step in steps) == generated["text"]
    assert header["n_layer"] == 2
    assert footer["worst_row_sum_error"] < 1e-5
    error = error_line(run("generate", "The king", "--compile"))
    assert "this model is a GPT with additive on cpu. Use --no-compile" in error
    card = Path("checkpoints/other/step-000003/README.md").read_text()
    assert "only minigpt reads this folder" in card
    assert "library_name: minigpt" in card
    assert "AutoModelForCausalLM" not in card
    shown = run("checkpoints", "show", "other").out
    assert "additive, 2 heads of 8" in shown


@pytest.mark.parametrize("arch", ["lstm", "lstm-attention"])
def test_an_lstm_works_from_the_option_to_the_generated_text(
    run: Run, trained: Path, arch: str
) -> None:
    tiny = " ".join(TINY).replace("--n-head 2 ", "").replace("--set model.d_mlp=16 ", "").split()
    words = ["train", str(trained / "corpus.txt"), "--name", "other", *tiny, "--arch", arch]
    plan = json.loads(run(*words, "--dry-run", "--json").out)
    assert plan["parameters"]["LSTM"] == 2 * (2 * 4 * 16 * 16 + 2 * 4 * 16)
    assert run(*words, "--max-steps", "2").code == 0
    assert f'arch = "{arch}"' in Path("checkpoints/other/config.toml").read_text()
    assert run("train", "--resume", "--max-steps", "3").code == 0
    words = ["The king", "--temperature", "0", "--max-new-tokens", "5"]
    assert len(json.loads(run("generate", *words, "--json").out)["text"]) > 0
    assert f"minigpt, {arch}" in run("checkpoints", "show", "other").out
    trace = run("attention-trace", *words)
    if arch == "lstm":
        assert "a model of arch lstm has no attention to show" in error_line(trace)
    else:
        assert trace.code == 0
    assert arch in Path("checkpoints/other/step-000003/README.md").read_text()
    error = error_line(run("train", "--arch", arch, "--n-head", "2"))
    assert "n_head can only be 1: it is 2. Leave it out" in error
