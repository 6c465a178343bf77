"""Copies of modules for hooks, which leave the model as it is, also for other threads."""

from collections import OrderedDict
from typing import TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def shallow_copy(module: M) -> M:
    """Copy a tree of modules, sharing its weights."""
    new = module.__new__(type(module))  # copy.copy refuses modules with parametrizations
    new.__dict__ = vars(module).copy()
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        setattr(new, name, OrderedDict(getattr(module, name)))
    new._modules = {
        name: None if child is None else shallow_copy(child)
        for name, child in module._modules.items()
    }
    return new
