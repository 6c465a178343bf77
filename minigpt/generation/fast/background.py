"""Compiling the decode step in a process of low priority, for later starts.

The process outlives the command that starts it. It holds a lock, so that only one compiles a step;
it leaves a package in the cache, or a file with the reason why there is none, which keeps later
commands from trying again.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from minigpt.config import ModelConfig
from minigpt.errors import LockedError, MinigptError
from minigpt.files import locked, resource_errors, write_atomically
from minigpt.generation.fast import agrees_compiled, stored_dtype
from minigpt.generation.fast.compiled import compile_step, is_cached, package_key
from minigpt.generation.fast.packages import failure_path, lock_path
from minigpt.generation.fast.reading import model_of_zeros
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel

VARIABLE = "MINIGPT_COMPILE_AFTER"
"""Seconds of decoding after which a command starts to compile, or never."""

_AFTER_S = 5.0
_GIVE_UP_S = 1800


def compile_after() -> float:
    """Return the seconds of decoding after which to compile: infinity for never.

    By default never without a terminal: a script's machine may be gone before the next start.
    """
    chosen = os.environ.get(VARIABLE, str(_AFTER_S) if sys.stderr.isatty() else "never")
    try:
        return max(0.0, float(chosen))
    except ValueError:
        return torch.inf


def start(model: LanguageModel) -> bool:
    """Start to compile a model's decode step for one row; return whether it is started.

    It is not if the step is in the cache, another process compiles it, compiling it failed before,
    there is no C++ compiler, or the compiled step would round differently.
    """
    compiler = os.environ.get("CXX", "g++")
    if not agrees_compiled(model) or not shutil.which(compiler):
        return False
    work = description(model)
    alike = described(work, "meta")
    key = package_key(alike)
    if failure_path(key).exists() or is_cached(alike):
        return False
    try:
        with resource_errors(lock_path(key)), locked(lock_path(key), "it is being compiled"):
            pass
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(work)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (MinigptError, OSError):
        return False
    return True


def description(model: GPT) -> dict[str, Any]:
    """Return what the compiled step depends on: all but the values of the weights."""
    return {
        "config": asdict(model.config),
        "is_int8": stored_dtype(model) == torch.int8,
        "n_threads": torch.get_num_threads(),
    }


def described(work: dict[str, Any], device: str) -> GPT:
    """Return a model with these properties, whose weights are zeros."""
    model = model_of_zeros(
        ModelConfig(**work["config"]),
        device=torch.device(device),
        dtype=torch.float32,
        activations=torch.float32,
        quantizes=work["is_int8"],
    )
    assert isinstance(model, GPT)
    return model


def compile_described(work: dict[str, Any]) -> None:
    """Compile the step of a description, unless another process does."""
    torch.set_num_threads(work["n_threads"])
    model = described(work, "cpu")
    key = package_key(model)
    try:
        with locked(lock_path(key), "it is being compiled"):
            compile_step(model)
    except LockedError:
        return
    except MinigptError as error:
        write_atomically(failure_path(key), f"{error}\n".encode())
    lock_path(key).unlink(missing_ok=True)


@contextmanager
def _ending_cleanly() -> Iterator[None]:
    """Let signals and a deadline end the process by an exception, which removes temporary files."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")
    for number in filter(None, (getattr(signal, name, None) for name in names)):
        signal.signal(number, stop)
    if hasattr(signal, "alarm"):
        signal.alarm(_GIVE_UP_S)
    yield


def main() -> None:
    """Compile what the command line describes."""
    if hasattr(os, "nice"):
        os.nice(19)
    with _ending_cleanly():
        compile_described(json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
