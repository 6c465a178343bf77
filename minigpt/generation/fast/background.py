"""Compile the decode step in a background process of low priority, for later runs.

The process outlives the command that starts it. It holds a lock, so that no other process compiles
the same step. It writes a package to the cache or, if compilation fails, a file with the error, so
that later commands do not try again. If the compiled step is slower than the eager one on this
machine, it says so in another file, and commands use the package only with ``--compile``.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any, NoReturn

import torch

from minigpt.config import ModelConfig
from minigpt.errors import LockedError, MinigptError
from minigpt.files import locked, resource_errors, write_atomically
from minigpt.generation.fast import compiled_matches_eager, stored_dtype
from minigpt.generation.fast.compiled import CompiledForward, compile_step, package_key
from minigpt.generation.fast.decode_step import StepForward
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.packages import failure_path, find_package, lock_path, slower_path
from minigpt.generation.fast.reading import model_of_zeros
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel

VARIABLE = "MINIGPT_COMPILE_AFTER"
"""Environment variable: seconds of decoding before a command starts to compile, or never."""

_AFTER_S = 5.0
_GIVE_UP_S = 1800
_MAX_TIMED_BYTES = 2**30
_N_ROUNDS, _N_TIMED = 10, 4


def compile_after() -> float:
    """Return the seconds of decoding before compiling starts: infinity for never.

    The default without a terminal is never: a script's machine may be gone before the next run.
    """
    chosen = os.environ.get(VARIABLE, str(_AFTER_S) if sys.stderr.isatty() else "never")
    try:
        return max(0.0, float(chosen))
    except ValueError:
        return torch.inf


def start(model: LanguageModel) -> bool:
    """Start compiling a model's decode step for one row; return whether it was started.

    It is not started if the step is in the cache, another process is compiling it, compiling it
    failed before, there is no C++ compiler, or the compiled step would round differently.
    """
    compiler = os.environ.get("CXX", "g++")
    if not compiled_matches_eager(model) or not shutil.which(compiler):
        return False
    properties = description(model)
    key = package_key(model_of_zeros_like(properties, "meta"))
    if failure_path(key).exists() or find_package(key):
        return False
    try:
        with resource_errors(lock_path(key)), locked(lock_path(key), "it is being compiled"):
            pass
        subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(properties)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except (MinigptError, OSError):
        return False
    return True


def description(model: GPT) -> dict[str, Any]:
    """Return the properties of a model that its compiled step depends on: all but its weights."""
    return {
        "config": asdict(model.config),
        "is_int8": stored_dtype(model) == torch.int8,
        "n_threads": torch.get_num_threads(),
    }


def model_of_zeros_like(properties: dict[str, Any], device: str) -> GPT:
    """Return a model with these properties and zero weights."""
    model = model_of_zeros(
        ModelConfig(**properties["config"]),
        device=torch.device(device),
        dtype=torch.float32,
        activations=torch.float32,
        quantizes=properties["is_int8"],
    )
    assert isinstance(model, GPT)
    return model


def compile_described(properties: dict[str, Any]) -> None:
    """Compile the step of a model with these properties, unless another process is doing so."""
    torch.set_num_threads(properties["n_threads"])
    model = model_of_zeros_like(properties, "cpu")
    key = package_key(model)
    try:
        with locked(lock_path(key), "it is being compiled"):
            compile_step(model)
            if is_slower(model):
                write_atomically(slower_path(key), b"")
    except LockedError:
        return
    except MinigptError as error:
        write_atomically(failure_path(key), f"{error}\n".encode())
    lock_path(key).unlink(missing_ok=True)


def is_slower(model: GPT) -> bool:
    """Return whether a token takes longer with the compiled step than with the eager one.

    It overwrites the weights. Large models are not timed, because the eager step copies them.
    """
    weights = [*model.parameters(), *model.buffers()]
    if sum(x.nbytes for x in weights) > _MAX_TIMED_BYTES:
        return False
    for x in weights:  # untouched memory would be read faster than weights are
        x.random_(-99, 99) if x.dtype == torch.int8 else x.normal_(std=0.02)
    n_tokens = min(_N_TIMED, model.config.context_length)
    compiled, eager = (kind(model, capacity=n_tokens) for kind in (CompiledForward, EagerForward))
    times = [(_seconds(compiled, n_tokens), _seconds(eager, n_tokens)) for _ in range(_N_ROUNDS)]
    # The fastest round of each: other processes can only make a round slower.
    return min(one for one, _ in times) > min(other for _, other in times)


def _seconds(forward: StepForward, n_tokens: int) -> float:
    """Return the seconds that the first tokens of a text take."""
    forward.cache.truncate(0)
    started = time.perf_counter()
    for _ in range(n_tokens):
        forward.feed(torch.zeros(1, 1, dtype=torch.int64))
    return time.perf_counter() - started


def _raise_on_signals() -> None:
    """Turn signals and a deadline into an exception, so that temporary files are removed."""

    def stop(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM")
    for number in filter(None, (getattr(signal, name, None) for name in names)):
        signal.signal(number, stop)
    if hasattr(signal, "alarm"):
        signal.alarm(_GIVE_UP_S)


def main() -> None:
    """Compile the step that the command line describes."""
    if hasattr(os, "nice"):
        os.nice(19)
    _raise_on_signals()
    compile_described(json.loads(sys.argv[1]))


if __name__ == "__main__":
    main()
