"""Compilation in the background: once, for the next start, and only where it is wanted."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_model

from minigpt.errors import ConfigError
from minigpt.files import locked
from minigpt.generation.fast import (
    background,
    compiled,
    compiled_matches_eager,
    is_compiled,
)
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.packages import failure_path, lock_path
from minigpt.generation.fast.reading import prepare_for_decoding
from minigpt.model.cache import KVCache
from minigpt.model.gpt import GPT
from minigpt.places import CACHE_VARIABLE

KINDS = ["float32", "int8"]
TIMED = background.is_slower


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(background.shutil, "which", lambda name: name)  # the compiler is never run
    monkeypatch.setattr(background, "is_slower", lambda model: False)  # nor its code
    return tmp_path / "compiled"


@pytest.fixture
def fake_compiler(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    calls: list[Path] = []

    def compile_to(step: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        path.write_bytes(b"machine code")

    monkeypatch.setattr(compiled, "_compile", compile_to)
    return calls


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    words: list[list[str]] = []
    monkeypatch.setattr(background.subprocess, "Popen", lambda args, **_: words.append(args))
    return words


def model_of(kind: str, layout: str = "llama", *, joins: bool = False, **changes: Any) -> GPT:
    options: dict[str, Any] = {"quantizes": kind == "int8", "joins": joins}
    if "bfloat16" in kind:
        options["dtype"] = torch.bfloat16
    if kind == "bfloat16":
        options["activations"] = torch.bfloat16
    return prepare_for_decoding(small_model(layout, **changes), **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_compiled_in_the_background_is_used_at_the_next_start(
    layout: str, kind: str, fake_compiler: list[Path], started: list[list[str]]
) -> None:
    eager = model_of(kind, layout, joins=True)
    assert not is_compiled(model_of(kind, layout), None)
    assert background.start(eager)
    [[_, _, module, work]] = started
    assert module == background.__name__
    background.compile_described(json.loads(work))
    background.compile_described(json.loads(work))
    assert len(fake_compiler) == 1
    again = model_of(kind, layout)
    assert is_compiled(again, None)
    assert not is_compiled(again, False)
    assert not is_compiled(again, None, n_rows=2)  # would need another graph
    assert not background.start(again)
    assert len(started) == 1
    assert not is_compiled(model_of(kind, layout, n_layer=1), None)


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16-weights"])
def test_bfloat16_models_are_never_compiled_by_default(kind: str, started: list[list[str]]) -> None:
    model = model_of(kind)
    assert not background.start(model)
    assert not is_compiled(model, None)
    assert started == []


@pytest.mark.parametrize("kind", [*KINDS, "bfloat16", "bfloat16-weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_graph_replaces_an_eager_step_only_if_both_round_like_float32(
    layout: str, kind: str
) -> None:
    model, tokens = model_of(kind, layout, joins=True), random_tokens(1, 12)
    exact = model_of(kind, layout).float() if kind == "bfloat16" else model_of(kind, layout)
    eager = EagerForward(model, capacity=12)
    eager.feed(tokens[:, :4])
    steps = torch.cat([eager.feed(tokens[:, i : i + 1]).clone() for i in range(4, 12)])
    with torch.no_grad():
        error = (steps - exact(tokens)[0, 4:]).abs().max()
    assert compiled_matches_eager(model) == (kind in KINDS)
    assert error < 1e-4 or not compiled_matches_eager(model)


def test_only_one_process_compiles_a_step(
    fake_compiler: list[Path], started: list[list[str]]
) -> None:
    model = small_model()
    with locked(lock_path(compiled.package_key(model))):
        assert not background.start(model)
        background.compile_described(background.description(model))
    assert fake_compiler == started == []
    assert background.start(model)


def test_a_failed_compilation_is_recorded_and_not_retried(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], folder: Path
) -> None:
    def fail(step: Any, path: Path, **options: Any) -> None:
        raise ConfigError("the compiler is broken")

    monkeypatch.setattr(compiled, "_compile", fail)
    model = small_model()
    background.compile_described(background.description(model))
    failure = failure_path(compiled.package_key(model))
    assert failure.read_text() == "the compiler is broken\n"
    assert list(folder.iterdir()) == [failure]
    assert not background.start(model)
    failure.unlink()
    assert background.start(model)


def test_a_graph_slower_than_the_eager_step_is_used_only_on_request(
    monkeypatch: pytest.MonkeyPatch, fake_compiler: list[Path], started: list[list[str]]
) -> None:
    monkeypatch.setattr(background, "is_slower", lambda model: True)
    model = small_model()
    background.compile_described(background.description(model))
    assert not is_compiled(model, None)
    assert is_compiled(model, True)
    compiled.compile_step(model)
    assert len(fake_compiler) == 1
    assert not background.start(model)
    assert started == []


class TimedForward:
    """Lets a clock go on at each token."""

    clock = 0.0
    token_s: float

    def __init__(self, model: GPT, *, capacity: int) -> None:
        self.cache = KVCache(model.config, capacity=capacity)

    def feed(self, tokens: torch.Tensor) -> None:
        TimedForward.clock += self.token_s


@pytest.mark.parametrize(("compiled_s", "eager_s"), [(2.0, 1.0), (1.0, 2.0)])
def test_a_compiled_step_is_timed_against_the_eager_one(
    compiled_s: float, eager_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("CompiledForward", compiled_s), ("EagerForward", eager_s)):
        forward = type(name, (TimedForward,), {"token_s": seconds})
        monkeypatch.setattr(background, name, forward)
    monkeypatch.setattr(background.time, "perf_counter", lambda: TimedForward.clock)
    model = model_of("int8")
    assert TIMED(model) == (compiled_s > eager_s)
    assert all(x.any() for x in model.parameters())  # zeros would be read faster
    monkeypatch.setattr(background, "_MAX_TIMED_BYTES", 1000)
    assert not TIMED(model)


def test_nothing_starts_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]]
) -> None:
    monkeypatch.setattr(background.shutil, "which", lambda name: None)
    assert not background.start(small_model())
    assert started == []


@pytest.mark.parametrize(
    ("is_terminal", "value", "seconds"),
    [
        (True, None, 5),
        (False, None, torch.inf),  # a script, a test
        (False, "20", 20),
        (True, "never", torch.inf),
        (True, "0", 0),
        (True, "-1", 0),
    ],
)
def test_only_a_terminal_or_the_variable_start_a_background_compilation(
    monkeypatch: pytest.MonkeyPatch, is_terminal: bool, value: str | None, seconds: float
) -> None:
    monkeypatch.setattr(background.sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.delenv(background.VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(background.VARIABLE, value)
    assert background.compile_after() == seconds


@pytest.mark.integration
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM handlers")
def test_sigterm_ends_the_background_process_and_leaves_no_file(
    tmp_path: Path, folder: Path
) -> None:
    (tmp_path / "temporary").mkdir()
    code = (
        "import json, sys, time\n"
        "from minigpt.generation.fast import background, compiled\n"
        "def slow(step, path, **_):\n"
        "    path.write_bytes(b'half')\n"
        "    print(path, flush=True)\n"
        "    time.sleep(60)\n"
        "compiled._compile = slow\n"
        "background.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(background.description(small_model()))],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path / "temporary")},
        text=True,
    )
    assert process.stdout is not None
    assert "temporary" in process.stdout.readline()
    process.terminate()
    assert process.wait(timeout=30) == 143
    process.stdout.close()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert not list(folder.glob("*.pt2"))
