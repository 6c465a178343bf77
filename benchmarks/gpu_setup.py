"""Shared code of the parts of benchmarks/gpu.py: their setup, small models and trainers."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import DataConfig, ModelConfig, RunConfig
from minigpt.model.device import resolve_device, resolve_dtype
from minigpt.model.language_model import model_class
from minigpt.model_config import ATTENTIONS
from minigpt.settings import build, merge
from minigpt.text.tokens import prepare
from minigpt.training.trainer import Trainer

Facts = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """The settings of all parts, and the results of the running one."""

    device: torch.device
    is_quick: bool
    folder: Path
    """Folder for the files of the parts, deleted at the end."""
    data: Path
    """tinyshakespeare.txt, or a substitute for it."""
    has_tinyshakespeare: bool
    nanogpt_checkout: Path | None
    gpt_fast: str
    with_transformers: bool
    deadline: float
    """Value of time.monotonic() after which no part starts."""
    end: float
    """Value of time.monotonic() at which the running part is stopped."""
    facts: Facts = field(default_factory=dict)
    """Results of the running part; kept if it fails."""
    faults: list[str] = field(default_factory=list)
    """Failures of the running part after which it continued."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the full value for a measurement, or the quick one for its rehearsal."""
        return quick if self.is_quick else full

    @property
    def is_late(self) -> bool:
        """Whether it is too late to start anything."""
        return time.monotonic() > self.deadline

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record the failure of one of several measurements, or that no time is left for it."""
        try:
            yield
        except SkippedError as reason:
            self.facts[name] = f"not run: {reason}"
        except Exception as error:
            if self.is_over:
                self.facts[name] = "not finished: out of time"
                raise
            self.facts[name] = f"FAILED: {described(error)}"
            self.faults.append(f"{name}: {described(error)}")

    @property
    def is_over(self) -> bool:
        """Whether the time is over; libraries may replace OutOfTimeError by their own errors."""
        return time.monotonic() >= self.end

    def require_time(self) -> None:
        """Raise SkippedError if it is too late to start anything."""
        if self.is_late:
            raise SkippedError("out of time")

    def wait(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], n_times: int) -> float:
        """Return the median time of a call, after one to warm up."""
        return statistics.median([self.seconds_of(call) for _ in range(n_times + 1)][1:])

    def seconds_of(self, call: Callable[[], Any]) -> float:
        """Return the time of one call."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started


class FailedError(Exception):
    """A check of a part failed."""


class SkippedError(Exception):
    """A part cannot run on this machine, with the reason."""


class OutOfTimeError(Exception):
    """The time for all parts is over."""


def described(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    words = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, FailedError) else f"{type(error).__name__}: "
    return f"{kind}{words[0]}"


def require(condition: bool, message: str) -> None:
    if not condition:
        raise FailedError(message)


SHAPE = {"vocab_size": 257, "context_length": 64, "n_layer": 2, "d_model": 64}
LLAMA = {"n_head": 4, "n_kv_head": 2, "qk_norm": True}
KINDS: dict[str, Facts] = {
    "llama": LLAMA,
    "gpt2": {"family": "gpt2", "n_head": 4},
    **{name: {"attention": name, "n_head": 4} for name in ATTENTIONS if name != "scaled_dot"},
    "lstm": {"arch": "lstm", "n_head": 1},
    "lstm-attention": {"arch": "lstm-attention", "n_head": 1},
}


def model_of(shape: Facts, device: torch.device, dtype: str = "float32") -> Any:
    """Return a model with random weights, the same on every device, for inference."""
    config = ModelConfig(**SHAPE, **shape)
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some initial weights would be 0
            parameter.normal_(std=0.2, generator=generator)
    resolved = resolve_dtype(dtype, device)
    return model.to(device, resolved).eval().requires_grad_(False)


def trainer_of(setup: Setup, name: str, settings: Facts, **options: Any) -> Trainer:
    """Return a trainer on a text of random bytes. Args: options, of Trainer."""
    path = setup.folder / "bytes.txt"
    if not path.exists():
        letters = random.Random(0).choices("abcdefgh \n", k=setup.pick(4_000_000, 40_000))
        path.write_text("".join(letters))
    config = build(RunConfig, merge(settings, {"data": {"tokenizer": "bytes"}}))
    device = resolve_device(config.training.device)
    return Trainer(
        config,
        prepare(DataConfig(paths=(str(path),)), cache_dir=setup.folder / "cache"),
        RunFolder(setup.folder / name),
        device=device,
        dtype=resolve_dtype(config.training.dtype, device),
        **options,
    )


def free(setup: Setup) -> None:
    """Release memory, so that the next measurement starts with all of it."""
    gc.collect()
    if setup.is_cuda:
        torch.cuda.empty_cache()
