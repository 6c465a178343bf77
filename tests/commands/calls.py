"""Functions that run the program and check its output."""

import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
"""The project folder."""

_TINY = """
--tokenizer bytes --max-steps 4 --context-length 64 --batch-size 2
--n-layer 2 --n-head 2 --d-model 16 --set model.d_mlp=16
--set training.eval_tokens=256 --set training.log_every=1
"""
TINY = _TINY.split()
"""Options of a training run that takes a moment."""


@dataclass(frozen=True)
class Result:
    """The result of a call of the program."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


def error_line(result: Result) -> str:
    """Return the error message of a failed call, after checking its one-line form."""
    assert result.out == ""
    assert result.err.startswith("error: "), result.err
    assert result.err.endswith("\n")
    line = result.err.removeprefix("error: ").removesuffix("\n")
    assert line.isprintable(), line  # and no line breaks
    assert "bug in minigpt" not in line, line
    return line


def proposed(err: str, label: str) -> list[list[str]]:
    """Return the commands suggested below a label at the end of stderr, each as its arguments."""
    lines = err[err.index(f"\n{label}") + 1 :].splitlines()
    commands = [shlex.split(line[7:]) for line in lines]
    assert all(command[0].endswith("minigpt") for command in commands), commands
    return [command[1:] for command in commands]


TRACE = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "6"]
"""Arguments for a trace of six tokens."""


def objects(result: Result) -> list[dict[str, Any]]:
    """Return the JSON lines on stdout."""
    return [json.loads(line) for line in result.out.splitlines()]


def evaluations(name: str) -> list[tuple[int, float]]:
    """Return the steps and validation losses in a run's metrics.jsonl."""
    lines = Path("checkpoints", name, "metrics.jsonl").read_text().splitlines()
    facts = [json.loads(line) for line in lines]
    return [(fact["step"], fact["val_loss"]) for fact in facts if fact["event"] == "eval"]


def flip_a_byte(folder: Path) -> None:
    """Damage the weights of a model folder."""
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
