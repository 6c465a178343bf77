"""minigpt heads prints the roles and ablation costs computed by the library."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Run, error_line
from laid_out import in_int8
from small_models import small_model

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.analysis.roles import head_effects, head_logits, head_roles


@pytest.fixture
def folder(workplace: Path) -> Path:
    """Return a model of two layers with four heads, some of which have a role."""
    model = small_model("gpt2", vocab_size=257, context_length=64)
    write_model(workplace / "m", model, BytesTokenizer())
    return workplace / "m"


def found(run: Run, *words: str) -> dict[str, Any]:
    result = run("heads", *words, "--json")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    facts: dict[str, Any] = json.loads(result.out)
    return facts


@pytest.mark.integration
@pytest.mark.parametrize("quantize", [False, True])
def test_json_has_the_scores_tag_and_cost_of_each_head(
    run: Run, folder: Path, quantize: bool
) -> None:
    words = ["--model", str(folder), "--seed", "3", *(["--quantize", "int8"] if quantize else [])]
    facts, ablated = found(run, *words), found(run, *words, "--ablate")
    model = read_model(folder).model
    if quantize:
        model = in_int8(model)
    assert (facts["model"], facts["seed"], facts["n_repeated"]) == (str(folder), 3, 32)
    roles, effects = head_roles(model, seed=3), head_effects(model, seed=3)
    logits = head_logits(model, seed=3)
    assert logits is not None
    assert len(facts["heads"]) == 8
    for head, with_cost in zip(facts["heads"], ablated["heads"], strict=True):
        expected = vars(roles[head["layer"]][head["head"]])
        assert {name: head[name] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert head["logit_effect"] == pytest.approx(logits[head["layer"], head["head"]], abs=1e-5)
        assert head.keys() == {"layer", "head", "logit_effect", *expected}
        cost = with_cost.pop("loss_effect")
        assert cost == pytest.approx(effects[head["layer"], head["head"]], abs=1e-4)
        assert with_cost == head


def test_the_terminal_shows_a_grid_or_a_table_with_a_legend(run: Run, folder: Path) -> None:
    facts = found(run, "--model", str(folder))["heads"]
    grid, table = (
        run("heads", "--model", str(folder), "--view", view) for view in ("grid", "table")
    )
    assert (grid.code, grid.err, table.code) == (0, f"model {folder}\n", 0)
    assert run("heads", "--model", str(folder)).out == grid.out
    lines = grid.out.splitlines()
    assert lines[0].split() == ["layer", "h0", "h1", "h2", "h3"]
    for layer in (0, 1):
        tags = [head["tag"] or "·" for head in facts if head["layer"] == layer]
        assert lines[1 + 3 * layer].split() == [str(layer), *tags]
        logits = [
            f"{round(head['logit_effect'], 2) + 0.0:+.2f}"
            for head in facts
            if head["layer"] == layer
        ]
        assert lines[3 + 3 * layer].split() == logits
    for head in facts:
        scores = [head[name] for name in ("previous", "duplicate", "induction", "sink", "local")]
        row = re.search(rf"(?m)^{head['layer']}\.{head['head']} (.*)$", table.out)
        assert row is not None
        shown = [int(share) for share in re.findall(r"(\d+)%", row[1].replace("<1%", "0%"))]
        assert shown == [round(100 * score) for score in scores]
    for result in (grid, table):
        legend = " ".join(result.out.split("\n\n")[1].split())
        assert legend.startswith("Shares of attention on 32 random tokens followed by a copy.")
        assert all(len(line) <= 100 for line in result.out.splitlines())


def test_heads_are_listed_by_cost_largest_first(run: Run, folder: Path) -> None:
    result = run("heads", "--model", str(folder), "--ablate")
    facts = found(run, "--model", str(folder), "--ablate")["heads"]
    assert result.code == 0
    shown = re.findall(r"(\d)\.(\d) +([+-]\d+\.\d{3})", result.out)
    facts.sort(key=lambda head: -head["loss_effect"])
    assert [(int(layer), int(head)) for layer, head, _ in shown] == [
        (head["layer"], head["head"]) for head in facts
    ]
    assert [float(cost) for *_, cost in shown] == pytest.approx(
        [head["loss_effect"] for head in facts], abs=6e-4
    )


def test_the_seed_determines_the_tokens(run: Run, folder: Path) -> None:
    words = ["--model", str(folder)]
    assert found(run, *words, "--seed", "0") == found(run, *words)
    assert found(run, *words, "--seed", "1")["heads"] != found(run, *words)["heads"]


def test_the_newest_run_is_used_by_default(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained)
    facts = found(run)
    assert Path(facts["model"]).parent == Path("checkpoints/tiny")
    assert len(facts["heads"]) == 4


@pytest.mark.parametrize(
    ("words", "code", "parts"),
    [
        ("--model nothing", 4, ["'nothing'"]),
        ("--view gird", 2, ["'gird'", "Did you mean grid?"]),
        ("--seed x", 2, ["--seed takes a whole number: it is 'x'"]),
        ("--seed -1", 2, ["seed must be", "it is -1"]),
        ("--seed 99999999999999999999", 2, ["seed must be"]),
        ("--threads 0", 2, ["threads must be at least 1: it is 0"]),
        ("--device cuda:9", 2, ["'cuda:9'"]),
    ],
)
def test_invalid_options_are_refused_in_one_line(
    run: Run, folder: Path, words: str, code: int, parts: list[str]
) -> None:
    given = words.split()
    result = run("heads", *(given if "--model" in given else ["--model", str(folder), *given]))
    line = error_line(result)
    assert result.code == code
    assert all(part in line for part in parts), line


def test_damaged_and_too_small_models_are_refused(run: Run, workplace: Path) -> None:
    model = small_model(vocab_size=257, context_length=4)
    write_model(workplace / "small", model, BytesTokenizer())
    result = run("heads", "--model", str(workplace / "small"))
    assert result.code == 2
    assert "a context of at least 6 positions" in error_line(result)
    for damaged in ("blocks.1.attention.query.weight", "blocks.1.mlp.down.weight"):
        model = small_model(vocab_size=257)
        with torch.no_grad():
            model.get_parameter(damaged)[0, 0] = math.nan
        write_model(workplace / damaged, model, BytesTokenizer())
        result = run("heads", "--model", str(workplace / damaged))
        assert result.code == 4
        assert "its weights are damaged" in error_line(result)
