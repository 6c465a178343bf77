"""Runs that are killed at any point and resumed end with the same bits."""

import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import bits, config_of, differing, trainer_of

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.text.tokens import PreparedData
from minigpt.training.events import EvalEvent, SaveEvent, StepEvent
from minigpt.training.metrics import MetricsLog
from minigpt.training.state import STATE_FOLDER

# A separate process that forks one child per life of a run. A life is "run/step/place": after
# that step, the run is killed at the place.
KILL_SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import torch._dynamo  # imported once here, not by the first optimizer step of every child
from minigpt.checkpoint.folder import RunFolder
from minigpt.text.shard_files import open_prepared
from minigpt.training import state as state_module
from minigpt.training.metrics import MetricsLog
from small_runs import config_of, trainer_of

prepared, runs, n_threads, n_steps = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5])
data = open_prepared(prepared)
os.fsync = lambda descriptor: None  # a kill does not lose data that the kernel has buffered

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at(place, trainer):
    if place == "between the weights and the state":
        state_module.write_state = die
    if place == "in the middle of a step":
        trainer.optimizers[-1].step = die
    if place == "between the folder and its pointers":
        trainer.folder.point = die
    if place == "between checkpoints":
        trainer.checkpoints.evaluate = die

def live(run, step, place):
    torch.set_num_threads(n_threads)
    config = config_of("qwen3", dropout=0.2, max_steps=n_steps, save_every=2, micro_batch_size=3)
    with RunFolder(runs / run).lock():
        resume = bool(RunFolder(runs / run).steps())
        trainer = trainer_of(config, data, runs / run, resume=resume)
        metrics = MetricsLog(runs / run / "metrics.jsonl", from_step=trainer.step)
        is_armed = False
        events = trainer.run()
        while True:
            if trainer.step >= step and not is_armed:
                kill_at(place, trainer)
                is_armed = True
            if (event := next(events, None)) is None:
                return
            metrics.write(event)

for life in sys.argv[5:]:
    run, step, place = life.split("/")
    if (child := os.fork()) == 0:
        live(run, int(step), place)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, life
"""

# The step from which a run resumes if it is killed at this place after step 3.
PLACES = {
    "in the middle of a step": 2,
    "between checkpoints": 2,
    "between the weights and the state": 2,
    "between the folder and its pointers": 4,
}
needs_kill = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def run_and_kill(data: PreparedData, folder: Path, n_steps: int, lives: list[str]) -> None:
    arguments = [str(data.folder), str(folder), str(torch.get_num_threads()), str(n_steps), *lives]
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(Path(minigpt.__file__).parents[1])]
    subprocess.run(
        [sys.executable, "-c", KILL_SCRIPT, *arguments],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


@pytest.mark.integration
@needs_kill
def test_a_run_killed_at_any_point_resumes_with_the_same_bits(
    data: PreparedData, tmp_path: Path
) -> None:
    once = [f"{place}/3/{place}" for place in PLACES]
    one_after_another = [f"everywhere/3/{place}" for place in PLACES]
    run_and_kill(data, tmp_path, 6, once + one_after_another)
    config = config_of("qwen3", dropout=0.2, max_steps=6, save_every=2, micro_batch_size=3)
    straight = trainer_of(config, data, tmp_path / "straight")
    list(straight.run())
    for place, step in (PLACES | {"everywhere": 4}).items():
        run = RunFolder(tmp_path / place)
        with run.lock():
            resumed = trainer_of(config, data, run.path, resume=True)
            assert resumed.step == step, place
            list(resumed.run())
        assert differing(bits(resumed), bits(straight)) == [], place
        last = run.latest()
        assert last is not None
        weights = read_model(last.folder).model.state_dict()
        assert differing(weights, straight.model.state_dict()) == [], place


@needs_kill
@pytest.mark.torture
def test_a_run_killed_twenty_times_equals_an_uninterrupted_run(
    data: PreparedData, tmp_path: Path
) -> None:
    draw, n_steps = random.Random(20), 60
    lives = [
        f"run/{step}/{draw.choice(list(PLACES))}"
        for step in sorted(draw.sample(range(n_steps - 2), 20))
    ]
    run_and_kill(data, tmp_path, n_steps, lives)
    config = config_of("qwen3", dropout=0.2, max_steps=n_steps, save_every=2, micro_batch_size=3)
    straight = trainer_of(config, data, tmp_path / "straight")
    all_events = list(straight.run())

    run = RunFolder(tmp_path / "run")
    with run.lock():
        resumed = trainer_of(config, data, run.path, resume=True)
        metrics = MetricsLog(run.path / "metrics.jsonl", from_step=resumed.step)
        for event in resumed.run():
            metrics.write(event)
    logged = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    losses = [(line["step"], line["train_loss"]) for line in logged if line["event"] == "step"]
    assert losses == [(e.step, e.train_loss) for e in all_events if isinstance(e, StepEvent)]
    for name in ("model.safetensors", f"{STATE_FOLDER}/optimizer.safetensors"):
        last = [tmp_path / part / f"step-{n_steps:06d}" for part in ("straight", "run")]
        one, other = (load_file(folder / name) for folder in last)
        assert differing(one, other) == [], name
    best, best_of_straight = run.best(), RunFolder(tmp_path / "straight").best()
    assert best is not None
    assert best_of_straight is not None
    assert (best.step, best.facts) == (best_of_straight.step, best_of_straight.facts)


def test_a_step_is_best_even_if_killed_before_its_pointers_are_written(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill can happen before the pointers are written, so the loss must be known without them."""
    config = config_of("llama", max_steps=6, save_every=2, keep=0)
    trainer = trainer_of(config, data, tmp_path)
    losses = {}
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        for event in trainer.run():
            if isinstance(event, EvalEvent):
                losses[event.step] = event.val_loss
            if isinstance(event, SaveEvent):
                patch.setattr(trainer.folder, "point", interrupt)
    assert losses[4] < losses[2]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 2
    best = RunFolder(tmp_path).best()
    assert best is not None
    assert (best.step, best.facts["val_loss"]) == (4, losses[4])

    resumed = trainer_of(config, data, tmp_path, resume=True)
    assert resumed.step == 4
    with torch.no_grad():  # later steps are worse
        resumed.model.unembedding.weight.normal_(std=3.0)
    last = list(resumed.run())[-1]
    assert isinstance(last, SaveEvent)
    assert not last.is_best
    assert RunFolder(tmp_path).steps() == [4, 6]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    assert json.loads((tmp_path / "best.json").read_text())["val_loss"] == losses[4]


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt
