"""Copies of modules for hooks, which leave the model as it is, also for other threads."""

from collections import OrderedDict
from typing import TypeVar

from torch import nn

from minigpt.errors import ConfigError

M = TypeVar("M", bound=nn.Module)


def shallow_copy(module: M) -> M:
    """Copy a tree of modules, sharing its weights.

    Raises: ConfigError if a function was assigned to ``forward`` of a module, which would call the
        original's children instead of the copy's.
    """
    if "forward" in vars(module):
        raise ConfigError(
            f"a function is assigned to forward of a {type(module).__name__}, so that hooks "
            "of interventions would have no effect in it. Use a forward hook or a subclass instead."
        )
    new = module.__new__(type(module))  # copy.copy refuses modules with parametrizations
    new.__dict__ = vars(module).copy()
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(new, name, OrderedDict(getattr(module, name)))
    new._modules = {
        name: None if child is None else shallow_copy(child)
        for name, child in module._modules.items()
    }
    return new
