"""minigpt train on small texts: derived settings, notes and saved models."""

import json
import math
import random
import re
import shlex
from pathlib import Path

import pytest
from calls import Run

from minigpt.commands.train import explanations
from minigpt.settings import read_toml

_SHAPE = """
--tokenizer bytes --context-length 32 --batch-size 2 --n-layer 1 --n-head 2 --d-model 32
--set model.d_mlp=32 --set training.context_warmup_length=0 --seed 1
"""
SHAPE = _SHAPE.split()


@pytest.fixture(autouse=True)
def corpus(workplace: Path) -> None:
    numbers = (str(pow(7, n, 10007)) for n in range(1100))
    (workplace / "corpus.txt").write_text(" ".join(numbers))


def config_of(name: str) -> dict[str, dict[str, float]]:
    return read_toml(Path("checkpoints") / name / "config.toml")


def best_of(name: str) -> dict[str, float]:
    facts: dict[str, float] = json.loads((Path("checkpoints") / name / "best.json").read_text())
    return facts


@pytest.mark.integration
def test_settings_derived_from_a_small_text_are_recorded_reported_and_resumed(run: Run) -> None:
    result = run("train", "corpus.txt", "--name", "small", "--max-steps", "40", *SHAPE)
    assert result.code == 0
    saved = config_of("small")
    assert saved["model"]["dropout"] > 0
    assert "note   no dropout in the first 1.5 epochs, then 0." in result.err
    for name in ("max_epochs", "average", "patience", "dropout_start", "eval_every", "eval_tokens"):
        assert saved["training"][name] > 0, name
    assert run("train", "--resume", "--name", "small").code == 0
    assert config_of("small") == saved


@pytest.mark.integration
def test_a_text_too_short_for_words_recommends_the_model_that_ships(
    run: Run, workplace: Path
) -> None:
    once = ["--max-steps", "1", *SHAPE]
    n_bytes = (workplace / "corpus.txt").stat().st_size
    note = f"note   {n_bytes:,} bytes are too few to learn most words"
    first = run("train", "corpus.txt", "--name", "short", *once).err
    assert note in first
    assert "--from storyteller" in first
    tuned = run("train", "corpus.txt", "--from", "short", "--context-length", "32", *once[:2])
    assert tuned.code == 0, tuned.err
    assert "too few" not in tuned.err
    assert "too few" not in run("train", "--resume", "--name", "short", "--max-steps", "2").err
    (workplace / "long.txt").write_text("a text of words " * 6250)  # 100,000 bytes
    assert "too few" not in run("train", "long.txt", *once).err


@pytest.mark.integration
def test_training_in_a_dtype_that_the_cpu_computes_slowly_is_noted(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(explanations, "has_fast_bfloat16", lambda _: False)
    words = ["train", "corpus.txt", "--max-steps", "1", "--device", "cpu", *SHAPE]
    assert "no bfloat16 instructions" in run(*words, "--dtype", "bfloat16", "--dry-run").err
    assert "no bfloat16 instructions" in run(*words, "--dtype", "bfloat16").err
    assert "no bfloat16 instructions" not in run(*words, "--dtype", "float32").err


@pytest.mark.integration
def test_explicit_settings_override_those_derived_from_the_text(run: Run) -> None:
    own = ["--dropout", "0", "--patience", "0", "--max-epochs", "1", "--eval-every", "7"]
    assert run("train", "corpus.txt", "--name", "own", *SHAPE, *own).code == 0
    saved = config_of("own")
    assert saved["model"]["dropout"] == 0
    assert (saved["training"]["patience"], saved["training"]["max_epochs"]) == (0, 1)
    assert saved["training"]["eval_every"] == 7
    result = run("train", "corpus.txt", "--name", "short", *SHAPE, "--max-epochs", "0.1")
    assert "epochs (--max-epochs)" not in result.err  # it is not a limit that was measured
    limits = ["--max-steps", "2", "--set", "training.max_epochs=0", "--dropout", "0.3"]
    result = run("train", "corpus.txt", *SHAPE, *limits, "--set", "training.dropout_start=1.0")
    assert "for a text of this size" not in result.err


@pytest.mark.integration
def test_a_larger_budget_gives_the_same_model_once_the_text_is_learned(run: Run) -> None:
    few = ["--set", "training.lr=0.003"]
    for steps in ("1500", "5000"):
        assert (
            run("train", "corpus.txt", "--name", steps, "--max-steps", steps, *SHAPE, *few).code
            == 0
        )
    assert best_of("1500") == best_of("5000")
    assert config_of("5000")["training"]["max_steps"] < 1500


@pytest.mark.integration
def test_the_last_lines_explain_the_loss_as_a_perplexity(run: Run) -> None:
    result = run("train", "corpus.txt", "--name", "said", "--max-steps", "20", *SHAPE)
    said = re.search(r"perplexity ([\d.]+): .*untrained: (\d+),", result.err)
    assert said
    assert float(said[1]) == pytest.approx(math.exp(best_of("said")["val_loss"]), rel=0.006)


@pytest.mark.integration
def test_overfitting_and_early_stopping_are_reported(run: Run) -> None:
    letters = random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=900)
    Path("corpus.txt").write_text("".join(letters))
    rates = ["--set", "training.lr=0.02", "--set", "training.embedding_lr=0.02"]
    words = ["--max-epochs", "60", "--dropout", "0", "--patience", "2", *SHAPE, *rates]
    words += ["--n-layer", "2", "--set", "model.d_mlp=96"]
    result = run("train", "corpus.txt", "--name", "heart", *words)
    assert result.code == 0
    assert "stopped early: no lower validation loss since" in result.err
    assert "--patience 0 trains on" in result.err
    words[words.index("2")] = "0"
    result = run("train", "corpus.txt", "--name", "learned", *words)
    assert "stopped early" not in result.err
    assert "the model overfitted: at the end the training loss was" in result.err
    assert "The best checkpoint is from before that; more text would" in result.err
    words[words.index("60")] = "30"
    result = run("train", "corpus.txt", *words, "--eval-every", "0", "--save-every", "0")
    assert "nats/token. More text would make it better" in result.err


@pytest.mark.integration
def test_a_model_of_a_repetitive_text_is_not_reported_as_overfitted(run: Run) -> None:
    Path("corpus.txt").write_text("one, two, three, four.\n" * 100)
    rates = ["--set", "training.lr=0.02", "--set", "training.embedding_lr=0.02"]
    words = ["--max-steps", "60", "--dropout", "0", *SHAPE, *rates]
    result = run("train", "corpus.txt", "--name", "same", *words)
    assert best_of("same")["val_loss"] < 0.1
    assert "overfitted" not in result.err


@pytest.mark.integration
def test_a_resumed_budget_that_lifts_the_epoch_limit_is_reported(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "lifted", "--max-steps", "9", *SHAPE).code == 0
    resume = ["train", "--resume", "--name", "lifted", "--dry-run", "--json"]
    result = run(*resume, "--max-steps", "90000")
    assert result.code == 0
    assert re.search(
        r"--max-steps 90000 lifts this run's limit of \S+ epochs \(\d+ steps\)", result.err
    )
    for words in ([], ["--max-steps", "12"], ["--max-steps", "90000", "--max-epochs", "2"]):
        assert "lifts" not in run(*resume, *words).err


@pytest.mark.parametrize(
    ("line", "starts"),
    [
        ("A shy hen went to the market. ", ("A shy hen went",)),
        ("从前有一座山。山上有一座庙。庙里有个老和尚。", ("从前", "山上", "庙里")),
        ("def area(w, h):\n    return w * h\n", ("def area(w, h):", "return w * h")),
    ],
)
def test_the_suggested_prompt_is_an_opening_of_the_text(
    run: Run, line: str, starts: tuple[str, ...]
) -> None:
    Path("mine.txt").write_text(line * 400)
    result = run("train", "mine.txt", "--name", "mine", "--max-steps", "1", *SHAPE)
    proposed = [line for line in result.err.splitlines() if " generate --model mine " in line]
    text = shlex.split(proposed[0])[-1]
    assert text.startswith(starts)
    assert text in " ".join((line * 4).split())
