"""A run of six steps that is interrupted, resumed and compared with an uninterrupted one."""

from pathlib import Path

import torch
from small_runs import config_of, run_until, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import read_model
from minigpt.text.tokens import PreparedData

CONFIG = config_of(max_steps=6, save_every=2)


def train(folder: Path, data: PreparedData, *, until: int = 6) -> None:
    """Start or resume the run in a folder, and stop at a step."""
    run = RunFolder(folder)
    with run.lock():
        run_until(trainer_of(CONFIG, data, folder, resume=run.latest() is not None), until)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the latest checkpoint, after checking its hashes."""
    latest = RunFolder(folder).latest()
    assert latest is not None
    verify(latest.folder, hashes=True)
    return dict(read_model(latest.folder).model.state_dict())
