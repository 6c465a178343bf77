"""minigpt attention-trace: lines, JSON, files and errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from calls import TRACE, Run, objects
from safetensors.numpy import load_file

from minigpt.tracing.config import SAMPLING

pytestmark = pytest.mark.usefixtures("in_trained")


@pytest.mark.integration
def test_a_trace_prints_the_text_of_generate(run: Run) -> None:
    steps = objects(run(*TRACE, "--json"))[1:-1]
    generated = json.loads(run("generate", *TRACE[1:], "--json").out)
    assert "".join(step["certain_text"] for step in steps) == generated["text"]
    assert run(*TRACE).out.endswith(f"\n\n{generated['text']}\n")


def test_json_is_a_header_a_step_per_token_and_a_footer(run: Run) -> None:
    result = run(*TRACE, "--json", "--seed", "7")
    header, *steps, footer = objects(result)
    assert result.code == 0
    assert (header["type"], header["seed"]) == ("header", 7)
    assert header["schema"].startswith("minigpt-trace/")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert (footer["type"], footer["n_tokens"]) == ("footer", 6)
    assert footer["finish_reason"] == "length"
    assert result.err == "model checkpoints/tiny/step-000004\nseed 7\n"


def test_n_sources_and_heads_select_the_traced_sources_and_heads(run: Run) -> None:
    header, step, *_ = objects(run(*TRACE, "--json", "--sources", "2", "--heads", "1.0"))
    assert header["heads"] == "1.0"
    assert len(step["rows"][0]["sources"]) == 2


def test_each_sample_has_its_own_header_and_seed(run: Run) -> None:
    result = run(*TRACE, "--json", "--num-samples", "2", "--seed", "7")
    assert [o["seed"] for o in objects(result) if o["type"] == "header"] == [7, 8]
    assert result.err == "model checkpoints/tiny/step-000004\nseed 7\nseed 8\n"


def test_the_alternative_token_is_named_once_for_all_samples(run: Run) -> None:
    result = run(*TRACE, "--measure", "logit", "--against", "be", "--num-samples", "3")
    assert result.err.count("compared with b, the first of 2 tokens") == 1


@pytest.mark.integration
def test_lines_in_a_pipe_have_no_control_bytes(run: Run) -> None:
    out = run("attention-trace", "a\x1b[31m\tb", "--temperature", "50", "--num-samples", "3").out
    assert all(line.isprintable() for line in out.split("\n"))


def test_out_writes_the_same_json_as_stdout_with_all_heads(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    result = run(*TRACE, "--json", "--seed", "7", "--out", str(path), "--measure", "both")
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


@pytest.mark.integration
def test_page_dense_rows_and_pictures_are_written(run: Run, tmp_path: Path) -> None:
    names = {name: tmp_path / f"t.{name}" for name in ("html", "svg", "png", "dense")}
    options = [word for name, path in names.items() for word in (f"--{name}", str(path))]
    assert run(*TRACE, *options).code == 0
    assert names["html"].read_text().lower().startswith("<!doctype html>")
    assert names["svg"].read_text().startswith("<?xml")
    assert names["png"].read_bytes().startswith(b"\x89PNG")
    rows = load_file(names["dense"])
    n_prompt = len(objects(run(*TRACE, "--json"))[0]["prompt"])
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
        (["--html", "t.html", "--num-samples", "2"], 2, "--html writes one trace"),
        (["--dense", "t", "--num-samples", "2"], 2, "--dense writes one trace"),
        (["--dense", "/dev/null"], 2, "--dense: '/dev/null' is not a file"),
        (["--html", "/dev/null"], 2, "--html: '/dev/null' is not a file"),
        (["--out", "."], 2, "--out: '.' is not a file"),
        (["--png", "t.jpg"], 2, "t.jpg"),
        (["--overflow", "slide"], 2, "overflow slide would recompute rows"),
        (["--replay", "t.jsonl"], 2, "there is no model and no prompt"),
    ],
    ids=str,
)
def test_invalid_options_are_refused_in_one_line_on_stderr(
    run: Run, words: list[str], code: int, message: str
) -> None:
    result = run(*TRACE, *words)
    assert (result.code, result.out) == (code, "")
    assert message in result.err
    assert result.err.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_one_line_error_that_names_the_file(run: Run) -> None:
    result = run(*TRACE, "--out", "/dev/full")
    assert result.code == 6
    assert "'/dev/full': No space left on device" in result.err.splitlines()[-1]


def test_replaying_a_file_that_is_not_a_trace_is_a_data_error(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("hello\n")
    for words in (["--replay", str(path)], ["--diff", str(path), str(path)]):
        result = run("attention-trace", *words)
        assert (result.code, result.out) == (3, "")
        assert result.err.startswith("error: line 1 of ")


def test_zero_new_tokens_trace_only_the_given_text(run: Run) -> None:
    words = ("attention-trace", "The king", "--max-new-tokens", "0")
    header, *steps, footer = objects(run(*words, "--json", "--candidates", "2"))
    assert [step["position"] for step in steps] == list(range(1, len(header["prompt"])))
    assert [step["text"] for step in steps] == [token["text"] for token in header["prompt"][1:]]
    assert all(step["given"] and len(step["candidates"]) == 2 for step in steps)
    assert (footer["n_tokens"], footer["finish_reason"]) == (0, "length")


@pytest.mark.integration
@pytest.mark.parametrize("measure", ["weight", "both", "logit"])
@pytest.mark.parametrize("view", ["lines", "text", "matrix", "heads"])
def test_queries_before_the_sink_have_no_attention_on_it(
    run: Run, view: str, measure: str, workplace: Path
) -> None:
    words = ("attention-trace", "The king", "--prompt-rows", "--sink", "2", "--measure", measure)
    words += ("--max-new-tokens", "2", "--n-verified", "1")
    _, *steps, _ = objects(run(*words, "--json"))
    one, two, three, *_ = [step["rows"][0] for step in steps]
    assert (one["sink"], two["sink"]) == (0, 0)
    assert [source["position"] for source in one["sources"]] == [0]
    assert {source["position"] for source in two["sources"]} == {0, 1}
    assert {source["position"] for source in three["sources"]} == {0, 1}, (
        "position 2 is the sink, not a source"
    )
    out = workplace / "o.jsonl"
    shown = run(*words, "--view", view, "--out", str(out), "--html", str(workplace / "h.html"))
    assert shown.code == 0, shown.err
    assert run("attention-trace", "--replay", str(out), "--view", view).out == shown.out
    assert run("attention-trace", "--diff", str(out), str(out)).code == 0
    if view == "text":
        assert run(*words[:-2], "--view", view, "--position", "1").code == 0


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


def test_lines_show_the_tokens_of_the_prompt_and_the_candidates(run: Run) -> None:
    out = run(*TRACE, "--prompt-rows", "--candidates", "3").out
    names = [line[5:9].strip() for line in out.splitlines() if line[:4].strip().isdigit()]
    assert names[:7] == list("he␣king")
    assert sum("candidates" in line for line in out.splitlines()) == len(names)


def test_forced_text_is_generated_first(run: Run) -> None:
    _, *steps, _ = objects(run(*TRACE, "--json", "--force", " is"))
    assert "".join(step["text"] for step in steps[:3]) == " is"
    assert [step["given"] for step in steps] == [True] * 3 + [False] * 3
    result = run("generate", *TRACE[1:], "--force", " is", "--json")
    facts = json.loads(result.out)
    assert facts["text"].startswith(" is")
    assert facts["n_forced"] == 3
    expected = sum(step["log_probability"] for step in steps[:3])
    assert facts["forced_log_probability"] == pytest.approx(expected, abs=1e-5)
    assert "ln p of the 3 forced tokens" in result.err


def test_tracing_nothing_is_refused_with_the_remedy(run: Run) -> None:
    result = run("generate", "The king", "--max-new-tokens", "0")
    assert result.code == 2
    assert "attention-trace with --max-new-tokens 0" in result.err


@pytest.mark.integration
@pytest.mark.parametrize("measure", ["logit", "gradient", "integrated"])
def test_signed_rows_and_parts_add_up_to_the_logit(run: Run, tmp_path: Path, measure: str) -> None:
    words = [*TRACE, "--measure", measure, "--prompt-rows", "--against", "be"]
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


@pytest.mark.integration
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
        (["--ablate-mean"], "--ablate-mean has no effect without --ablate"),
        (["--ablate", "0.0", "--compile"], "--compile has no effect with --ablate"),
    ],
)
def test_invalid_interventions_are_usage_errors(
    run: Run, command: str, words: list[str], says: str
) -> None:
    result = run(command, "The king", *words)
    assert result.code == 2
    assert says in result.err


@pytest.mark.integration
def test_defaults_are_40_new_tokens_for_a_trace_and_256_for_generate(run: Run) -> None:
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


def test_positions_of_sources_are_listed_with_the_tokens_of_the_prompt(run: Run) -> None:
    out = run(*TRACE).out
    listed = dict(re.findall(r"(\d+) (\S+)", out[out.index("prompt") : out.index("from 8 on")]))
    assert "".join(listed.values()) == "The␣king"
    assert list(map(int, listed)) == list(range(8))
    for line in out.splitlines():
        if line[:4].strip().isdigit():
            sources = line[line.index("%") + 1 :]
            for position, name in re.findall(r" (\d+) (\S+) +\d+%", sources):
                assert listed.get(position, name) == name
