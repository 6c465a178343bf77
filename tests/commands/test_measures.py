"""minigpt measures prints the library's results as a table, JSON and a picture."""

import json
from pathlib import Path

import pytest
from calls import Run, error_line
from small_models import small_model

from minigpt.checkpoint.model_folder import write_model
from minigpt.commands.measures import _table
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.faithfulness import METRICS, Comparison, Faithfulness, Interval

WORDS = ("--max-new-tokens", "3", "--seed", "5", "--only", "weight,norm", "to be or not to")


@pytest.fixture
def folder(workplace: Path) -> Path:
    model = small_model("gpt2", vocab_size=257, context_length=64)
    write_model(workplace / "m", model, BytesTokenizer())
    return workplace / "m"


@pytest.mark.integration
def test_json_and_table_have_the_same_means(run: Run, folder: Path) -> None:
    result = run("measures", "--model", str(folder), *WORDS, "--json")
    assert result.code == 0, result.err
    facts = json.loads(result.out)
    names = ["weight", "norm", "distance", "random", "exact"]
    assert [one["name"] for one in facts["results"]] == names
    assert (facts["model"], facts["seed"], facts["n_tokens"]) == (str(folder), 5, 3)
    shown = run("measures", "--model", str(folder), *WORDS)
    assert shown.code == 0
    assert f"model {folder}" in shown.err
    for one in facts["results"]:
        for interval in one["metrics"].values():
            cell = "{mean:z.2f} [{low:z.2f}, {high:z.2f}]".format(**interval)
            assert cell in shown.out
    exact = facts["results"][-1]["metrics"]
    assert exact["rank_correlation"]["mean"] == pytest.approx(1)


def test_the_widest_interval_does_not_touch_the_next_column() -> None:
    widest = Interval(-0.28, -0.48, -0.08, 9)
    results = (Faithfulness("weight", dict.fromkeys(METRICS, widest)),)
    lines = _table(Comparison(results, 9, 9, 9.0, "", {}), 130)
    rows = ["".join(text for text, _ in line) for line in lines]
    [row] = [row for row in rows if row.startswith("weight")]
    assert row.split("  ")[-5:] == ["-0.28 [-0.48, -0.08]"] * 5


@pytest.mark.integration
def test_measures_writes_a_picture(run: Run, folder: Path) -> None:
    pytest.importorskip("matplotlib")
    words = ("measures", "--model", str(folder), *WORDS, "--picture")
    assert run(*words, "m.svg").code == 0
    picture = Path("m.svg").read_text()
    assert "rank correlation" in picture
    assert "weight" in picture
    for name, problem in (("m.txt", "must end in .svg"), ("no/m.svg", "there is no folder")):
        refused = run(*words, name)
        assert refused.code == 2
        assert problem in error_line(refused)


def test_bad_input_of_measures_is_a_one_line_error(run: Run, folder: Path) -> None:
    words = ("measures", "--model", str(folder), "--max-new-tokens", "3")
    for more, code, message in (
        (("--only", "weight,vibes"), 2, "there is no measure 'vibes'"),
        (("--only", ""), 2, "there is no measure ''"),
        (("--sink", "40", "to be or not to"), 2, "the sink must be a position of the prompt"),
        (("--knockout", "head", "x"), 2, "--knockout"),
        (("--system", "x", "y"), 2, "--system has no effect without --chat"),
    ):
        refused = run(*words, *more)
        assert refused.code == code, refused.err
        assert message in error_line(refused)
        assert not refused.out
    short = run(*words, "--seed", "5", "to be")
    assert short.code == 3
    # The model is named before the work starts.
    named = f"model {folder}\nseed 5\nerror: no generated token has 10 positions"
    assert short.err.startswith(named)
