"""Parsing of lists of layers (``0,2,4-6``) and heads (``4.2,5.*``, layer.head).

Shapes: L layers, H query heads, S positions in view, R rows.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from minigpt.errors import ConfigError

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


@dataclass(frozen=True)
class HeadSelection:
    """The chosen heads of each layer."""

    heads_by_layer: tuple[tuple[int, ...], ...]
    """Chosen heads of each layer, in ascending order."""
    n_head: int
    """Number of heads per layer."""

    @property
    def n_layer(self) -> int:
        """Number of layers."""
        return len(self.heads_by_layer)

    @property
    def n_chosen(self) -> int:
        """Number of chosen heads, over all layers."""
        return sum(len(heads) for heads in self.heads_by_layer)

    @property
    def is_all(self) -> bool:
        """Whether every head is chosen."""
        return self.n_chosen == self.n_head * self.n_layer

    def indices(self, device: torch.device) -> Tensor:
        """Return layer * n_head + head of the chosen heads, cached per device."""
        return _indices(self, device)

    def as_text(self) -> str:
        """Return the chosen heads as ``4.2,5.*``, the syntax of ``select_heads``."""
        parts = []
        for layer, heads in enumerate(self.heads_by_layer):
            if len(heads) == self.n_head > 1:
                parts.append(f"{layer}.*")
            else:
                parts += [f"{layer}.{head}" for head in heads]
        return ",".join(parts)


@lru_cache(maxsize=8)
def _indices(selection: HeadSelection, device: torch.device) -> Tensor:
    rows = [
        layer * selection.n_head + head
        for layer, heads in enumerate(selection.heads_by_layer)
        for head in heads
    ]
    return torch.tensor(rows, device=device)


def reduce_rows(rows_LHS: Tensor, selection: HeadSelection, *, is_max: bool = False) -> Tensor:
    """Return the mean of the chosen heads' rows, or the maximum at each position: (S,)."""
    rows_RS = rows_LHS.flatten(0, 1)
    if not selection.is_all:
        rows_RS = rows_RS.index_select(0, selection.indices(rows_RS.device))
    return rows_RS.amax(dim=0) if is_max else rows_RS.mean(dim=0)


def select_heads(
    n_layer: int,
    n_head: int,
    *,
    layers: str | None = None,
    heads: str | None = None,
    options: tuple[str, str] = ("--layers", "--heads"),
) -> HeadSelection:
    """Select the heads that are in both ``layers`` and ``heads``; None selects all.

    Args: options, names of the two options, for error messages.
    Raises: ConfigError for a syntax error, an index out of range, or an empty selection.
    """
    layers_name, name = options
    chosen_layers = _numbers("*" if layers is None else layers, n_layer, layers_name, "layer")
    chosen: set[tuple[int, int]] = set()
    for part in ("*.*" if heads is None else heads).split(","):
        layer, dot, head = part.strip().partition(".")
        if not dot:
            raise ConfigError(f"{name} takes layer.head, as in 4.2 or 5.*: it is {part!r}.")
        layer_numbers = _numbers(layer, n_layer, name, "layer", part)
        chosen |= {*product(layer_numbers, _numbers(head, n_head, name, "head", part))}
    selection = HeadSelection(
        tuple(
            tuple(h for h in range(n_head) if i in chosen_layers and (i, h) in chosen)
            for i in range(n_layer)
        ),
        n_head,
    )
    if not selection.n_chosen:
        raise ConfigError(f"{layers_name} {layers} and {name} {heads} have no head in common.")
    return selection


def _numbers(text: str, n: int, option: str, noun: str, shown: str = "") -> set[int]:
    """Parse ``*`` or a list of numbers and ranges, each below n.

    Args: shown, the layer.head that contains the text, for error messages.
    """
    if text.strip() == "*":
        return set(range(n))
    numbers: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if not match:
            raise ConfigError(f"{option} takes numbers and ranges, as in 0,2,4-6: it is {text!r}.")
        low, high = int(match[1]), int(match[2] or match[1])
        if low > high or high >= n:
            raise ConfigError(
                f"{option} {(shown or part).strip()} is out of range: the model has {noun}s 0 to "
                f"{n - 1}."
            )
        numbers.update(range(low, high + 1))
    return numbers
