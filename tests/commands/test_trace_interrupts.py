"""minigpt attention-trace stopped by Ctrl-C, SIGTERM or SIGHUP loses no observed row."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from calls import ROOT, TRACE, Run, objects
from safetensors.numpy import load_file

pytestmark = pytest.mark.usefixtures("in_trained")


@pytest.mark.parametrize("as_json", [True, False])
def test_a_trace_interrupted_by_ctrl_c_has_a_footer(
    run: Run, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    from minigpt.tracing import tracer

    real = tracer.trace

    def press_after_three(*words: object, **more: object) -> object:
        for number, event in enumerate(real(*words, **more)):  # type: ignore[arg-type]
            yield event
            if number == 3:  # the header is number 0
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tracer, "trace", press_after_three)
    result = run(*TRACE, "--num-samples", "2", *(["--json"] if as_json else []))
    assert result.code == 130
    if as_json:
        assert [o["type"] for o in objects(result)] == ["header", *["step"] * 3, "footer"]
        assert objects(result)[-1]["finish_reason"] == "interrupted"
    else:
        assert "3 tokens; interrupted" in result.out
        assert "Attention shows where a head looked" in result.out


CTRL_C_IN_A_ROW = """
import math, os, signal
from minigpt.commands import main
from minigpt.commands.attention_trace.described import DescribedOutput
from minigpt.generation.decoder import Decoder
from minigpt.tracing import observers
from minigpt.tracing.analysis import knockout
from minigpt.tracing.rows import RowSummarizer

observers._BURST_S = math.inf  # all tokens after the first are observed together
owner, name, turn = PLACE
real, calls = getattr(owner, name), []

def interrupted(*words, **more):
    calls.append(1)
    if len(calls) == turn:
        os.kill(os.getpid(), signal.SIGNUMBER)
    return real(*words, **more)

setattr(owner, name, interrupted)
main()
"""
VERIFIED: list[list[str]] = [[], ["--n-verified", "2", "--measure", "logit"]]
CTRL_C_PLACES = {
    "while a row is shown": ("DescribedOutput, 'show_lines', 5", 6),
    "while rows are computed": ("RowSummarizer, 'summaries', 2", 6),
    "while rows are verified": ("knockout.Knockouts, 'changes', 2", 6),
    "while a token is decoded": ("Decoder, '_feed', 4", 4),
}
"""Name of a place -> a function, the call of it that is interrupted, and the observed rows."""


def interrupted(
    folder: Path, words: list[str], place: str, number: str
) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder, with a signal at a place such as those of CTRL_C_PLACES."""
    program = CTRL_C_IN_A_ROW.replace("SIGNUMBER", number).replace("PLACE", place)
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.integration
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    ("place", "more"),
    [
        (place, more)
        for place in CTRL_C_PLACES
        for more in VERIFIED
        if more or "verified" not in place
    ],
)
def test_a_signal_loses_no_observed_row(
    trained: Path, tmp_path: Path, number: str, place: str, more: list[str]
) -> None:
    out = tmp_path / "t.jsonl"
    words = [*TRACE, "--ignore-eos", *more, "--out", str(out)]
    function, n_rows = CTRL_C_PLACES[place]
    ended = interrupted(trained, words, function, number)
    assert ended.returncode == 128 + getattr(signal, number)
    _, *steps, footer = map(json.loads, out.read_text().splitlines())
    assert [step["step"] for step in steps] == list(range(1, n_rows + 1))
    assert footer["finish_reason"] == "interrupted"
    rows = [line for line in ended.stdout.splitlines() if re.match(r" {3}\d ", line)]
    assert [int(row[:4]) for row in rows] == list(range(1, n_rows + 1))
    assert f"{n_rows} tokens; interrupted" in ended.stdout
    if more:
        assert all(step["effects"] for step in steps)
        assert footer["cause"]
    else:
        assert footer["worst_row_sum_error"] < 1e-5
    assert "Traceback" not in ended.stderr
    assert f"wrote {out}\n" in ended.stderr


@pytest.mark.integration
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_keeps_the_dense_rows_of_the_tokens_so_far(
    trained: Path, tmp_path: Path, number: str
) -> None:
    dense = tmp_path / "t.rows"
    place, n_rows = CTRL_C_PLACES["while a token is decoded"]
    ended = interrupted(trained, [*TRACE, "--ignore-eos", "--dense", str(dense)], place, number)
    assert ended.returncode == 128 + getattr(signal, number)
    assert f"wrote {dense}\n" in ended.stderr
    assert len(load_file(dense)["offsets"]) == n_rows + 1


CLOSED_TERMINAL = """
import os, pty, signal
from minigpt.commands import main
from minigpt.commands.attention_trace.described import DescribedOutput

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # it is ignored under nohup
terminal, stdout = pty.openpty()
os.dup2(stdout, 1)
os.close(stdout)
real, events = DescribedOutput.show_lines, []

def close(output, event):
    events.append(event)
    if len(events) == 4:
        os.close(terminal)
        os.kill(os.getpid(), signal.SIGHUP)
    real(output, event)

DescribedOutput.show_lines = close
main()
"""


def test_a_closed_terminal_loses_no_observed_row(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    ended = subprocess.run(
        [sys.executable, "-c", CLOSED_TERMINAL, *TRACE, "--ignore-eos", "--out", str(out)],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 128 + signal.SIGHUP
    assert f"wrote {out}\n" in ended.stderr
    _, *steps, footer = map(json.loads, out.read_text().splitlines())
    assert len(steps) >= 3
    assert footer["finish_reason"] == "interrupted"
