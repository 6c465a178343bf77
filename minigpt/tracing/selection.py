"""The heads of a model that a trace shows."""

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class HeadSelection:
    """The chosen heads of each layer."""

    heads_by_layer: tuple[tuple[int, ...], ...]
    """Chosen heads of each layer, in ascending order."""
    n_head: int
    """Number of heads per layer."""

    @classmethod
    def all(cls, n_layer: int, n_head: int) -> Self:
        """Return every head of a model."""
        return cls((tuple(range(n_head)),) * n_layer, n_head)

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

    @property
    def flat_indices(self) -> list[int]:
        """Indices of the chosen heads, layer * n_head + head."""
        return [
            layer * self.n_head + head
            for layer, heads in enumerate(self.heads_by_layer)
            for head in heads
        ]

    def as_text(self) -> str:
        """Return the chosen heads as ``4.2,5.*``, the syntax of ``head_lists.select_heads``."""
        parts = []
        for layer, heads in enumerate(self.heads_by_layer):
            if len(heads) == self.n_head:
                parts.append(f"{layer}.*")
            else:
                parts += [f"{layer}.{head}" for head in heads]
        return ",".join(parts)
