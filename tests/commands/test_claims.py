"""minigpt claims: each claim as text, JSON and a picture."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from calls import Run, error_line

from minigpt.studies.claims import learning


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make --quick faster: these tests check the format of the output, not its numbers."""
    size = learning.Size(
        n_steps=2,
        batch_tokens=64,
        stages=(8,),
        d_model=16,
        distances=(8, 12),
        n_sequences=2,
        lengths=(8, 16),
        step_tokens=16,
        n_repeats=1,
        timed_d_model=16,
    )
    monkeypatch.setattr(learning, "QUICK", size)


@pytest.mark.integration
def test_each_claim_shows_a_table_a_judgement_and_reasons(run: Run) -> None:
    result = run("claims", "--quick")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    for claim in ("long-range", "explainable", "parallel"):
        (verdict,) = [line for line in lines if line.startswith(f"{claim}: ")]
        assert verdict.endswith("borne out") or verdict.endswith("in part")
        assert lines[lines.index(verdict) + 1].startswith("- ")
    header = next(line for line in lines if line.startswith("recall: % right"))
    assert header.split()[-2:] == ["8", "12"]


@pytest.mark.integration
def test_json_has_a_line_per_requested_claim(run: Run) -> None:
    result = run("claims", "parallel", "long-range", "--quick", "--json", "--seeds", "2")
    assert result.code == 0, result.err
    parallel, long_range = (json.loads(line) for line in result.out.splitlines())
    assert [parallel["claim"], long_range["claim"]] == ["parallel", "long-range"]
    assert {one["arch"] for one in parallel["measured"]} == {"lstm", "gpt"}
    kinds = [(one["task"], one["arch"], one["seed"]) for one in long_range["measured"]]
    archs = ("lstm", "lstm-attention", "gpt")
    assert kinds == [(t, a, s) for t in ("recall", "copy") for a in archs for s in (0, 1)]
    for one in long_range["measured"]:
        assert len(one["accuracy"]) == len(one["distances"]) == 2
    assert all(isinstance(reason, str) for reason in parallel["reasons"])


@pytest.mark.integration
def test_out_writes_claims_json_and_pictures(run: Run) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    result = run("claims", "--quick", "--json", "--out", "found/here")
    assert result.code == 0, result.err
    folder = Path("found/here")
    assert (folder / "claims.json").read_text() == result.out
    for claim, words in (("long-range", {"recall", "copy", "gpt"}), ("parallel", {"cpu", "lstm"})):
        picture = ElementTree.fromstring((folder / f"{claim}.svg").read_bytes())
        texts = {e.text for e in picture.iter("{http://www.w3.org/2000/svg}text")}
        assert words <= texts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["paralel"], "Did you mean parallel?"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--seeds", "two"], "takes a whole number"),
    ],
)
def test_usage_errors_of_claims_are_one_line(run: Run, words: list[str], message: str) -> None:
    result = run("claims", *words)
    assert result.code == 2
    assert message in error_line(result)
