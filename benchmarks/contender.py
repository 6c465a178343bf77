"""What a decoding benchmark asks of a contender, and what it gets. Only the standard library."""

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
    """Begins with the prompt; empty if no turn has another."""

    @property
    def n_positions(self) -> int:
        """Positions that any turn needs."""
        return max(len(self.prompt), len(self.longest_prompt)) + self.n_new


@dataclass(frozen=True)
class Turn:
    """The timing of one decoding."""

    first_s: float
    """From the prompt's ids to the first new token's on the host."""
    rest_s: float
    """From there to the last new token's."""
    tokens: list[int]
    """The first row's new ones."""
    peak_bytes: int
    """The most memory that the process, or with CUDA its tensors, ever had."""


Decode = Callable[[Job, Callable[[], None]], list[int]]
"""Decodes greedily; calls the function once the first token is on the host; returns row 0's."""


class UnavailableError(Exception):
    """A contender cannot be measured here, with the reason."""


def drain(tokens: Any, first: Callable[[], None]) -> list[int]:
    """Take all tokens; call the function after the first."""
    taken = []
    for token in tokens:
        taken.append(token)
        if len(taken) == 1:
            first()
    return taken
