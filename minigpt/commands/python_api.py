"""The Python API of training and evaluation: ``minigpt.train`` and ``minigpt.evaluate``."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from threading import RLock
from typing import Any

import torch

from minigpt.commands.loading import use_threads
from minigpt.commands.options import ModelSource
from minigpt.commands.train.job import Request, open_job
from minigpt.commands.train.run import Display, train_job
from minigpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from minigpt.errors import ConfigError, cut, nearest, require_choice
from minigpt.fields import plain_key
from minigpt.generation.api import model_name, plain_value
from minigpt.model.device import torch_defaults
from minigpt.rings import ring
from minigpt.settings import build, merge
from minigpt.training.events import Event

_TRAINING = RLock()
"""Held by the thread that trains: dropout draws from torch's global RNG."""
_TABLES = {"model": ModelConfig, "training": TrainingConfig, "data": DataConfig}
Paths = str | Path | Sequence[str | Path]


def train(
    data: Paths = (),
    *,
    name: str | None = None,
    resume: bool = False,
    on_event: Callable[[Event], None] | None = None,
    report_to: str | None = None,
    threads: int | None = None,
    **settings: Any,
) -> Path:
    """Train a model from text, as ``minigpt train`` does, and return the folder of its run.

        import minigpt

        run = minigpt.train("book.txt", name="book", max_steps=300, n_layer=2)
        print("".join(step.text for step in minigpt.generate(run, "Once")))

    Nothing is printed, and torch's global RNG is left as it was. The first Ctrl-C saves a
    checkpoint and ends the training. A call waits while another thread trains.

    Args:
        data: one path or several, like DATA of the command. Empty for its default text.
        name: name of the folder in checkpoints/. None derives one.
        resume: whether to continue that run, or the newest one.
        on_event: called with each event of training/events.py.
        report_to, threads: as for the command.
        settings: fields of ModelConfig, TrainingConfig and DataConfig, preset, and from_ (a model
            to fine-tune).
    Returns: checkpoints/NAME, which ``minigpt.generate``, ``trace`` and ``evaluate`` accept.
    Raises: ConfigError for an invalid setting, or if the run exists; DataError, CheckpointError,
        DivergedError, ResourceError and LockedError like the command; KeyboardInterrupt after
        Ctrl-C.
    """
    if os.environ.get("WORLD_SIZE", "") not in ("", "1"):
        raise ConfigError(
            "minigpt.train runs in one process. Under torchrun, use the command minigpt train."
        )
    paths = _texts("data", data)
    given = {"data": {"paths": paths}} if paths else {}
    threads = build(ModelSource, {"threads": plain_value(threads)}).threads
    if report_to is not None:
        require_choice("report_to", report_to, ("tensorboard", "none"))
    name = plain_value(name)
    if not isinstance(name, str | None):
        raise ConfigError(f"name must be text: it is of type {type(name).__name__}.")
    request = Request(name, merge(given, _nested(settings)), 1, lambda progress: None)
    with _TRAINING, _own_torch_state():
        use_threads(threads)
        with open_job(request, resume=resume) as job:
            trainer, signal = train_job(job, _Listener(on_event), report_to)
    if signal:
        raise KeyboardInterrupt
    return trainer.folder.path


def evaluate(model: str | Path | None = None, data: Paths = (), **options: Any) -> dict[str, Any]:
    """Measure how well a model predicts a text, as ``minigpt evaluate`` does.

        import minigpt

        minigpt.evaluate("book", "other.txt", stride=32)["bits_per_byte"]

    Args:
        model: as for ``--model``. None for the newest run.
        data: one path or several, like DATA of the command. Empty for the run's validation text.
        options: those of the command by name: val_fraction, eval_tokens, context_length, stride,
            batch_size, dtype, device, quantize, threads...
    Returns: the dict that ``--json`` prints: nats_per_token, bits_per_byte, perplexity and so on.
    Raises: ConfigError, CheckpointError and DataError like the command.
    """
    sources = {f.name for f in fields(ModelSource)} - {"dtype", "compile"}
    options = {key: plain_value(value) for key, value in options.items()}
    about = {key: options.pop(key) for key in sources & options.keys()}
    config_class = ring("commands.evaluate").EvaluationConfig
    names = [f.name for f in fields(config_class)]
    if unknown := next(iter(options.keys() - names), None):
        raise ConfigError(f"unknown setting {unknown}. {nearest(unknown, [*names, *sources])}")
    source = build(ModelSource, about | {"model": model_name(model)})
    config = build(config_class, options | {"data": _texts("data", data)})
    with _own_torch_state():
        return ring("commands.evaluate.measuring").measure(config, source, is_quiet=True)


def _texts(name: str, data: Paths) -> list[str]:
    paths = [data] if isinstance(data, str | Path) else data
    if not isinstance(paths, list | tuple) or not all(isinstance(p, str | Path) for p in paths):
        raise ConfigError(
            f"{name} must be a path or a list of paths: it is {cut(data)}, of type "
            f"{type(data).__name__}."
        )
    return [str(path) for path in paths]


@contextmanager
def _own_torch_state() -> Iterator[None]:
    """Use torch's defaults, as in the command, and restore the caller's settings and global RNG."""
    n_threads = torch.get_num_threads()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.random.fork_rng(gpus),
            torch_defaults(),
        ):
            yield
    finally:
        torch.set_num_threads(n_threads)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings nested in the tables of RunConfig that they belong to.

    Raises: ConfigError for an unknown name.
    """
    tables = {f.name: table for table, config in _TABLES.items() for f in fields(config)}
    tops = [plain_key(f.name) for f in fields(RunConfig) if f.name not in _TABLES]
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        value = _texts(name, value) if name in ("paths", "val") else plain_value(value)
        if plain_key(name) in tops:
            nested[plain_key(name)] = value
        elif name in tables:
            nested = merge(nested, {tables[name]: {name: value}})
        else:
            names = [*tables, *tops, *(train.__kwdefaults__ or ())]
            raise ConfigError(f"unknown setting {name}. {nearest(name, names)}")
    return nested


class _Listener(Display):
    """Forwards the events of a training run to the caller instead of displaying them."""

    def __init__(self, on_event: Callable[[Event], None] | None) -> None:
        self._on_event = on_event

    def show(self, event: Event) -> None:
        if self._on_event is not None:
            self._on_event(event)
