"""Functions that stay single graph nodes until the compiler turns them into loops.

torch traces a graph twice and then walks it in a dozen passes, which take time for each node: 652
for GPT-2 instead of 2,239. The code of a function is traced once for all layers.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

TensorFunction = Callable[..., Any]
"""Takes tensors and numbers, the first a tensor; returns new tensors. Its annotations are types
that torch.library.infer_schema supports."""

_functions: dict[Any, TensorFunction] = {}
"""Custom operator -> the function that it runs."""


def as_one_node(like: TensorFunction) -> Callable[[TensorFunction], TensorFunction]:
    """Make a function a single node in graphs for a CPU; other devices trace into it.

    Args: like, takes the same arguments and returns empty tensors like the function's results.
    """

    def decorate(function: TensorFunction) -> TensorFunction:
        name = function.__name__.lstrip("_")
        # Not torch.library.custom_op, whose first call imports the compiler.
        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(f"minigpt::{name}", schema)
        torch.library.impl(f"minigpt::{name}", "CompositeExplicitAutograd", function)
        torch.library.register_fake(f"minigpt::{name}", like)
        node = getattr(torch.ops.minigpt, name).default
        _functions[node] = function

        def call(first: Tensor, *rest: Any) -> Any:
            return (node if first.device.type == "cpu" else function)(first, *rest)

        return call

    return decorate


def register_lowerings() -> None:
    """Register the functions' lowerings in Inductor for the next graph."""
    from torch._inductor.lowering import register_lowering

    for node, function in _functions.items():
        register_lowering(node, type_promotion_kind=None)(_lowering(function))


def _lowering(function: TensorFunction) -> TensorFunction:
    """Return a lowering of a function's node, which lowers each node of its traced graph."""
    from torch._inductor.virtualized import V

    graphs: dict[str, fx.Graph] = {}

    def kind(arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        tensor = arg.meta["val"]
        return tensor.dtype, tensor.shape, tensor.stride()

    def lower(*inputs: Any) -> Any:
        args = V.graph.current_node.args
        key = str([kind(arg) for arg in args])
        if key not in graphs:
            graphs[key] = _trace(function, args)
        tensors = iter(x for x, arg in zip(inputs, args, strict=True) if isinstance(arg, fx.Node))
        env, outer_node = V.graph.env, V.graph.current_node
        for node in graphs[key].nodes:
            if node.op == "output":
                output = fx.map_arg(node.args[0], env.__getitem__)
            elif node.op == "placeholder":
                env[node] = next(tensors)
            else:
                V.graph.current_node = node
                env[node] = V.graph.run_node(node)
        V.graph.current_node = outer_node
        for node in graphs[key].nodes:  # the next layer has other inputs
            env.pop(node, None)
        return output

    return lower


def _trace(function: TensorFunction, args: Sequence[Any]) -> fx.Graph:
    """Return the graph of a call, in operators that Inductor can lower."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    def call(*tensors: Tensor) -> Any:
        rest = iter(tensors)
        return function(*(next(rest) if isinstance(arg, fx.Node) else arg for arg in args))

    tensors = [arg.meta["val"] for arg in args if isinstance(arg, fx.Node)]
    return make_fx(call, decomposition_table=select_decomp_table())(*tensors).graph
