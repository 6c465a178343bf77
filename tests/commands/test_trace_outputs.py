"""Files and streams of a trace, and their state after Ctrl-C or an error."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import ROOT, Run, error_line

TRACE = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "4"]


@pytest.fixture
def place(trained: Path, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with the tiny run and the trace t.jsonl."""
    (workplace / "checkpoints").symlink_to(trained / "checkpoints")
    assert run(*TRACE, "--out", "t.jsonl", "--verify", "1").code == 0
    return workplace


@pytest.mark.integration
def test_every_written_file_is_named_on_stderr(run: Run, place: Path) -> None:
    names = {"out": "o.jsonl", "dense": "d", "html": "h.html", "svg": "s.svg", "png": "p.png"}
    words = [word for name, path in names.items() for word in (f"--{name}", path)]
    result = run(*TRACE, *words)
    assert result.code == 0
    for path in names.values():
        assert f"wrote {path}\n" in result.err
        assert (place / path).stat().st_size


@pytest.mark.integration
def test_a_replay_that_only_writes_files_prints_no_trace(run: Run, place: Path) -> None:
    result = run("attention-trace", "--replay", "t.jsonl", "--svg", "s.svg", "--html", "h.html")
    assert (result.code, result.out) == (0, "")
    assert result.err == "wrote h.html\nwrote s.svg\n"
    lines = run("attention-trace", "--replay", "t.jsonl")
    again = run("attention-trace", "--replay", "t.jsonl", "--svg", "s.svg", "--view", "lines")
    assert again.out == lines.out
    assert run("attention-trace", "--replay", "t.jsonl", "--svg", "s.svg", "--json").out


@pytest.mark.parametrize("more", [[], ["--json"], ["--view", "text"]])
def test_files_are_written_although_the_reader_of_stdout_is_gone(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        result = run(*TRACE, "--out", "o.jsonl", "--html", "h.html", *more)
    assert result.code == 0
    n_lines = len((place / "t.jsonl").read_text().splitlines())
    assert len((place / "o.jsonl").read_text().splitlines()) == n_lines
    assert (place / "h.html").stat().st_size


def broken(monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]) -> None:
    """Make one of the tracer's functions raise an error."""
    from minigpt.tracing import tracer

    def fail(*words: Any, **more: Any) -> None:
        raise error

    monkeypatch.setattr(tracer, where, fail)


def test_ctrl_c_before_the_first_row_keeps_an_existing_file(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "o.jsonl").write_text("old")
    for where in ("RowRecorder", "Decoder"):
        with monkeypatch.context() as patch:
            broken(patch, where, KeyboardInterrupt)
            result = run(*TRACE, "--out", "o.jsonl", "--html", "h.html")
        assert (result.code, result.out, result.err) == (130, "", "interrupted\n")
        assert (place / "o.jsonl").read_text() == "old"
    assert not list(place.glob(".writing*"))


@pytest.mark.integration
def test_an_error_keeps_an_existing_file(run: Run, place: Path) -> None:
    (place / "o.jsonl").write_text("old")
    for words in (["--layers", "9"], ["--heads", "9.9"], ["--sink", "99"], ["--overflow", "slide"]):
        assert run(*TRACE, *words, "--out", "o.jsonl").code == 2
        assert (place / "o.jsonl").read_text() == "old"
    assert run(TRACE[0], "long " * 99, "--out", "o.jsonl").code == 3
    assert (place / "o.jsonl").read_text() == "old"


def test_outputs_may_not_overwrite_files_of_the_traced_model(
    run: Run, place: Path, trained: Path
) -> None:
    model = place / "model"
    shutil.copytree(trained / "checkpoints/tiny/step-000004", model)
    (place / "link").symlink_to(model / "model.safetensors")
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    for words in (
        ["--dense", "model/model.safetensors"],
        ["--out", "link"],
        ["--html", "./model/config.json"],
    ):
        result = run(*TRACE, "--model", "model", *words)
        assert (result.code, result.out) == (2, "")
        assert f"{words[0]}: {str(Path(words[1]))!r} is a file of the model" in error_line(result)
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("position", ["1", "2", "6", "99"])
@pytest.mark.parametrize("rows", [[], ["--prompt-rows"]])
@pytest.mark.parametrize("view", [["--view", "text"], ["--svg", "s.svg", "--picture", "strip"]])
def test_a_position_without_a_row_is_refused_before_the_first_token(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, view: Any, rows: Any, position: str
) -> None:
    from minigpt.commands.attention_trace.files import FileOutput

    shown: list[Any] = []
    show = FileOutput.show_lines

    def counted(self: FileOutput, event: Any) -> None:
        shown.append(event)
        show(self, event)

    monkeypatch.setattr(FileOutput, "show_lines", counted)
    prompt = json.loads((place / "t.jsonl").read_text().splitlines()[0])["prompt"]
    first, last = 1 if rows else len(prompt), len(prompt) + 3
    result = run(*TRACE, *view, *rows, "--position", position)
    if first <= int(position) <= last:
        assert result.code == 0
        return
    assert result.code == 2
    assert f"Choose a position from {first} to {last}." in error_line(result)
    assert shown == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_trace_reports_its_knockouts_and_checks(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    from minigpt.commands.attention_trace import files
    from minigpt.tracing.analysis.reader import read_traces

    shown = []
    real = files.to_json_line

    def press(event: Any) -> str:
        shown.append(event)
        if len(shown) == 4:
            signal.raise_signal(number)
        return real(event)

    monkeypatch.setattr(files, "to_json_line", press)
    result = run(*TRACE, "--verify", "1", "--out", "o.jsonl")
    assert result.code == 128 + number
    assert "interrupted" in result.out
    assert "Checked: " in result.out
    (trace,) = read_traces(place / "o.jsonl")
    footer = trace.footer
    steps = shown[1:-1]
    assert footer.n_tokens == len(steps) == len(trace.steps), (
        "tokens that were ready must be included"
    )
    assert footer.finish is None
    assert footer.cause is not None
    effects = [effect for step in steps for effect in step.effects]
    assert footer.cause.n_sources == sum(effect.control_of is None for effect in effects)
    assert footer.worst_row_sum_error is not None
    assert footer.worst_product_error is not None


@pytest.mark.parametrize("name", ["html", "svg", "out", "dense"])
def test_an_unwritable_folder_is_reported_before_the_first_token(
    run: Run, place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "locked").mkdir()
    touch = Path.touch

    def refuse(path: Path) -> None:  # root can write anywhere, so the error is injected
        if path.parent.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        touch(path)

    monkeypatch.setattr(Path, "touch", refuse)
    broken(monkeypatch, "RowRecorder", AssertionError)
    result = run(*TRACE, f"--{name}", "locked/t.svg")
    assert result.code == 6
    line = error_line(result)
    assert "'locked/t.svg': Permission denied" in line
    assert "space" not in line


@pytest.mark.parametrize(
    "words",
    [
        ["--out", "k.jsonl", "--html", "k.jsonl"],
        ["--out", "k.jsonl", "--dense", "./k.jsonl"],
        ["--replay", "k.jsonl", "--html", "k.jsonl"],
    ],
)
def test_using_the_same_file_for_two_outputs_is_refused(
    run: Run, trained: Path, words: list[str]
) -> None:
    model = [] if "--replay" in words else ["The", "--model", str(trained / "checkpoints/tiny")]
    made = run("attention-trace", "The", "--model", str(trained / "checkpoints/tiny"), "--out", "k")
    assert made.code == 0, made.err
    Path("k").rename("k.jsonl")
    before = Path("k.jsonl").read_bytes()
    result = run("attention-trace", *model, *words)
    assert result.code == 2
    assert "name the same file" in result.err
    assert Path("k.jsonl").read_bytes() == before


def test_a_trace_written_to_dev_stdout_is_json_lines(run: Run, place: Path) -> None:
    assert run(*TRACE, "--seed", "1", "--out", "t.jsonl").code == 0
    result = run(*TRACE, "--seed", "1", "--out", "/dev/stdout")  # a pipe or a file
    assert result.code == 0
    lines, expected = result.out.splitlines(), Path("t.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert lines[1:-1] == expected[1:-1]  # without header and footer, which contain times
    for other in (["--json"], ["--view", "text"]):
        refused = run(*TRACE, "--out", "/dev/stdout", *other)
        assert refused.code == 2
        assert "'/dev/stdout' is standard output" in error_line(refused)


@pytest.mark.parametrize("words", ["--svg a.png", "--png b.SVG"])
def test_a_picture_file_name_must_match_its_format(run: Run, place: Path, words: str) -> None:
    result = run(*TRACE, *words.split())
    assert (result.code, result.out) == (2, "")
    assert f"Give --{words[-3:].lower()}, or another name" in error_line(result)
    assert not Path(words.split()[1]).exists()


@pytest.mark.parametrize("name", ["out", "dense", "html", "svg"])
def test_a_dash_is_refused_as_an_output_file(run: Run, place: Path, name: str) -> None:
    result = run(*TRACE, f"--{name}", "-")
    assert result.code == 2
    assert "Standard output is /dev/stdout" in error_line(result)
    assert not Path("-").exists()


@pytest.mark.integration
def test_a_trace_written_to_dev_stdout_in_a_pipe_is_json_lines(place: Path) -> None:
    words = [sys.executable, "-m", "minigpt", *TRACE, "--out", "/dev/stdout"]
    result = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()]
