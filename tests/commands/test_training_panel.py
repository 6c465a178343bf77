"""The live panel of a training run: it fits any terminal and is cheap to draw."""

import io
import re
import statistics

import pytest
from rich.console import Console
from screens import Screen

from minigpt.commands.display.progress import FREE_CELLS, StatusLine
from minigpt.commands.train.display import TrainingDisplay
from minigpt.commands.train.panel import TRAIN_LOSS, VAL_LOSS, ThinnedCurve, TrainingPanel
from minigpt.training.events import EvalEvent, StepEvent

NUMBERS = {
    TRAIN_LOSS: "10.234",
    VAL_LOSS: "10.345",
    "bits/byte": "14.765",
    "lr": "1.0e-02",
    "grad norm": "12.34",
    "tokens/s": "1.23M",
    "MFU": "41%",
}


def step_event(step: int, loss: float) -> StepEvent:
    return StepEvent(
        step=step,
        progress=0.5,
        train_loss=loss,
        lr=0.01,
        grad_norm=12.34,
        tokens_per_s=1.23e6,
        mfu=0.41,
        elapsed_s=1.0,
        remaining_s=599.0,
    )


def panel() -> TrainingPanel:
    line = StatusLine()
    line.label, line.share, line.details = "train", 0.5, ["500/1000", "loss 10.234", "9:59 left"]
    shown = TrainingPanel(line)
    for step in range(1, 51):
        shown.train.add(step, 1 + 9 / step)
    shown.show_evaluation(EvalEvent(25, 10.345, 14.765, 1000, 1.0, 1.0))
    shown.show_step(step_event(51, 10.234), ["500/1000", "9:59 left"])
    return shown


def drawn(shown: TrainingPanel, width: int, height: int, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, legacy_windows=False)
    lines = console.render_lines(shown, console.options, pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_panel_leaves_space_for_key_echo_and_earlier_lines(encoding: str) -> None:
    for width in (20, 40, 60, 80, 100, 140, 300):
        for height in (5, 12, 20, 24, 60):
            lines = drawn(panel(), width, height, encoding)
            assert all(len(line) <= width - FREE_CELLS for line in lines)
            assert len(lines) == 1 or len(lines) <= 0.6 * height
            "".join(lines).encode(encoding)


def test_the_panel_shows_the_curve_its_marks_and_every_number_in_80_columns() -> None:
    lines = drawn(panel(), 80, 24)
    assert any("\u2801" <= character <= "\u28ff" for character in "".join(lines))
    assert sum("●" in line for line in lines) == 2, (
        "the mark must be in the chart and in the legend"
    )
    heads, numbers, bar = lines[-3:]
    ends = [heads.index(head) + len(head) for head in NUMBERS]
    assert [numbers[:end].split()[-1] for end in ends] == list(NUMBERS.values())
    assert bar.startswith("train ━")
    assert bar.endswith("500/1000  9:59 left")


def test_small_terminals_and_new_runs_show_only_the_status_line() -> None:
    for width, height in ((60, 24), (80, 12)):
        (line,) = drawn(panel(), width, height)
        assert line.endswith("500/1000  loss 10.234  9:59 left")
    empty = TrainingPanel(panel().line)
    assert len(drawn(empty, 80, 24)) == 1


def test_new_numbers_are_drawn_immediately() -> None:
    shown = panel()
    before = drawn(shown, 80, 24)
    assert drawn(shown, 80, 24) == before
    shown.show_step(step_event(52, 9.0), ["501/1000", "9:58 left"])
    after = drawn(shown, 80, 24)
    assert after[:-3] != before[:-3]
    assert after[-1].endswith("501/1000  9:58 left")
    # A new validation loss is in the table immediately, not at the next step.
    shown.show_evaluation(EvalEvent(52, 8.765, 12.345, 1000, 1.0, 1.0))
    numbers = drawn(shown, 80, 24)[-2].split()
    assert numbers[:3] == ["9.000", "8.765", "12.345"]


@pytest.mark.parametrize("n", [1, 199, 200, 201, 1000, 12_345])
def test_a_long_curve_is_thinned_but_keeps_its_shape(n: int) -> None:
    curve = ThinnedCurve()
    for x in range(1, n + 1):
        curve.add(x, 3.0 * x)
    assert min(n, 100) <= len(curve.points) <= 200
    assert all(y == pytest.approx(3 * x) for x, y in curve.points)
    assert curve.points == sorted(curve.points)
    n_each = (curve.points[-1][0] - curve.points[0][0]) / max(len(curve.points) - 1, 1)
    assert curve.points[0][0] == pytest.approx((n_each + 1) / 2, abs=0.51)
    assert n - curve.points[-1][0] < 1.5 * n_each + 1
    xs = [x for x, _ in curve.points]
    assert statistics.mean(xs) == pytest.approx((n + 1) / 2, abs=n_each)


def test_facts_wrap_with_an_indent_and_commands_are_not_broken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = "minigpt train --resume --name a-run-with-a-long-name"
    with monkeypatch.context() as patch:
        patch.setenv("NO_COLOR", "1")
        screen = Screen(patch, width=40)
        display = TrainingDisplay()
        display.note("the text is read at most 10 times (--max-epochs): more did not help")
        display.propose(command)
    *fact, last = re.sub(r"\x1b\[\d*m", "", screen.text()).splitlines()
    assert fact == [
        "note   the text is read at most 10 times",
        "       (--max-epochs): more did not help",
    ]
    assert last == f"resume {command}"
