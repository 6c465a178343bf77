"""minigpt plot: loss curves as text, as a picture and as JSON."""

import json
import re
import shutil
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calls import Run, error_line

from minigpt.commands.plot.chart import y_limits

HEAD = "run steps training validation bits/byte at step"
HOSTILE = "_e\x1b[31m$x^$<b>"


@pytest.fixture(autouse=True)
def runs(trained: Path, workplace: Path) -> Path:
    """Return checkpoints/ with two copies of the tiny run of 4 steps, without weights."""
    for name in ("tiny", "other"):
        folder = workplace / "checkpoints" / name
        folder.mkdir(parents=True)
        for file in ("metrics.jsonl", "config.toml"):
            shutil.copy(trained / "checkpoints/tiny" / file, folder)
    return workplace / "checkpoints"


def events(runs: Path, kind: str) -> list[dict[str, float]]:
    lines = (runs / "tiny/metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def test_the_table_lists_each_run_with_its_losses(run: Run, runs: Path) -> None:
    result = run("plot", "tiny", "other")
    assert (result.code, result.err) == (0, "")
    assert all(len(line) <= 100 for line in result.out.splitlines())
    assert "\x1b" not in result.out
    step, evaluation = events(runs, "step")[-1], events(runs, "eval")[-1]
    rows = result.out.splitlines()[-3:]
    assert " ".join(rows[0].split()) == HEAD
    for row, mark, name in zip(rows[1:], "●■", ["tiny", "other"], strict=True):
        assert row.split() == [
            mark,
            name,
            "4",
            f"{step['train_loss']:.4f}",
            f"{evaluation['val_loss']:.4f}",
            f"{evaluation['bits_per_byte']:.4f}",
            "4",
        ]
    chart = result.out.partition("└")[0]
    assert chart.count("■") == len(events(runs, "eval"))
    assert re.search("[\u2801-\u28ff]", chart)


@pytest.mark.parametrize(("width", "columns"), [(40, "run steps validation at step"), (60, HEAD)])
def test_title_and_table_fit_a_narrow_terminal(
    width: int, columns: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minigpt.console._PIPE_WIDTH", width)
    lines = run("plot", "tiny", "other").out.splitlines()
    assert max(map(len, lines)) <= width
    title = "nats/token: a line for training batches, marks for the validation text"
    assert " ".join(lines[:2]) == title
    assert " ".join(lines[-3].split()) == columns
    assert lines[-1].split()[-1] == "4"


def test_the_steps_of_a_run_include_those_before_its_last_evaluation(run: Run, runs: Path) -> None:
    event = events(runs, "eval")[-1] | {"step": 7, "val_loss": 1.0}
    with (runs / "tiny/metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    row = run("plot", "tiny").out.splitlines()[-1].split()
    assert (row[2], row[-1]) == ("7", "7")


def test_the_default_is_the_newest_run(run: Run, runs: Path) -> None:
    (runs / "tiny/metrics.jsonl").touch()
    assert run("plot").out == run("plot", "checkpoints/tiny").out
    assert "● tiny" in run("plot").out


@pytest.mark.parametrize("axis", ["steps", "tokens", "seconds"])
def test_the_x_axis_has_the_requested_unit(run: Run, runs: Path, axis: str) -> None:
    result = run("plot", "tiny", "--x", axis)
    (line,) = re.findall(rf"(?m)^ +0[.0]* .* {axis}$", result.out)
    ends = {"steps": 4, "tokens": 4 * 2 * 64, "seconds": events(runs, "step")[-1]["elapsed_s"]}
    assert float(line.split()[-2]) <= ends[axis]
    assert float(line.split()[-2]) >= ends[axis] / 2


def test_json_has_every_point_of_each_run(run: Run, runs: Path) -> None:
    result = run("plot", "tiny", "other", "--json")
    assert (result.code, result.err) == (0, "")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["run"] for record in records] == ["checkpoints/tiny", "checkpoints/other"]
    for record in records:
        assert record["tokenizer"] == "bytes"
        assert record["train"] == [
            {
                "steps": event["step"],
                "tokens": event["step"] * 2 * 64,
                "seconds": event["elapsed_s"],
                "loss": event["train_loss"],
            }
            for event in events(runs, "step")
        ]
        assert [point["bits_per_byte"] for point in record["val"]] == [
            event["bits_per_byte"] for event in events(runs, "eval")
        ]


@pytest.mark.integration
def test_an_svg_has_the_points_and_the_literal_names(run: Run, runs: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    (runs / "other").rename(runs / HOSTILE)
    result = run("plot", "tiny", HOSTILE, "--out", "losses.svg")
    assert (result.code, result.out, result.err) == (0, "", "wrote losses.svg\n")
    first = Path("losses.svg").read_bytes()
    picture = ElementTree.fromstring(first)
    texts = [element.text for element in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"tiny", r"_e\x1b[31m$x^$<b>", "steps"} <= set(texts)
    marks = [e for e in picture.iter("{http://www.w3.org/2000/svg}use") if "y" in e.attrib]
    assert len(marks) > 2 * len(events(runs, "eval"))
    assert run("plot", "tiny", HOSTILE, "--out", "losses.svg").code == 0
    assert Path("losses.svg").read_bytes() == first, "equal curves must give equal bytes"


@pytest.mark.integration
def test_a_png_shows_losses_falling_from_the_upper_left_to_the_lower_right(
    run: Run, runs: Path
) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    from matplotlib.image import imread

    lines = [
        {"event": "step", "step": i, "train_loss": 5 - i / 10, "elapsed_s": i} for i in range(41)
    ]
    (runs / "tiny/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("plot", "tiny", "--out", "losses.png").code == 0
    pixels = imread("losses.png")[:, :, :3]
    is_blue = (pixels[:, :, 2] - pixels[:, :, 0]) > 0.15
    rows, columns = is_blue.nonzero()
    assert rows[columns.argmin()] < 0.25 * len(pixels), "the curve must start high"
    assert rows[columns == columns.max()].max() > 0.75 * len(pixels), "the curve must end low"
    assert y_limits([[(line["step"], line["train_loss"]) for line in lines]])[0] == 1.0


def test_a_missing_matplotlib_is_reported_with_the_extra_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("plot", "tiny", "--out", "losses.png")
    assert result.code == 2
    assert "pip install 'minigpt-attention[plot]'" in error_line(result)
    assert run("plot", "tiny").code == 0, "the text chart does not need matplotlib"


@pytest.mark.integration
def test_matplotlib_settings_of_the_user_do_not_change_a_picture(run: Run, runs: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs pip install '.[plot]'")
    assert run("plot", "tiny", "--out", "ours.svg").code == 0
    with matplotlib.rc_context({"text.usetex": True, "font.size": 30, "axes.facecolor": "red"}):
        assert run("plot", "tiny", "--out", "theirs.svg").code == 0
    assert Path("ours.svg").read_bytes() == Path("theirs.svg").read_bytes()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["tiny", "--out", "losses.pdf"], 2, ".png or .svg"),
        (["tiny", "--x", "hours"], 2, "steps, tokens, seconds"),
        (["tinny"], 4, "Did you mean tiny?"),
        (["empty"], 4, "'empty' has no losses yet"),
        (["bare", "--x", "tokens"], 2, "Use --x steps"),
        (["tiny", "--out", "nowhere/losses.svg"], 2, "no folder 'nowhere'"),
    ],
)
def test_plot_errors_are_one_line(
    run: Run, runs: Path, words: list[str], code: int, message: str
) -> None:
    (runs / "empty").mkdir()
    (runs / "empty/metrics.jsonl").touch()
    (runs / "bare").mkdir()
    shutil.copy(runs / "tiny/metrics.jsonl", runs / "bare")
    if "--out" in words:
        pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    result = run("plot", *words)
    assert result.code == code, result.err
    assert message in error_line(result)


def test_a_running_run_is_plotted_up_to_now(run: Run, runs: Path) -> None:
    path = runs / "tiny/metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:2]) + whole[2][:20])
    (record,) = (json.loads(line) for line in run("plot", "tiny", "--json").out.splitlines())
    assert [point["steps"] for point in record["train"]] == [1, 2]
    assert run("plot", "tiny").code == 0


def test_plotting_runs_with_different_tokenizers_prints_a_note(run: Run, runs: Path) -> None:
    config = runs / "other/config.toml"
    config.write_text(config.read_text().replace('"bytes"', '"bpe:257"'))
    result = run("plot", "tiny", "other")
    assert result.code == 0
    assert "different tokenizers" in result.err
    assert "different tokenizers" not in result.out
    config = runs / "tiny/config.toml"  # a run, and one that was fine-tuned from it
    config.write_text(config.read_text().replace('"bytes"', '"bpe"'))
    assert "different tokenizers" not in run("plot", "tiny", "other").err


def test_an_ascii_stdout_gets_an_ascii_chart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(out, encoding="ascii"))
    result = run("plot", "tiny", "other")
    assert (result.code, result.err) == (0, "")
    text = out.getvalue().decode("ascii")
    assert "\\u" not in text
    assert "# other" in text


@pytest.mark.parametrize("spec", ["tiny", "checkpoints/tiny"])
@pytest.mark.parametrize("kind", ["a folder", "a link to nothing", "a pointer"])
def test_unreadable_metrics_are_reported_with_the_reason(
    kind: str, spec: str, run: Run, runs: Path
) -> None:
    path = runs / "tiny/metrics.jsonl"
    path.unlink()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a link to nothing":
        path.symlink_to("nowhere")
    else:
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    result = run("plot", spec)
    said = {"a folder": "it is a folder", "a pointer": "it is a Git LFS"}.get(kind, "No such file")
    line = error_line(result)
    assert result.code == 4
    assert line.startswith(f"'checkpoints/tiny/metrics.jsonl' cannot be read: {said}")
    assert "Did you mean" not in line
