"""Requests and replies between a decoding benchmark and its contenders. Imports no libraries."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Contender:
    """An implementation and its options."""

    engine: str
    """minigpt, one of ``peers.PEERS``, or memory, which only reads memory."""
    precision: str
    """fp32, bf16 or int8 (llama.cpp: q8_0)."""
    variant: str = ""
    """Empty for the usual call; trace, loop (a bare loop over forward) or static."""
    is_compiled: bool = False
    n_rows: int = 1
    """Batch size."""

    @property
    def name(self) -> str:
        words = [self.engine, self.precision, self.variant, "compiled" if self.is_compiled else ""]
        return " ".join(filter(None, [*words, f"x{self.n_rows}" if self.n_rows > 1 else ""]))


@dataclass(frozen=True)
class Job:
    """The input of every contender."""

    folder: str
    """Hugging Face folder of the model; llama.cpp reads PRECISION.gguf in it."""
    prompt: list[int]
    n_new: int
    threads: int
    device: str
    gpt_fast: str
    """Path of a gpt-fast checkout, or empty."""
    longest_prompt: list[int] = field(default_factory=list)
    """The prompt and tokens after it, for longer prompts; empty if no turn has one."""

    @property
    def n_positions(self) -> int:
        """Maximum number of positions that a turn needs."""
        return max(len(self.prompt), len(self.longest_prompt)) + self.n_new


@dataclass(frozen=True)
class Turn:
    """The timing of one decoding."""

    first_s: float
    """Seconds from the prompt's ids to the first new token's id on the host."""
    rest_s: float
    """Seconds from the first to the last new token's id."""
    tokens: list[int]
    """New tokens of the first row."""
    peak_bytes: int
    """Peak memory of the process so far, or with CUDA of its tensors."""


Decode = Callable[[Job, Callable[[], None]], list[int]]
"""Decodes greedily, calls the function once the first token is on the host, returns row 0."""


class UnavailableError(Exception):
    """A contender cannot be measured on this machine, with the reason."""


def drain(tokens: Any, first: Callable[[], None]) -> list[int]:
    """Return a list of all tokens; call the function after the first."""
    drained = []
    for token in tokens:
        drained.append(token)
        if len(drained) == 1:
            first()
    return drained
