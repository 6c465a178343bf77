"""minigpt generate: what is on stdout, what is on stderr, and when it ends."""

import json
import re
import signal
from pathlib import Path

import pytest
from calls import Run

from minigpt.commands import samples


@pytest.fixture(autouse=True)
def at_trained(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the tiny run is; generate writes nothing."""
    monkeypatch.chdir(trained)


def test_stdout_is_the_text_that_json_gives_and_a_line_break(run: Run) -> None:
    words = ["generate", "The king", "--seed", "3", "--max-new-tokens", "30", "--temperature", "0"]
    plain, as_json = run(*words), run(*words, "--json")
    facts = json.loads(as_json.out)
    assert plain.code == as_json.code == 0
    assert plain.out == facts["text"] + "\n"
    assert facts["prompt"] == "The king"
    assert facts["n_prompt_tokens"] == 8
    assert (facts["n_tokens"], facts["finish_reason"], facts["seed"]) == (30, "length", 3)
    assert facts["sampling"]["temperature"] == 0
    assert facts["model"].endswith("step-000004")


def test_text_that_is_streamed_is_the_text_that_is_not(run: Run) -> None:
    words = ["generate", "The", "--seed", "3", "--max-new-tokens", "40", "--temperature", "5"]
    assert run(*words).out == run(*words, "--no-stream").out


def test_the_same_seed_gives_the_same_text_and_a_fresh_one_is_printed(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "40", "--temperature", "5"]
    first = run(*words)
    seed = re.search(r"\d+ tokens, [\d.e+]+ tok/s, seed (\d+)", first.err)
    assert seed
    assert run(*words, "--seed", seed[1]).out == first.out
    assert run(*words).out != first.out


def test_temperature_0_is_greedy_whatever_the_seed(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "20", "--temperature", "0", "--seed"]
    assert run(*words, "1").out == run(*words, "2").out


def test_standard_input_is_the_prompt_to_its_last_byte(run: Run) -> None:
    words = ["--temperature", "0", "--max-new-tokens", "9", "--json"]
    for prompt in ("The king\n", " \u2003 \n\n", "a\0b\x1b[31m", "é 世界"):
        facts = json.loads(run("generate", "-", *words, stdin=prompt.encode()).out)
        assert facts["prompt"] == prompt
        assert facts["n_prompt_tokens"] == len(prompt.encode())
        if "\0" not in prompt:
            given = json.loads(run("generate", *words, "--", prompt).out)
            assert given["text"] == facts["text"]


def test_no_prompt_starts_a_new_document(run: Run) -> None:
    facts = json.loads(run("generate", "--json", "--max-new-tokens", "3").out)
    assert facts["prompt"] == ""
    assert facts["n_prompt_tokens"] == 1  # <|endoftext|>


def test_a_full_context_ends_the_text_and_is_said(run: Run) -> None:
    result = run("generate", "x" * 60, "--json", "--temperature", "0", "--max-new-tokens", "99")
    facts = json.loads(result.out)
    assert facts["finish_reason"] == "context"
    assert facts["n_tokens"] == 64 - 60 + 1  # the last token needs no place of its own
    assert "context window is full" in result.err


def test_a_stop_text_ends_the_text_before_it(run: Run) -> None:
    words = ["generate", "The", "--temperature", "0", "--json"]
    whole = json.loads(run(*words).out)["text"]
    stop = whole[10:12]
    facts = json.loads(run(*words, "--stop", stop).out)
    assert facts["text"] == whole[: whole.index(stop)]
    assert facts["finish_reason"] == "stop"


def test_a_stop_text_may_be_typed_with_escapes(run: Run) -> None:
    words = ["generate", "x", "--json", "--max-new-tokens", "1", "--stop", r"\n\n", "--stop"]
    facts = json.loads(run(*words, r"a\\n\t").out)
    assert facts["sampling"]["stop"] == ["\n\n", "a\\n\t"]


def test_samples_are_told_apart_and_each_can_be_drawn_again(run: Run) -> None:
    words = ["generate", "The", "--max-new-tokens", "12", "--temperature", "5"]
    both = run(*words, "--seed", "5", "--num-samples", "2").out
    singles = [run(*words, "--seed", seed).out for seed in ("5", "6")]
    assert both == ("-" * 20 + "\n").join(singles)
    lines = run(*words, "--seed", "5", "--num-samples", "2", "--json").out.splitlines()
    assert [json.loads(line)["text"] + "\n" for line in lines] == singles


def interrupt_after(
    n_writes: int, monkeypatch: pytest.MonkeyPatch, number: int = signal.SIGINT
) -> None:
    """Let a signal come after some writes to stdout."""
    write, written = samples.write_result, []

    def write_and_press(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == n_writes:
            signal.raise_signal(number)

    monkeypatch.setattr(samples, "write_result", write_and_press)


def test_ctrl_c_keeps_the_text_so_far(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "The", "--temperature", "0", "--max-new-tokens", "50"]
    whole = run(*words).out
    interrupt_after(7, monkeypatch)
    result = run(*words, "--num-samples", "3")
    assert result.code == 130
    assert result.out.endswith("\n")
    assert whole.startswith(result.out.removesuffix("\n"))
    assert 0 < len(result.out) < len(whole)
    assert re.fullmatch(r"7 tokens, .* tok/s, seed \d+; interrupted\n", result.err)


def test_sigterm_ends_with_its_code_and_no_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_after(7, monkeypatch, signal.SIGTERM)
    result = run("generate", "The", "--temperature", "0")
    assert (result.code, result.err) == (143, "")
    assert result.out


def test_ctrl_c_while_the_model_is_read_is_quiet(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.commands import loading

    monkeypatch.setattr(loading, "resolve_model", lambda spec: signal.raise_signal(signal.SIGINT))
    result = run("generate", "The")
    assert (result.code, result.out, result.err.strip()) == (130, "", "")


def test_ctrl_c_keeps_the_json_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from minigpt.generation import stream

    real = stream.stream_samples

    def press_after_five(*words: object, **more: object) -> object:
        for number, item in enumerate(real(*words, **more)):  # type: ignore[arg-type]
            yield item
            if number == 4:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(stream, "stream_samples", press_after_five)
    result = run("generate", "The", "--json", "--temperature", "0")
    facts = json.loads(result.out)
    assert result.code == 130
    assert (facts["n_tokens"], facts["finish_reason"]) == (5, "interrupted")
