"""minigpt train --from: default settings for a run, a small model and a large one."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import Run, evaluations

from minigpt.commands.train.finetune import Base, finetuning_config, read_base
from minigpt.config import DataConfig, ModelConfig
from minigpt.model.gpt import GPT
from minigpt.settings import read_toml
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.text.tokens import prepare

SHORT = ["--max-steps", "6", "--context-length", "32", "--batch-size", "2", "--save-every", "3"]


@pytest.fixture
def at_text(trained: Path, workplace: Path) -> Path:
    """Return the working directory with a text and a copy of the tiny run."""
    (workplace / "text.txt").write_text("The king said: once upon a time.\n" * 120)
    shutil.copytree(trained / "checkpoints", workplace / "checkpoints")
    return workplace


@pytest.mark.integration
def test_fine_tuning_can_start_from_a_run_by_its_name(run: Run, at_text: Path) -> None:
    result = run("train", "text.txt", "--from", "tiny", "--max-steps", "2")
    assert result.code == 0
    first = re.search(r"step +0  val loss ([\d.]+) nats/token", result.err)
    assert first
    loss = float(first[1])
    assert f"(before fine-tuning: {math.exp(loss):.3g}, {loss:.2f} nats/token)" in result.err
    config = read_toml(Path("checkpoints/text-tiny/config.toml"))
    before = read_toml(Path("checkpoints/tiny/config.toml"))
    assert config["from"] == "checkpoints/tiny/step-000004"
    assert config["model"] == before["model"]
    assert config["data"]["tokenizer"] == "bytes"
    assert config["training"]["sequence_length"] == config["model"]["context_length"] == 64
    assert config["training"]["optimizer"] == "adamw"
    assert config["training"]["lr"] < before["training"]["lr"]
    assert run("train", "text.txt", "--from", "checkpoints/tiny/step-000004", *SHORT).code == 0
    assert Path("checkpoints/text-tiny-2/step-000006").is_dir()


@pytest.mark.integration
def test_fine_tuning_that_raises_the_loss_is_reported(run: Run, at_text: Path) -> None:
    note = "note   fine-tuning did not lower the validation loss, which was "
    result = run("train", "text.txt", "--from", "tiny", *SHORT, "--lr", "1")
    assert result.code == 0
    first, last = (
        float(re.search(pattern, result.err)[1])  # type: ignore[index]
        for pattern in (r"step +0  val loss ([\d.]+)", r"best .*val loss ([\d.]+)")
    )
    assert last > first
    assert f"{note}{first:.4f} before" in result.err
    assert note not in run("train", "text.txt", "--from", "tiny", *SHORT).err


@pytest.mark.integration
def test_a_resumed_run_is_compared_with_its_base_model(run: Run, at_text: Path) -> None:
    result = run("train", "text.txt", "--from", "tiny", *SHORT, "--name", "resumed", "--lr", "1")
    before = re.search(r"\(before fine-tuning: .* nats/token\)", result.err)
    note = re.search(r"fine-tuning did not lower .*", result.err)
    assert before
    assert note
    words = ("train", "text.txt", "--resume", "--name", "resumed", "--max-steps")
    again = run(*words, "8")
    assert again.code == 0
    assert before[0] in again.err
    assert note[0] in again.err
    log = Path("checkpoints/resumed/metrics.jsonl")
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]))
    without = run(*words, "10").err
    assert "equally likely tokens\n" in without
    assert "untrained" not in without


@pytest.mark.integration
def test_the_default_length_of_fine_tuning_is_explained(run: Run, at_text: Path) -> None:
    words = ["train", "text.txt", "--from", "tiny", "--dry-run"]
    plan = run(*words)
    [epochs] = (line.split()[1] for line in plan.out.splitlines() if line.startswith("epochs"))
    assert f"300 steps are the default of --from, here {epochs} epochs" in plan.err
    assert "(--patience)" in plan.err
    for limit in (["--max-steps", "4"], ["--max-epochs", "2"], ["--max-minutes", "1"]):
        assert "default of --from" not in run(*words, *limit).err


def shape(**changes: Any) -> ModelConfig:
    gpt2 = {"vocab_size": 50257, "context_length": 1024, "n_layer": 12, "n_head": 12}
    return ModelConfig(**(gpt2 | {"d_model": 768} | changes))


@pytest.mark.parametrize(
    ("model", "length", "micro", "lr"),
    [
        (shape(family="gpt2"), 512, 4, (5e-5, 3e-4)),
        (shape(vocab_size=128_256, d_model=3072, context_length=131_072), 512, 2, (1e-5, 1e-4)),
        (shape(vocab_size=512, d_model=64, n_head=8, context_length=256), 256, 4, (1e-3, 3e-3)),
        (shape(vocab_size=2**20), 512, 1, (5e-5, 3e-4)),
    ],
    ids=["GPT-2", "Llama 3.2 3B", "stories260K", "a million tokens"],
)
def test_fine_tuning_defaults_fit_the_memory_of_a_laptop(
    model: ModelConfig, length: int, micro: int, lr: tuple[float, float]
) -> None:
    base = Base("somewhere", GPT.without_weights(model), BytesTokenizer())
    config = finetuning_config({}, base)
    training = config.training
    assert (config.model, config.sequence_length) == (model, length)
    assert (training.batch_size, training.micro_batch_size) == (4, micro)
    assert lr[0] <= training.lr == training.embedding_lr <= lr[1]
    assert micro == 1 or micro * length * model.vocab_size * 4 <= 2**29  # half a GiB of logits


@pytest.mark.integration
def test_stories260k_is_fine_tuned_from_text(run: Run, workplace: Path, shared: Path) -> None:
    folder = shared / "weights/stories260K"
    text = (shared / "data/tinyshakespeare.txt").read_text()[:30_000]
    (workplace / "play.txt").write_text(text)
    words = ["--max-steps", "8", "--context-length", "128", "--set", "training.eval_tokens=1024"]
    result = run("train", "play.txt", "--from", str(folder), *words)
    assert result.code == 0, result.err
    (_, before), (_, after) = evaluations("play-stories260K")
    assert 4 < before < 6  # trained on English stories, not on plays
    assert after < before - 0.3
    step = Path("checkpoints/play-stories260K/step-000008")
    tokenizers = [read_base(str(place)).tokenizer for place in (folder, step)]
    assert tokenizers[0].fingerprint == tokenizers[1].fingerprint
    data = prepare(DataConfig(paths=("play.txt",)), tokenizer=tokenizers[0])
    tokens = data.tokens.split(0.1)[0].windows(torch.zeros(1, dtype=torch.int64).numpy(), 9)[0]
    # </s> <s> before a document, as before a prompt; llama2.c's token table is the oracle.
    names = json.loads((folder / "sp_vocab.json").read_text(encoding="utf-8"))["tokens"]
    assert tokens[:2].tolist() == [2, 1]
    assert "".join(names[token] for token in tokens[2:]).startswith(" F")
