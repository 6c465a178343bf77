"""Training runs that take a second, and comparisons of their results."""

import random
from pathlib import Path
from typing import Any

import torch
from small_models import small_config

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import DataConfig, RunConfig, TrainingConfig
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.events import Event
from minigpt.training.trainer import Trainer

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "ran",
    "sat",
    "on",
    "under",
    "mat",
    "and",
    "then",
    "slept",
    "again",
]


def text(n_words: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words)) + "\n"


def data_of(content: str, folder: Path) -> PreparedData:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "corpus.txt"
    path.write_text(content, encoding="utf-8")
    return prepare(DataConfig(paths=(str(path),)), cache_dir=folder / "cache")


def config_of(layout: str = "llama", dropout: float = 0.0, **training: Any) -> RunConfig:
    shape = {"vocab_size": 257, "context_length": 16, "dropout": dropout}
    training = {
        "max_steps": 12,
        "batch_size": 6,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
        "eval_tokens": 160,
    } | training
    return RunConfig(model=small_config(layout, **shape), training=TrainingConfig(**training))


def trainer_of(
    config: RunConfig, data: PreparedData, folder: Path, *, resume: bool = False, **changes: Any
) -> Trainer:
    run = RunFolder(folder)
    latest = run.latest()
    assert (latest is not None) == resume
    options = {"device": torch.device("cpu"), "dtype": torch.float32} | changes
    if latest is not None:
        options["resume_from"] = latest.folder
    return Trainer(config, data, run, **options)


def run_until(trainer: Trainer, step: int) -> list[Event]:
    """Run until a step is logged, and stop there as a signal would."""
    events = []
    for event in trainer.run():
        events.append(event)
        if event.step == step:
            trainer.request_stop()
    return events


def bits(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return all tensors that training changes, by name."""
    tensors = {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{names[parameter]}/{key}"] = value.clone()
    return tensors


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of tensors that are not bitwise equal."""
    assert one.keys() == other.keys()
    return [name for name, tensor in one.items() if not torch.equal(tensor, other[name])]
