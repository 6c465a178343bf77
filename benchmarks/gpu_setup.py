"""What the parts of benchmarks/gpu.py have in common: their setup, small models and trainers."""

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
    """What every part is given."""

    device: torch.device
    is_quick: bool
    folder: Path
    """For files of the parts, which are deleted at the end."""
    data: Path
    """tinyshakespeare.txt, or a stand-in for it."""
    has_tinyshakespeare: bool
    nanogpt_checkout: Path | None
    gpt_fast: str
    with_transformers: bool
    deadline: float
    """Time of the clock after which nothing begins."""
    end: float
    """Time of the clock at which what still runs is ended."""
    facts: Facts = field(default_factory=dict)
    """What the running part has found; kept if it fails."""
    faults: list[str] = field(default_factory=list)
    """What the running part found wrong, and went on."""

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def pick(self, full: Any, quick: Any) -> Any:
        """Return the value for a measurement, or for its rehearsal."""
        return quick if self.is_quick else full

    @property
    def is_late(self) -> bool:
        """Return whether nothing may begin anymore."""
        return time.monotonic() > self.deadline

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Note a failure of one of several measurements, or that there is no time for it."""
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
        """Return whether all was ended; libraries turn OutOfTimeError into errors of their own."""
        return time.monotonic() >= self.end

    def require_time(self) -> None:
        """Raise SkippedError if nothing may begin anymore."""
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
    """What a part found wrong."""


class SkippedError(Exception):
    """Why a part cannot run here."""


class OutOfTimeError(Exception):
    """The time for all parts is over."""


def described(error: BaseException) -> str:
    """Return the kind of an error and the first line of its message."""
    words = str(error).strip().splitlines() or [""]
    kind = "" if isinstance(error, FailedError) else f"{type(error).__name__}: "
    return f"{kind}{words[0]}"


def require(condition: bool, what: str) -> None:
    if not condition:
        raise FailedError(what)


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
        for parameter in model.parameters():  # initial ones would be 0 in places
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
    """Give memory back, so that the next measurement begins with all of it."""
    gc.collect()
    if setup.is_cuda:
        torch.cuda.empty_cache()
