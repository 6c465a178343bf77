"""minigpt attention-trace: its lines, its JSON, and how it ends."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from calls import Result, Run

from minigpt.tracing import terminal

WORDS = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def at_trained(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the tiny run is; attention-trace writes nothing."""
    monkeypatch.chdir(trained)


def objects(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def test_the_text_is_the_one_that_generate_gives(run: Run) -> None:
    steps = objects(run(*WORDS, "--json"))[1:-1]
    generated = json.loads(run("generate", *WORDS[1:], "--json").out)
    assert "".join(step["certain_text"] for step in steps) == generated["text"]
    assert run(*WORDS).out.endswith(f"\n\n{generated['text']}\n")


def test_json_is_a_header_a_step_for_each_token_and_a_footer(run: Run) -> None:
    result = run(*WORDS, "--json", "--seed", "7")
    header, *steps, footer = objects(result)
    assert result.code == 0
    assert (header["type"], header["seed"]) == ("header", 7)
    assert header["schema"].startswith("minigpt-trace/")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert (footer["type"], footer["n_tokens"]) == ("footer", 6)
    assert footer["finish_reason"] == "length"
    assert result.err == "seed 7\n"


def test_sources_and_heads_are_those_that_were_asked_for(run: Run) -> None:
    header, step, *_ = objects(run(*WORDS, "--json", "--sources", "2", "--heads", "1.0"))
    assert header["heads"] == "1.0"
    assert len(step["rows"][0]["sources"]) == 2


def test_each_sample_has_its_own_header_and_seed(run: Run) -> None:
    result = run(*WORDS, "--json", "--num-samples", "2", "--seed", "7")
    assert [o["seed"] for o in objects(result) if o["type"] == "header"] == [7, 8]
    assert result.err == "seed 7\nseed 8\n"


def test_lines_in_a_pipe_have_no_control_bytes(run: Run) -> None:
    out = run("attention-trace", "a\x1b[31m\tb", "--temperature", "50", "--num-samples", "3").out
    assert all(line.isprintable() for line in out.split("\n"))


@pytest.mark.parametrize("as_json", [True, False])
def test_ctrl_c_still_ends_with_a_footer(
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
    result = run(*WORDS, "--num-samples", "2", *(["--json"] if as_json else []))
    assert result.code == 130
    if as_json:
        assert [o["type"] for o in objects(result)] == ["header", *["step"] * 3, "footer"]
        assert objects(result)[-1]["finish_reason"] == "interrupted"
    else:
        ending = terminal.footer_lines(tracer.TraceFooter(3, None, 1.0, None))
        assert "".join(text for text, _ in ending[1]) in result.out
        assert "3 tokens; interrupted" in result.out
