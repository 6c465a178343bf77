"""Decode steps of prepared models, kept for later decoders: making one takes as long as a token."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from minigpt.model.language_model import LanguageModel

Step = TypeVar("Step")


@dataclass(frozen=True)
class _Idle:
    parameters: list[Tensor]
    steps: defaultdict[Hashable, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def of(self, kind: Hashable) -> list[Any]:
        """Return the steps of a kind that were made for the current values of the parameters."""
        versions = tuple(0 if p.is_inference() else p._version for p in self.parameters)
        return self.steps[kind, versions]


_idle: weakref.WeakKeyDictionary[LanguageModel, _Idle] = weakref.WeakKeyDictionary()


def allow_idle_steps(model: LanguageModel) -> None:
    """Let later decoders reuse the decode steps of a model, whose weights are now laid out."""
    _idle[model] = _Idle(list(model.parameters()))


def borrow(user: object, model: LanguageModel, kind: Hashable, make: Callable[[], Step]) -> Step:
    """Return an idle step of a kind, or a new one; it becomes idle again when ``user`` is deleted.

    Args: make, returns a step that has no reference to the model, which would keep it alive.
    """
    return lend(_idle[model].of(kind), user, make) if model in _idle else make()


def lend(idle: list[Step], user: object, make: Callable[[], Step]) -> Step:
    """Return one of the idle steps, or a new one; it is idle again when ``user`` is deleted."""
    try:
        step = idle.pop()  # not after a check: another thread may take the last one
    except IndexError:
        step = make()
    weakref.finalize(user, idle.append, step).atexit = False
    return step


def has_idle_step(model: LanguageModel, kind: Hashable) -> bool:
    """Return whether a step of this kind is idle."""
    return model in _idle and bool(_idle[model].of(kind))
