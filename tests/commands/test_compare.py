"""minigpt compare: runs, resuming, and the table, JSON and picture."""

import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from calls import Run, error_line

from minigpt.format import short
from minigpt.settings import read_toml
from minigpt.training import trainer as training
from minigpt.training.trainer import Trainer

_SETTINGS = """
model.context_length=32 model.n_layer=1 model.n_head=2 model.d_model=32 model.d_mlp=48
training.batch_size=2 training.eval_tokens=256 training.log_every=1
"""
SETTINGS = [word for setting in _SETTINGS.split() for word in ("--set", setting)]
TINY = ["corpus.txt", "--tokenizer", "bytes", *SETTINGS]
TWO = [*TINY, "--variants", "scaled_dot,additive", "--budget", "steps:4", "--seeds", "2"]


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


def weights(name: str) -> bytes:
    return Path("checkpoints", name, "step-000004/model.safetensors").read_bytes()


def events(name: str, kind: str) -> list[dict[str, Any]]:
    lines = Path("checkpoints", name, "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def stop_at(monkeypatch: pytest.MonkeyPatch, n_steps: int) -> None:
    """Simulate Ctrl-C during the n-th step, counted over all runs."""
    take_step, n_taken = Trainer.take_step, 0

    def stopped(self: Trainer) -> bool:
        nonlocal n_taken
        n_taken += 1
        if n_taken == n_steps:
            os.kill(os.getpid(), signal.SIGINT)
        return take_step(self)

    monkeypatch.setattr(Trainer, "take_step", stopped)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("budget", "settings", "notes"),
    [
        ("steps:2", ["max_steps=9", "max_epochs=1.0"], ["max_steps", "max_epochs"]),
        ("steps", ["max_steps=2", "max_minutes=1.0"], ["max_minutes"]),
        ("steps:2", ["shard=true"], ["shard"]),
        ("steps:2", ["optimizer=adamw", "momentum=0.5"], ["momentum"]),
    ],
)
def test_a_setting_without_effect_on_a_comparison_is_named(
    budget: str, settings: list[str], notes: list[str], run: Run
) -> None:
    words = [word for setting in settings for word in ("--set", f"training.{setting}")]
    result = run("compare", *TINY, "--variants", "dot", "--seeds", "1", "--budget", budget, *words)
    assert result.code == 0
    assert re.findall(r"training\.(\w+) has no effect", result.err) == notes


@pytest.mark.integration
def test_table_json_and_metrics_agree(run: Run) -> None:
    result = run("compare", *TINY, "--variants", "dot,lstm,lstm-attention", "--budget", "steps:4")
    assert result.code == 0, result.err
    as_json = run(
        "compare", *TINY, "--variants", "dot,lstm,lstm-attention", "--budget", "steps:4", "--json"
    )
    facts = json.loads(as_json.out)
    assert (facts["is_complete"], facts["budget"]) == (True, {"kind": "steps", "amount": 4})
    losses = [variant["val_loss"] for variant in facts["variants"]]
    assert losses == sorted(losses)
    head, *rows = [line.split() for line in result.out.splitlines()[2:]]
    assert " ".join(head) == "variant params runs val loss bits/byte train decode cache"
    assert "mean ± sample standard deviation" in result.out
    assert all(len(line) <= 100 for line in result.out.splitlines())
    for row, variant in zip(rows, facts["variants"], strict=True):
        name, n_parameters, n_runs, loss, _, spread, bits, train, decode, cache = row
        assert (name, int(n_runs)) == (variant["variant"], 3)
        assert n_parameters == short(variant["n_parameters"])
        assert float(loss) == pytest.approx(variant["val_loss"], abs=5e-5)
        assert float(spread) == pytest.approx(variant["val_loss_spread"], abs=5e-5)
        assert float(bits) == pytest.approx(variant["bits_per_byte"], abs=5e-5)
        assert train == short(variant["train_tokens_per_s"])
        assert re.fullmatch(r"[\d.]+k?", decode)
        assert variant["decode_tokens_per_s"] > 0
        assert int(cache) == variant["cache_bytes_per_token"]
        assert [one["seed"] for one in variant["runs"]] == [1337, 1338, 1339]
        for one in variant["runs"]:
            best = min(events(one["name"], "eval"), key=lambda event: event["val_loss"])
            assert one["val_loss"] == best["val_loss"]
            assert one["bits_per_byte"] == best["bits_per_byte"]
            assert one["steps"] == 4


@pytest.mark.integration
def test_each_compared_run_equals_a_training_run_with_the_same_settings(run: Run) -> None:
    assert run("compare", *TWO, "--name", "cmp").code == 0
    # Like train, compare derives dropout and averaging from the text, but never stops a run early.
    words = ["--max-steps", "4", "--set", "training.eval_every=1", "--patience", "0"]
    assert run("train", *TINY, *words, "--name", "own", "--seed", "1338").code == 0
    assert weights("own") == weights("cmp-scaled_dot-s1338")
    own, compared = (
        read_toml(Path("checkpoints", name, "config.toml"))
        for name in ("own", "cmp-scaled_dot-s1338")
    )
    assert "compare corpus.txt" in compared["command"]
    assert own | {"command": ""} == compared | {"command": ""}
    assert own["model"]["dropout"] > 0
    assert own["training"]["average"] > 0
    result = run("generate", "--model", "cmp-additive-s1337", "--max-new-tokens", "3", "The")
    assert result.code == 0
    assert run("plot", "cmp-additive-s1337", "cmp-scaled_dot-s1337").code == 0


@pytest.mark.integration
def test_all_variants_of_a_seed_see_the_same_tokens_in_the_same_order(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[list[int]]] = {}
    batch, loss = training.batch, Trainer._accumulate_gradients

    def accumulate(self: Trainer) -> Any:
        def recorded(*words: Any, **options: Any) -> Any:
            inputs, targets = batch(*words, **options)
            seen.setdefault(self.folder.path.name, []).append(inputs.flatten().tolist())
            return inputs, targets

        monkeypatch.setattr(training, "batch", recorded)
        return loss(self)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", accumulate)
    words = [*TINY, "--variants", "scaled_dot,general,lstm", "--budget", "steps:3", "--seeds", "2"]
    assert run("compare", *words, "--name", "cmp").code == 0
    for seed in (1337, 1338):
        orders = [seen[f"cmp-{name}-s{seed}"] for name in ("scaled_dot", "general", "lstm")]
        assert len(orders[0]) == 3
        assert orders[0] == orders[1] == orders[2]
    assert seen["cmp-lstm-s1337"] != seen["cmp-lstm-s1338"]


@pytest.mark.integration
def test_after_ctrl_c_the_same_command_resumes_to_the_same_bits(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("compare", *TWO, "--name", "whole").code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4 + 2)
        result = run("compare", *TWO, "--name", "parted")
    assert result.code == 130
    assert [line.split()[0] for line in result.out.splitlines()[3:]] == ["scaled_dot"]
    assert "1 of 4 runs are finished. Resume with:" in result.err
    assert "compare corpus.txt" in result.err.splitlines()[-1]
    assert [p.name for p in Path("checkpoints/parted-additive-s1337").glob("step-*")] == [
        "step-000002"
    ]
    first = Path("checkpoints/parted-scaled_dot-s1337/metrics.jsonl")
    before = first.stat().st_mtime_ns
    again = run("compare", *TWO, "--name", "parted")
    assert again.code == 0, again.err
    assert first.stat().st_mtime_ns == before
    assert "run 1 of 4" not in again.err
    assert "from step 2 on" in again.err
    for variant in ("scaled_dot", "additive"):
        for seed in (1337, 1338):
            assert weights(f"parted-{variant}-s{seed}") == weights(f"whole-{variant}-s{seed}")
    third = run("compare", *TWO, "--name", "parted")
    assert "run " not in third.err, "nothing must be left to do"
    losses = [[line.split()[:6] for line in r.out.splitlines()] for r in (again, third)]
    assert losses[0] == losses[1]


@pytest.mark.integration
@pytest.mark.parametrize("budget", ["steps:2", "seconds:0.001"])
def test_the_same_command_finds_its_runs_despite_derived_evaluation_settings(
    run: Run, budget: str
) -> None:
    words = [*TINY[:3], *SETTINGS[: SETTINGS.index("training.eval_tokens=256") - 1]]
    words += ["--variants", "scaled_dot", "--seeds", "1", "--budget", budget]
    first, again = (run("compare", *words, "--json") for _ in range(2))
    assert (first.code, again.code) == (0, 0), again.err
    assert "run 1 of 1" in first.err
    assert "run 1 of 1" not in again.err, "nothing must be left to do"
    losses = [json.loads(result.out)["variants"][0]["val_loss"] for result in (first, again)]
    assert losses[0] == losses[1]


def test_the_command_to_resume_reads_standard_input_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_at(monkeypatch, 2)
    result = run("compare", "-", *TWO[1:], stdin=Path("corpus.txt").read_bytes())
    assert result.code == 130
    assert result.err.splitlines()[-1].endswith(" < THE_SAME_TEXT")


def test_ctrl_c_in_the_first_run_prints_no_table(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 2)
    result = run("compare", *TWO)
    assert (result.code, result.out) == (130, "")
    assert "0 of 4 runs are finished" in result.err


@pytest.mark.integration
def test_more_seeds_and_variants_are_added_to_the_existing_runs(run: Run) -> None:
    words = [*TINY, "--budget", "steps:2", "--seeds"]
    assert run("compare", *words, "1", "--variants", "lstm").code == 0
    result = run("compare", *words, "2", "--variants", "dot,lstm", "--json")
    assert re.findall(r"run \d of \d: (.*)", result.err) == [
        "dot, seed 1337",
        "dot, seed 1338",
        "lstm, seed 1338",
    ]
    found = {v["variant"]: len(v["runs"]) for v in json.loads(result.out)["variants"]}
    assert found == {"dot": 2, "lstm": 2}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--budget", "steps:5"], "with another training.max_steps: 4, not 5"),
        (["--set", "training.lr=0.5"], "with another training.lr: 0.006, not 0.5"),
        (["--set", "model.d_mlp=50"], "with another model.d_mlp: 48, not 50"),
    ],
)
def test_comparing_with_other_settings_under_the_same_name_is_an_error(
    run: Run, change: list[str], message: str
) -> None:
    words = [*TINY, "--variants", "scaled_dot", "--seeds", "1", "--name", "cmp"]
    assert run("compare", *words, "--budget", "steps:4").code == 0
    result = run("compare", *words, "--budget", "steps:4", *change)
    assert result.code == 2
    line = error_line(result)
    assert "the run 'cmp-scaled_dot-s1337'" in line
    assert message in line


@pytest.mark.integration
def test_another_text_under_the_same_name_is_an_error_unless_it_was_moved(run: Run) -> None:
    words = [*TINY[1:], "--variants", "dot", "--seeds", "1", "--budget", "steps:2", "--name", "cmp"]
    assert run("compare", "corpus.txt", *words).code == 0
    shutil.copy("corpus.txt", "moved.txt")
    assert run("compare", "moved.txt", *words).code == 0
    Path("corpus.txt").write_text("To be, or not to be. " * 90)
    result = run("compare", "corpus.txt", *words)
    assert result.code == 2
    assert "the run 'cmp-dot-s1337' exists with another text" in error_line(result)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--variants", "scaled_dott"], ["'scaled_dott'", "Did you mean scaled_dot?"]),
        (["--budget", "flops:1e30"], ["--budget flops:1e+30 is up to", "Give fewer"]),
        (["--budget", "hours"], ["--budget 'hours'", "steps, seconds, flops"]),
        (["--seeds", "0"], ["seeds must be at least 1: it is 0"]),
        (["--name", "a/b"], ["--name 'a/b'", "is not a folder name"]),
        (["--set", "model.arch=lstm"], ["model.arch is 'lstm'", "--variants"]),
        (["--set", "from=x"], ["from is 'x'", "random weights"]),
        (
            ["--set", "model.d_mlp=1", "--set", "model.d_head=32", "--variants", "concat"],
            ["no d_mlp", "3%"],
        ),
        (["--out", "x.pdf"], ["--out must end in .png or .svg"]),
        (["--budget", "steps", "--set", "training.max_minutes=1"], ["as in steps:500"]),
    ],
)
def test_usage_errors_of_compare_are_one_line(run: Run, words: list[str], parts: list[str]) -> None:
    result = run("compare", *TINY, *words)
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in parts), line
    assert not Path("checkpoints").exists()


def test_a_diverging_variant_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Trainer._accumulate_gradients

    def nan_loss(self: Trainer) -> torch.Tensor:
        return loss(self) * (math.nan if self.config.model.attention == "additive" else 1)

    monkeypatch.setattr(Trainer, "_accumulate_gradients", nan_loss)
    result = run("compare", *TWO, "--name", "cmp")
    assert (result.code, result.out) == (5, ""), result.err
    line = result.err.splitlines()[-1]
    assert line.startswith("error: 'cmp-additive-s1337': training diverged at step 1")
    assert line.endswith(
        "--set training.lr=N and another --name, or leave additive out of --variants."
    )
    assert weights("cmp-scaled_dot-s1337")


@pytest.mark.integration
def test_the_weights_of_a_run_that_diverged_are_not_mixed_with_other_settings(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*TINY, "--variants", "dot", "--seeds", "1", "--budget", "steps:4", "--name", "cmp"]
    loss = Trainer._accumulate_gradients
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "_accumulate_gradients",
            lambda self: loss(self) * (math.nan if self.step == 3 else 1),
        )
        assert run("compare", *words).code == 5
    assert list(Path("checkpoints/cmp-dot-s1337").glob("step-*")), "its best weights"
    result = run("compare", *words, "--set", "training.lr=0.001")
    assert result.code == 2
    assert "exists with another training.lr" in error_line(result)
    assert run("compare", *words).code == 0


@pytest.mark.integration
def test_the_picture_has_a_line_per_run_and_a_name_per_variant(run: Run) -> None:
    pytest.importorskip("matplotlib", reason="needs pip install 'minigpt-attention[plot]'")
    result = run("compare", *TWO, "--out", "losses.svg", "--x", "tokens")
    assert result.code == 0
    assert result.err.endswith("wrote losses.svg\n")
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.parse("losses.svg").getroot()
    texts = [element.text for element in picture.iter(f"{svg}text")]
    assert (texts.count("scaled_dot"), texts.count("additive"), texts.count("tokens")) == (1, 1, 1)
    marks = [
        e for e in picture.iter(f"{svg}use") if "y" in e.attrib and "fill" in e.get("style", "")
    ]
    assert len([e for e in marks if "#4c9bc6" in e.get("style", "")]) == 2 * 4 + 1


@pytest.mark.integration
def test_a_budget_in_seconds_ends_every_run(run: Run) -> None:
    words = [*TINY, "--variants", "dot,additive", "--seeds", "1", "--budget", "seconds:0.1"]
    facts = json.loads(run("compare", *words, "--json").out)
    for variant in facts["variants"]:
        (one,) = variant["runs"]
        *earlier, last = [event["elapsed_s"] for event in events(one["name"], "step")]
        assert all(seconds < 0.1 for seconds in earlier), "no step may start after the budget"
        assert one["seconds"] == last >= 0.1
        assert one["steps"] == pytest.approx(
            one["seconds"] * variant["train_tokens_per_s"] / (2 * 32)
        )


def test_cache_bytes_are_those_of_the_variant(run: Run) -> None:
    words = [*TINY, "--variants", "lstm", "--seeds", "1", "--budget", "steps:1", "--name", "cmp"]
    (variant,) = json.loads(run("compare", *words, "--json").out)["variants"]
    model = read_toml(Path("checkpoints/cmp-lstm-s1337/config.toml"))["model"]
    assert variant["cache_bytes_per_token"] == 2 * 4 * model["d_model"]
