"""minigpt attention-trace: lines, JSON, files and errors."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import ROOT, Result, Run
from safetensors.numpy import load_file

from minigpt.tracing.config import SAMPLING
from minigpt.tracing.spans import bar, heat, percent
from minigpt.tracing.wrapping import signed

WORDS = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(autouse=True)
def at_trained(trained: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where the tiny run is; attention-trace writes nothing."""
    monkeypatch.chdir(trained)


def objects(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.out.splitlines()]


def test_the_text_is_that_of_generate(run: Run) -> None:
    steps = objects(run(*WORDS, "--json"))[1:-1]
    generated = json.loads(run("generate", *WORDS[1:], "--json").out)
    assert "".join(step["certain_text"] for step in steps) == generated["text"]
    assert run(*WORDS).out.endswith(f"\n\n{generated['text']}\n")


def test_json_is_a_header_a_step_per_token_and_a_footer(run: Run) -> None:
    result = run(*WORDS, "--json", "--seed", "7")
    header, *steps, footer = objects(result)
    assert result.code == 0
    assert (header["type"], header["seed"]) == ("header", 7)
    assert header["schema"].startswith("minigpt-trace/")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert (footer["type"], footer["n_tokens"]) == ("footer", 6)
    assert footer["finish_reason"] == "length"
    assert result.err == "model checkpoints/tiny/step-000004\nseed 7\n"


def test_n_sources_and_heads_select_sources_and_heads(run: Run) -> None:
    header, step, *_ = objects(run(*WORDS, "--json", "--sources", "2", "--heads", "1.0"))
    assert header["heads"] == "1.0"
    assert len(step["rows"][0]["sources"]) == 2


def test_each_sample_has_its_own_header_and_seed(run: Run) -> None:
    result = run(*WORDS, "--json", "--num-samples", "2", "--seed", "7")
    assert [o["seed"] for o in objects(result) if o["type"] == "header"] == [7, 8]
    assert result.err == "model checkpoints/tiny/step-000004\nseed 7\nseed 8\n"


def test_lines_in_a_pipe_have_no_control_bytes(run: Run) -> None:
    out = run("attention-trace", "a\x1b[31m\tb", "--temperature", "50", "--num-samples", "3").out
    assert all(line.isprintable() for line in out.split("\n"))


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
    result = run(*WORDS, "--num-samples", "2", *(["--json"] if as_json else []))
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
from minigpt.tracing.rows import RowReader

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
    "while a row is shown": ("DescribedOutput, 'show_step', 4", 6),
    "while rows are computed": ("RowReader, 'facts', 2", 6),
    "while rows are verified": ("knockout.Knockouts, 'changes', 2", 6),
    "while a token is decoded": ("Decoder, '_feed', 4", 4),
}
"""Name of a place -> a function and which of its calls a signal interrupts; rows observed."""


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
def test_a_signal_loses_no_row_that_was_observed(
    trained: Path, tmp_path: Path, number: str, place: str, more: list[str]
) -> None:
    out = tmp_path / "t.jsonl"
    words = [*WORDS, "--ignore-eos", *more, "--out", str(out)]
    function, n_rows = CTRL_C_PLACES[place]
    program = CTRL_C_IN_A_ROW.replace("SIGNUMBER", number).replace("PLACE", function)
    ended = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=trained,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
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


def test_out_writes_the_same_json_as_stdout_with_all_heads(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result = run(*WORDS, "--json", "--seed", "7", "--out", str(path), "--measure", "both")
    written = path.read_text()
    assert result.out == written
    header, *steps, _ = objects(result)
    assert header["measures"] == ["weight", "norm"]
    assert len(header["model_sha256"]) == 64
    for step in steps:
        for row in step["rows"]:
            shares = np.array(row["heads"]["weights"])
            assert shares.shape[:2] == (header["n_layer"], header["n_head"])
            assert (shares.sum(axis=2) + row["heads"]["sink"] <= 1.001).all()


def test_replay_shows_a_file_as_the_trace_was_shown(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    for view in ("lines", "text", "matrix", "heads"):
        live = run(*WORDS, "--view", view, "--out", path, "--num-samples", "2", "--seed", "3")
        again = run("attention-trace", "--replay", path, "--view", view)
        assert again.out == live.out
        assert (again.code, again.err) == (0, "")
    assert run("attention-trace", "--replay", path, "--json").out == Path(path).read_text()


@pytest.mark.parametrize("show", [percent, bar, heat, signed])
def test_a_number_is_shown_as_that_of_the_file(show: Callable[[float], str]) -> None:
    near = (0.005, 0.0149999996, 0.0150000004, 0.4500000004, 2.2499999997, 0.0499999998, 0.125)
    for number in (*near, *(-x for x in near)):
        assert show(number) == show(round(number, 6)), number


def test_a_replay_shows_no_rest_where_all_positions_are_shown(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    for prompt in ("a", "ab", "abc"):
        for measure in ("weight", "both"):
            words = [prompt, "--max-new-tokens", "3", "--measure", measure, "--view"]
            for view in ("lines", "heads"):
                more = [view, "--seed", "1", "--out", path]
                live = run("attention-trace", *words, *more)
                assert live.code == 0
                again = run("attention-trace", "--replay", path, "--view", view)
                assert again.out == live.out


@pytest.mark.parametrize(
    "words",
    [
        ["--measure", "both", "--candidates", "3", "--lens"],
        ["--n-verified", "all"],
        ["--measure", "logit"],
    ],
    ids=" ".join,
)
def test_a_replay_writes_the_same_page(run: Run, tmp_path: Path, words: list[str]) -> None:
    trace, live, again = (str(tmp_path / name) for name in ("t.jsonl", "live.html", "again.html"))
    words = [*words, "--max-new-tokens", "8", "--seed", "1", "--out", trace, "--html", live]
    assert run("attention-trace", "abcab", *words).code == 0
    assert run("attention-trace", "--replay", trace, "--html", again).code == 0
    assert Path(again).read_bytes() == Path(live).read_bytes()


def test_a_replay_with_dense_rows_chooses_heads_without_the_model(run: Run, tmp_path: Path) -> None:
    path, rows = str(tmp_path / "t.jsonl"), str(tmp_path / "t.rows")
    run(*WORDS, "--out", path, "--dense", rows, "--seed", "3")
    before = Path(rows).read_bytes()
    for words in (["--heads", "1.0"], ["--layers", "0", "--reduce", "max"], []):
        live = run(*WORDS, "--seed", "3", "--view", "text", *words)
        again = run("attention-trace", "--replay", path, "--dense", rows, "--view", "text", *words)
        assert (again.code, again.err, again.out) == (0, "", live.out)
    assert Path(rows).read_bytes() == before
    refused = run("attention-trace", "--replay", path, "--heads", "1.0")
    assert refused.code == 2
    assert "--dense" in refused.err
    missing = run("attention-trace", "--replay", path, "--dense", str(tmp_path / "no"))
    assert missing.code == 3
    page = run("attention-trace", "--replay", path, "--dense", rows, "--html", str(tmp_path / "h"))
    assert page.code == 0


def test_diff_compares_two_files(run: Run, tmp_path: Path) -> None:
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    run(*WORDS, "--out", first)
    run(*WORDS, "--out", second, "--heads", "0.0", "--measure", "norm")
    lines = run("attention-trace", "--diff", first, second).out.splitlines()
    assert lines[0].startswith("first ")
    assert lines[1].endswith("norm of head 0.0")
    assert sum(line.split()[0].isdigit() for line in lines if line) == 7  # six, and the summary
    facts = objects(run("attention-trace", "--diff", first, second, "--json"))
    assert len(facts) == 6
    assert all(0 < step["moved"] < 1 for step in facts)
    same = run("attention-trace", "--diff", first, first, "--json")
    assert {step["moved"] for step in objects(same)} == {0}


def test_page_dense_rows_and_pictures_are_written(run: Run, tmp_path: Path) -> None:
    names = {name: tmp_path / f"t.{name}" for name in ("html", "svg", "png", "dense")}
    options = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    assert run(*WORDS, *options).code == 0
    assert names["html"].read_text().lower().startswith("<!doctype html>")
    assert names["svg"].read_text().startswith("<?xml")
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    rows = load_file(names["dense"])
    n_prompt = len(objects(run(*WORDS, "--json"))[0]["prompt"])
    assert rows["offsets"].tolist() == [
        sum(range(n_prompt, n_prompt + i)) for i in range(len(rows["offsets"]))
    ]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--reduce", "median"], 2, "unknown --reduce 'median'"),
        (
            ["--measure", "norm", "--reduce", "rollout"],
            2,
            "--reduce rollout requires --measure weight",
        ),
        (["--sink", "first"], 2, "--sink takes a whole number or auto: it is 'first'"),
        (["--sink", "99"], 2, "the sink must be a position of the prompt"),
        (["--verify", "-1"], 2, "--n-verified must be at least 0"),
        (["--html", "no/such/t.html"], 2, "--html: there is no folder 'no/such'"),
        (["--html", "t.html", "--num-samples", "2"], 2, "--html shows one trace"),
        (["--dense", "t", "--num-samples", "2"], 2, "--dense shows one trace"),
        (["--dense", "/dev/null"], 2, "--dense: '/dev/null' is not a file"),
        (["--html", "/dev/null"], 2, "--html: '/dev/null' is not a file"),
        (["--out", "."], 2, "--out: '.' is not a file"),
        (["--png", "t.jpg"], 2, "t.jpg"),
        (["--overflow", "slide"], 2, "overflow slide would recompute rows"),
        (["--replay", "t.jsonl"], 2, "there is no model and no prompt"),
    ],
    ids=str,
)
def test_an_invalid_option_is_one_line_on_stderr(
    run: Run, words: list[str], code: int, message: str
) -> None:
    result = run(*WORDS, *words)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_line_that_names_the_file(run: Run) -> None:
    result = run(*WORDS, "--out", "/dev/full")
    assert result.code == 6
    assert "'/dev/full': No space left on device" in result.err.splitlines()[-1]


def test_a_file_that_is_not_a_trace_is_bad_data(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("hello\n")
    for words in (["--replay", str(path)], ["--diff", str(path), str(path)]):
        result = run("attention-trace", *words)
        assert (result.code, result.out) == (3, "")
        assert result.err.startswith("error: line 1 of ")


def test_the_rows_of_a_given_text_alone(run: Run) -> None:
    words = ("attention-trace", "The king", "--max-new-tokens", "0")
    header, *steps, footer = objects(run(*words, "--json", "--candidates", "2"))
    assert [step["position"] for step in steps] == list(range(1, len(header["prompt"])))
    assert [step["text"] for step in steps] == [token["text"] for token in header["prompt"][1:]]
    assert all(step["given"] and len(step["candidates"]) == 2 for step in steps)
    assert (footer["n_tokens"], footer["finish_reason"]) == (0, "length")


@pytest.mark.parametrize("view", ["text", "matrix", "heads"])
def test_every_view_and_file_shows_the_rows_of_a_given_text(
    run: Run, view: str, workplace: Path
) -> None:
    out, page = workplace / "given.jsonl", workplace / "given.html"
    words = ("attention-trace", "The king", "--max-new-tokens", "0")
    live = run(*words, "--view", view, "--out", str(out), "--html", str(page))
    assert live.code == 0
    assert page.stat().st_size
    assert run("attention-trace", "--replay", str(out), "--view", view).out == live.out


def test_lines_name_the_tokens_of_the_prompt_and_the_candidates(run: Run) -> None:
    out = run(*WORDS, "--prompt-rows", "--candidates", "3").out
    names = [line[5:9].strip() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert names[:7] == list("he␣king")
    assert sum("candidates" in line for line in out.splitlines()) == len(names)


def test_forced_text_is_generated_first(run: Run) -> None:
    _, *steps, _ = objects(run(*WORDS, "--json", "--force", " is"))
    assert "".join(step["text"] for step in steps[:3]) == " is"
    assert [step["given"] for step in steps] == [True] * 3 + [False] * 3
    result = run("generate", *WORDS[1:], "--force", " is", "--json")
    facts = json.loads(result.out)
    assert facts["text"].startswith(" is")
    assert facts["n_forced"] == 3
    expected = sum(step["log_probability"] for step in steps[:3])
    assert facts["forced_log_probability"] == pytest.approx(expected, abs=1e-5)
    assert "ln p of the 3 forced tokens" in result.err


def test_no_tokens_to_generate_is_refused_with_the_remedy(run: Run) -> None:
    result = run("generate", "The king", "--max-new-tokens", "0")
    assert result.code == 2
    assert "attention-trace with --max-new-tokens 0" in result.err


@pytest.mark.parametrize("measure", ["logit", "gradient", "integrated"])
def test_rows_in_logits_have_signs_and_account_for_the_whole_logit(
    run: Run, tmp_path: Path, measure: str
) -> None:
    words = [*WORDS, "--measure", measure, "--prompt-rows", "--against", "be"]
    header, *steps, _ = objects(run(*words, "--json"))
    assert (header["units"], header["against"]["n_tokens"]) == (["logits"], 2)
    for step in steps:
        [row] = step["rows"]
        shown = sum(source["weight"] for source in row["sources"]) + row["sink"] + row["rest"]
        assert shown == pytest.approx(row["total"], abs=1e-5)
        if measure == "gradient":
            assert (row["whole"], row["parts"]) == (None, {})
        else:
            assert row["whole"] == pytest.approx(shown + sum(row["parts"].values()), abs=1e-4)
    live = run(*words, "--out", str(tmp_path / "t.jsonl"))
    assert live.code == 0
    assert "--against 'be': compared with b, the first of 2 tokens" in live.err
    replayed = run("attention-trace", "--replay", str(tmp_path / "t.jsonl"))
    assert replayed.out == live.out
    lines = [line for line in live.out.splitlines() if line[:4].strip().isdigit()]
    assert len(lines) == len(steps)
    if measure == "logit":
        for line, step in zip(lines, steps, strict=True):
            numbers = [float(n) for n in re.findall(r"[+-]\d+\.\d+", line)]
            *parts, whole = numbers
            assert whole == pytest.approx(step["rows"][0]["whole"], abs=0.01)
            assert sum(parts) == pytest.approx(whole, abs=0.01 * len(parts))


def test_the_diff_names_the_interventions_of_two_traces(run: Run, workplace: Path) -> None:
    words = ("attention-trace", "The king", "--max-new-tokens", "0")
    changes = {
        "plain": [],
        "ablated": ["--ablate", "0.*"],
        "patched": ["--patch-from", "Our kids", "--patch", "1.*", "--patch-position", "3"],
    }
    for name, more in changes.items():
        assert run(*words, "--out", str(workplace / f"{name}.jsonl"), *more).code == 0
    files = [str(workplace / f"{name}.jsonl") for name in ("ablated", "patched")]
    out = run("attention-trace", "--diff", *files).out
    assert "heads 0.* set to 0" in out
    assert run("attention-trace", "--diff", str(workplace / "plain.jsonl"), files[0]).code == 0
    assert "patched at position 3" in run("attention-trace", "--replay", files[1]).out


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--ablate", "9.0"], "the model has layers 0 to 1"),
        (["--patch-from", "A", "--patch", "0.0"], "it has 1, and the first has 8"),
        (["--patch-from", "A"], "--patch-from and --patch belong together"),
        (["--ablate-mean"], "--ablate-mean is for --ablate"),
        (["--ablate", "0.0", "--compile"], "--compile has no effect with --ablate"),
    ],
)
def test_interventions_that_are_not_possible_are_usage_errors(
    run: Run, command: str, words: list[str], says: str
) -> None:
    result = run(command, "The king", *words)
    assert result.code == 2
    assert says in result.err


def test_a_trace_has_40_new_tokens_by_default_and_generate_256(run: Run) -> None:
    import minigpt

    words = ("The king", "--temperature", "0", "--ignore-eos")
    *_, footer = objects(run("attention-trace", *words, "--json"))
    assert footer["n_tokens"] == SAMPLING.max_new_tokens == 40
    trace = minigpt.trace("tiny", "The king", temperature=0, ignore_eos=True)
    assert trace.footer.n_tokens == 40
    assert trace.header.sampling.max_new_tokens == 40
    help_pages = {name: run(name, "--help").out for name in ("attention-trace", "generate")}
    assert "generated tokens [40]" in " ".join(help_pages["attention-trace"].split())
    assert "generated tokens [256]" in " ".join(help_pages["generate"].split())


def test_each_source_can_be_looked_up_among_the_tokens_of_the_prompt(run: Run) -> None:
    out = run(*WORDS).out
    listed = dict(re.findall(r"(\d+) (\S+)", out[out.index("prompt") : out.index("from 8 on")]))
    assert "".join(listed.values()) == "The␣king"
    assert list(map(int, listed)) == list(range(8))
    for line in out.splitlines():
        if line[:4].strip().isdigit():
            sources = line[line.index("%") + 1 :]
            for position, name in re.findall(r" (\d+) (\S+) +\d+%", sources):
                assert listed.get(position, name) == name


WORDS_OF_WEIGHTS = re.compile(r"attend|attention|moved|\bshares?\b|looked|weight")


@pytest.mark.parametrize(
    ("measure", "view"),
    [*product(["logit", "gradient"], ["lines", "text", "matrix"]), ("logit", "heads")],
)
def test_no_view_of_a_signed_measure_uses_a_word_of_weights(
    run: Run, measure: str, view: str
) -> None:
    shown = run(*WORDS, "--measure", measure, "--view", view, "--n-verified", "all").out
    knockout = "the other weights grow to sum to 1"  # which a hidden key does to them
    assert not WORDS_OF_WEIGHTS.findall(" ".join(shown.split()).replace(knockout, ""))


def test_a_diff_says_that_attention_moved_of_weights_only(run: Run, tmp_path: Path) -> None:
    for measure in ("weight", "norm", "logit"):
        path = str(tmp_path / measure)
        run(*WORDS, "--force", "abc", "--measure", measure, "--out", path, "--temperature", "0")

    def diff(first: str, second: str) -> str:
        return run("attention-trace", "--diff", str(tmp_path / first), str(tmp_path / second)).out

    assert "moved       bits" in diff("weight", "weight")
    assert "0% of the attention moved and the Jensen" in " ".join(diff("weight", "weight").split())
    for other in ("norm", "logit"):
        for first in ("weight", other):
            out = " ".join(diff(first, other).split())
            assert "the rows differ by" in out
            assert "token differ bits ln p" in out
            assert "moved" not in out
            assert "attention" not in out
