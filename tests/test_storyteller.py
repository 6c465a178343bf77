"""The bundled model: its card, its size, and the numbers that the card states."""

import random
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import minigpt
from minigpt.checkpoint.resolve import resolve_model, shown_name
from minigpt.generation.loading import load
from minigpt.tracing.analysis.roles import head_roles

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
MODEL = ROOT / "checkpoints" / "storyteller"
CARD = (MODEL / "README.md").read_text(encoding="utf-8")


def test_the_bundled_model_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_model(None) == resolve_model("storyteller") == MODEL
    assert shown_name(MODEL) == "storyteller"


def test_the_bundled_model_is_smaller_than_24_mb() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 24e6


@pytest.mark.integration
def test_the_bundled_model_generates_text() -> None:
    options = {"seed": 6, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 100}
    prompt = "Far away, by the sea, there lived"
    steps = list(minigpt.generate("storyteller", prompt, **options))
    assert len(steps) > 5
    assert "".join(step.text for step in steps).strip()


# Names that occur in none of its training texts.
NAMES = [
    "Zilpo",
    "Windundum",
    "Jupuna",
    "Querlo",
    "Monuna",
    "Gremapek",
    "Winarbek",
    "Soberuna",
    "Jolobi",
    "Piterlo",
]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the namespace of benchmarks/storyteller.py, which built and measures the model."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "storyteller.py"))


@pytest.mark.integration
def test_unseen_names_are_repeated_unless_the_induction_head_is_ablated(
    script: dict[str, Any],
) -> None:
    assert script["n_repeated"](NAMES, None) >= 7
    assert script["n_repeated"](NAMES, "4.1") <= 1


def test_grammar_tales_are_complete_distinct_and_reproducible() -> None:
    grammar = runpy.run_path(str(BENCHMARKS / "tale_grammar.py"))
    tales = [grammar["tell"](random.Random(seed)) for seed in range(300)]
    assert tales[0] == grammar["tell"](random.Random(0))
    assert len(set(tales)) == len(tales)
    assert not any(re.search(r"[\[\]{}|]|\b[Aa] [aeiou]|  ", tale) for tale in tales)


@pytest.mark.parametrize("seed", range(3))
def test_the_bundled_model_has_an_induction_head(seed: int) -> None:
    layers = head_roles(load(MODEL).model, seed=seed)
    roles = {f"{i}.{j}": role.tag for i, row in enumerate(layers) for j, role in enumerate(row)}
    assert roles["4.1"] == "induc"
    assert "head 4.1" in CARD


def test_every_line_of_a_sample_in_the_model_card_is_quoted() -> None:
    samples = CARD.partition("\nseed 1:\n")[2].splitlines()
    assert len(samples) > 50
    for line in samples:
        assert re.match(r"(> \S|>$|$|seed \d+:$)", line)
        assert "> >" not in line


@pytest.mark.integration
@pytest.mark.parametrize("name", ["short-tales-held-out", "told-held-out"])
def test_the_model_card_states_the_measured_loss_on_held_out_tales(
    name: str, script: dict[str, Any], shared: Path, tmp_path: Path
) -> None:
    claimed = re.search(rf"\| {name} \| ([\d.]+) \| ([\d,]+) \|", CARD)
    assert claimed
    script["write"](tmp_path, name, script["texts"](shared / "data")[name])
    facts = minigpt.evaluate("storyteller", tmp_path / f"{name}.jsonl")
    assert facts["bits_per_byte"] == pytest.approx(float(claimed[1]), abs=0.003)
    assert f"{facts['n_tokens']:,}" == claimed[2]
