"""minigpt attention-trace --replay and --diff, and descriptions of signed rows."""

import gzip
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from calls import TRACE, Run, objects

from minigpt.tracing.spans import bar, heat, percent
from minigpt.tracing.wrapping import signed

pytestmark = pytest.mark.usefixtures("in_trained")


@pytest.mark.integration
def test_replay_prints_the_same_as_the_live_trace(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    for view in ("lines", "text", "matrix", "heads"):
        live = run(*TRACE, "--view", view, "--out", path, "--num-samples", "2", "--seed", "3")
        again = run("attention-trace", "--replay", path, "--view", view)
        assert again.out == live.out
        assert (again.code, again.err) == (0, "")
    assert run("attention-trace", "--replay", path, "--json").out == Path(path).read_text()


def test_a_file_of_several_traces_is_refused_where_one_is_needed(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    assert run(*TRACE, "--num-samples", "2", "--out", path).code == 0
    for option in ("--html", "--dense"):
        result = run("attention-trace", "--replay", path, option, str(tmp_path / "other"))
        assert (result.code, result.out) == (2, "")
        message = f"{option} takes one trace, but {path!r} has 2. Trace without --num-samples."
        assert result.err == f"error: {message}\n"


def test_a_replay_shows_more_sources_than_the_file_has(run: Run, tmp_path: Path) -> None:
    path = str(tmp_path / "t.jsonl")
    words = [*TRACE, "--seed", "1", "--measure", "both"]
    live = run(*words, "--n-sources", "7")
    run(*words, "--n-sources", "2", "--out", path)
    again = run("attention-trace", "--replay", path, "--n-sources", "7")
    assert (again.code, again.out) == (0, live.out)


@pytest.mark.parametrize("show", [percent, bar, heat, signed])
def test_numbers_are_shown_the_same_live_and_from_a_file(show: Callable[[float], str]) -> None:
    near = (0.005, 0.0149999996, 0.0150000004, 0.4500000004, 2.2499999997, 0.0499999998, 0.125)
    for number in (*near, *(-x for x in near)):
        assert show(number) == show(round(number, 6)), number


@pytest.mark.integration
def test_a_replay_shows_no_rest_if_all_positions_are_shown(run: Run, tmp_path: Path) -> None:
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


@pytest.mark.integration
def test_a_replay_with_dense_rows_chooses_heads_without_the_model(run: Run, tmp_path: Path) -> None:
    path, rows = str(tmp_path / "t.jsonl"), str(tmp_path / "t.rows")
    run(*TRACE, "--out", path, "--dense", rows, "--seed", "3")
    before = Path(rows).read_bytes()
    for words in (["--heads", "1.0"], ["--layers", "0", "--reduce", "max"], []):
        live = run(*TRACE, "--seed", "3", "--view", "text", *words)
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


def test_a_compressed_trace_is_refused_without_names_of_codecs(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}" * 100))
    refused = run("attention-trace", "--replay", str(path))
    assert refused.code == 3
    assert "is not a trace: it is not UTF-8 text" in refused.err
    assert "codec" not in refused.err


def test_diff_compares_two_files(run: Run, tmp_path: Path) -> None:
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    run(*TRACE, "--out", first)
    run(*TRACE, "--out", second, "--heads", "0.0", "--measure", "norm")
    lines = run("attention-trace", "--diff", first, second).out.splitlines()
    assert lines[0].startswith("first ")
    assert lines[1].endswith("norm of head 0.0")
    assert (
        sum(line.split()[0].isdigit() for line in lines if line) == 7
    )  # six tokens and the summary
    facts = objects(run("attention-trace", "--diff", first, second, "--json"))
    assert len(facts) == 6
    assert all(0 < step["moved"] < 1 for step in facts)
    run(*TRACE, "--out", first, "--measure", "both")  # only the first measure is compared
    lines = run("attention-trace", "--diff", first, second).out.splitlines()
    assert "weight, mean of all" in lines[0]
    same = run("attention-trace", "--diff", first, first, "--json")
    assert {step["moved"] for step in objects(same)} == {0}


WORDS_OF_WEIGHTS = re.compile(r"attend|attention|moved|\bshares?\b|looked|weight")


@pytest.mark.parametrize(
    ("measure", "view"),
    [*product(["logit", "gradient"], ["lines", "text", "matrix"]), ("logit", "heads")],
)
def test_views_of_signed_measures_do_not_mention_attention_weights(
    run: Run, measure: str, view: str
) -> None:
    shown = run(*TRACE, "--measure", measure, "--view", view, "--n-verified", "all").out
    knockout = (
        "the other weights grow to sum to 1"  # a description of hidden keys, not of the measure
    )
    assert not WORDS_OF_WEIGHTS.findall(" ".join(shown.split()).replace(knockout, ""))


@pytest.mark.integration
def test_a_diff_mentions_moved_attention_only_for_weights(run: Run, tmp_path: Path) -> None:
    for measure in ("weight", "norm", "logit"):
        path = str(tmp_path / measure)
        run(*TRACE, "--force", "abc", "--measure", measure, "--out", path, "--temperature", "0")

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
