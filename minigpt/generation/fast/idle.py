"""Decode steps of prepared models that no decoder uses now: making one takes as long as a token."""

import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

from minigpt.model.language_model import LanguageModel

Step = TypeVar("Step")

_idle: weakref.WeakKeyDictionary[LanguageModel, defaultdict[Hashable, list[Any]]] = (
    weakref.WeakKeyDictionary()
)


def allow_idle_steps(model: LanguageModel) -> None:
    """Keep the decode steps of a model, whose weights no longer change, for its next decoder."""
    _idle[model] = defaultdict(list)


def borrow(user: object, model: LanguageModel, kind: Hashable, make: Callable[[], Step]) -> Step:
    """Return an idle step of a kind, or a new one; it is idle again when its user is gone.

    Args: make, returns a step without a reference to the model itself, which would keep it alive.
    """
    if model not in _idle:
        return make()
    steps = _idle[model][kind]
    step: Step = steps.pop() if steps else make()
    weakref.finalize(user, steps.append, step).atexit = False
    return step


def was_made(model: LanguageModel, kind: Hashable) -> bool:
    """Return whether a step of this kind was made and kept."""
    return kind in _idle.get(model, {})
