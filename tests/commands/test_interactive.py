"""minigpt generate --interactive, with lines from a pipe or typed on a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from calls import ROOT, Run, error_line

from minigpt.commands.generate import samples
from minigpt.generation.conversation import Conversation

pytestmark = pytest.mark.usefixtures("in_trained")

WORDS = ["generate", "--interactive", "--temperature", "0", "--max-new-tokens", "5"]


def answer(run: Run, said: str) -> str:
    """Return the output of generate for the conversation so far."""
    result = run("generate", "-", *WORDS[2:], "--json", stdin=said.encode())
    return str(json.loads(result.out)["text"])


@pytest.mark.integration
def test_each_line_continues_the_conversation(run: Run) -> None:
    first = answer(run, "The king")
    second = answer(run, f"The king{first} said")
    third = answer(run, f"The king{first} said{second}")
    fourth = answer(run, f"The king{first} said{second}{third}a\nb\\c ")
    result = run(*WORDS, stdin=b"The king\n said\n\na\\\nb\\c ")
    assert result.code == 0
    assert result.out == f"{first}\n{second}\n{third}\n{fourth}\n"
    assert result.err.count("5 tokens, ") == 4
    assert "> " not in result.err, "a pipe must get no input marker"


@pytest.mark.integration
def test_the_prompt_is_answered_first_and_an_empty_line_starts_a_new_document(run: Run) -> None:
    first = answer(run, "The king")
    given = run(*WORDS, "The king", stdin=b" said\n")
    assert given.out == f"{first}\n{answer(run, f'The king{first} said')}\n"
    assert run(*WORDS, "The king").out == f"{first}\n"
    nothing = json.loads(run("generate", *WORDS[2:], "--json").out)["text"]
    assert run(*WORDS, stdin=b"\n").out == f"{nothing}\n"
    assert run(*WORDS).out == ""


def test_lines_after_a_too_long_prompt_are_answered(run: Run) -> None:
    given = run(*WORDS, "long " * 999, stdin=b"a<|endoftext|>b\n")
    assert given.code == 0
    too_long, special, *_ = given.err.splitlines()
    assert "the prompt has" in too_long
    assert special.startswith("<|endoftext|> in the prompt is plain text")


def test_json_has_one_object_per_answer_with_its_own_seed(run: Run) -> None:
    result = run(*WORDS, "--json", "--seed", "7", stdin=b"The\nking\n")
    facts = [json.loads(line) for line in result.out.splitlines()]
    assert [f["seed"] for f in facts] == [7, 8]
    assert [f["prompt"] for f in facts] == ["The", "king"]
    assert [f["n_prompt_tokens"] for f in facts] == [3, 3 + 5 + 4]


def test_a_full_context_is_reported_and_the_next_line_starts_over(run: Run) -> None:
    result = run(*WORDS, stdin=b"x" * 62 + b"\nThe\n")
    assert result.code == 0
    assert result.out.endswith(f"\n{answer(run, 'The')}\n")
    assert "3 tokens" in result.err
    assert "the context window is full" in result.err
    assert "--overflow slide" in result.err


def test_a_line_that_does_not_fit_is_reported_and_a_shorter_one_works(run: Run) -> None:
    first = answer(run, "The")
    result = run(*WORDS, stdin=b"x" * 65 + b"\nThe\n" + b"y" * 60 + b"\n king\n")
    assert result.out == f"{first}\n{answer(run, f'The{first} king')}\n"
    assert "the prompt has 65 tokens, but the model sees 64" in result.err
    assert "the conversation has 68 tokens, but the model sees 64" in result.err


def test_a_sliding_window_never_ends_the_conversation(run: Run) -> None:
    words = [*WORDS, "--overflow", "slide", "--json"]
    result = run(*words, stdin=b"The king\n" * 15 + b"z" * 100 + b"\n")
    facts = [json.loads(line) for line in result.out.splitlines()]
    assert [f["n_tokens"] for f in facts] == [5] * 16
    assert facts[-1]["n_slides"] >= 4
    n_said = 15 * (8 + 5) + 100
    # Four tokens and half of the window of 64 are kept.
    assert facts[-1]["n_forgotten"] == n_said - 36


def test_ctrl_c_stops_the_answer_but_not_the_program(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = answer(run, "The king")
    write, written = samples.write_result, []

    def write_and_press(text: str) -> None:
        write(text)
        written.append(text)
        if len(written) == 3:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(samples, "write_result", write_and_press)
        result = run(*WORDS, stdin=b"The king\n said\n")
    assert result.code == 0
    second = answer(run, f"The king{first[:3]} said")
    assert result.out == f"{first[:3]}\n{second}\n"
    assert "3 tokens" in result.err
    assert "; interrupted" in result.err


def test_ctrl_c_stops_the_processing_of_a_text_but_not_the_program(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, calls = Conversation.prefill, []

    def press(self: Conversation, n_cached: int = 0) -> None:
        calls.append(n_cached)
        if len(calls) in (1, 3):
            signal.raise_signal(signal.SIGINT)
        prefill(self, n_cached)

    with monkeypatch.context() as patch:
        patch.setattr(Conversation, "prefill", press)
        result = run(*WORDS, stdin=b"lost\nThe\n old\n king\n")
    assert result.code == 0
    assert result.err.count("interrupted\n") == 2
    first = answer(run, "The")
    assert result.out == f"{first}\n{answer(run, f'The{first} old king')}\n"


def test_conflicting_options_are_refused(run: Run) -> None:
    for words in (["--num-samples", "2"], ["-"]):
        result = run(*WORDS, *words)
        assert result.code == 2
        assert "--interactive" in error_line(result)


def test_a_line_that_is_not_utf8_is_an_error(run: Run) -> None:
    result = run(*WORDS, stdin=b"\xff\n")
    assert result.code == 3
    assert "a line on standard input is not UTF-8 text" in error_line(result)


def read_until(descriptor: int, ending: bytes, part: bytes = b"") -> bytes:
    data, end = b"", time.monotonic() + 60
    while not (data.endswith(ending) and part in data):
        ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
        assert ready, data
        data += os.read(descriptor, 1024)
    return data


@pytest.mark.integration
def test_a_terminal_gets_an_input_marker_on_stderr_only(trained: Path, run: Run) -> None:
    first = answer(run, "The king")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "minigpt", *WORDS],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=make_controlling_terminal,
    ) as process:
        assert process.stdout is not None
        os.close(theirs)
        try:
            read_until(ours, b"> ")
            os.write(ours, b"abc\x03")  # Ctrl-C discards the line
            read_until(ours, b"Ctrl-D ends\r\n> ")
            os.write(ours, b"The king\n")
            shown = read_until(ours, b"> ")
            os.write(ours, b"\x04")  # Ctrl-D
            out = process.stdout.read().decode()
        except BaseException:
            process.kill()  # otherwise leaving the context would wait forever
            raise
    os.close(ours)
    assert process.returncode == 0
    assert out == f"{first}\n"
    assert b"5 tokens" in shown


@pytest.mark.integration
def test_lines_can_be_edited_and_pasted_on_a_terminal(
    trained: Path, run: Run, tmp_path: Path
) -> None:
    pytest.importorskip("readline", reason="needs readline")
    pasted = "Once upon\na time\nthere was"
    first = answer(run, pasted)
    second = answer(run, f"{pasted}{first} said")
    ours, theirs = pty.openpty()
    environment = {
        "TERM": "xterm",
        "MINIGPT_CACHE_DIR": str(tmp_path / "c"),
        "INPUTRC": "/dev/null",
    }
    with subprocess.Popen(
        [sys.executable, "-m", "minigpt", *WORDS, "--model", "tiny"],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=make_controlling_terminal,
    ) as process:
        os.close(theirs)
        try:
            read_until(ours, b"> ")
            os.write(ours, f"\x1b[200~{pasted}\x1b[201~\r".encode())
            read_until(ours, b"> ", b"tok/s")
            os.write(ours, b"sXX\x7f\x7faid\x01 \r")  # backspaces, and Ctrl-A to the start
            shown = read_until(ours, b"> ", b"tok/s")
            os.write(ours, b"\x04")
            process.wait(60)
        except BaseException:
            process.kill()
            raise
    os.close(ours)
    assert process.returncode == 0
    assert b"5 tokens" in shown
    assert second.splitlines()[0].encode() in shown
    history = tmp_path / "c/history"
    assert " said" in history.read_text().splitlines()
    assert history.stat().st_mode & 0o777 == 0o600


def make_controlling_terminal() -> None:
    """Make stdin the controlling terminal, so that its Ctrl-C reaches this process."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
