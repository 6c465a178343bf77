"""Ahead-of-time compilation of the decode step by AOTInductor, cached for later processes.

torch.compile's own caches only save the C++ compiler's time: every process would import the
compiler and trace the model again, while the loader of a package is already in torch. The weights
stay outside the package, so it is small and serves every checkpoint of the same shape.
"""

import hashlib
import inspect
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError
from minigpt.generation.fast import decode_step, graph
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.fast.package_cache import package
from minigpt.model import layers

Example = tuple[Any, ...]
Run = Callable[[list[Tensor]], list[Tensor]]
"""Takes the tensors of GraphStep.forward as one list and returns its results as another."""

_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    # Would only speed up later compilations.
    "aot_inductor.precompile_headers": False,
    # a * b + c in one instruction, as in a library's product.
    "cpp.enable_floating_point_contract_flag": "fast",
}


def load_step(step: GraphStep, *, cache_dtype: torch.dtype, is_batch: bool) -> Run:
    """Return the compiled step, for one row or for any number from two on; cached on disk.

    Raises: ConfigError if there is no working C++ compiler; ResourceError if the cache folder
        cannot be used.
    """
    # torch chooses one of the names of a tied tensor.
    tensors: dict[str, Tensor] = dict(step.named_buffers(remove_duplicate=False))
    tensors.update(step.named_parameters(remove_duplicate=False))
    key = _key(step, tensors, cache_dtype, is_batch=is_batch)
    inputs, free = _example(step, cache_dtype, is_batch=is_batch)
    path = package(key, lambda path: _compile(step, inputs, free, path))
    # torch._inductor.aoti_load_package is this and an import of the compiler.
    loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    names = loader.get_constant_fqns()
    assert tensors.keys() >= set(names), "the weights were prepared for eager decoding"
    weights = {name: tensors[name].detach().contiguous() for name in names}
    loader.load_constants(weights, False, True, True)  # require all of them; do not copy

    def run(inputs: list[Tensor]) -> list[Tensor]:
        assert weights  # the loader only points at them
        return loader.run(inputs)

    return run


def _key(
    step: GraphStep, tensors: dict[str, Tensor], cache_dtype: torch.dtype, *, is_batch: bool
) -> str:
    """Return everything that the machine code depends on, as text."""
    device = tensors["model.final_norm.weight"].device
    is_cuda = device.type == "cuda"
    return json.dumps(
        {
            "torch": [torch.__version__, torch.version.git_version],
            "code": [
                hashlib.sha256(inspect.getsource(s).encode()).hexdigest()
                for s in (decode_step, graph, layers)
            ],
            "options": _OPTIONS,
            "config": asdict(step.model.config),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in tensors.items()},
            "cache": [str(cache_dtype), is_batch],
            "shows_attention": step.shows_attention,
            "device": torch.cuda.get_device_properties(device).name
            if is_cuda
            else [dict(torch.cpu.get_capabilities()), torch.get_num_threads()],
        },
        sort_keys=True,
    )


def _compile(step: GraphStep, inputs: Example, free: Example, path: Path) -> None:
    # Imported here because it takes a second, which only the first run needs.
    import torch._inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    try:
        get_cpp_compiler()  # fail before the work, not after it
        # The compiler's own cache has a guessable name in the system's temporary folder.
        with warnings.catch_warnings(), fresh_cache(), torch.no_grad():
            warnings.simplefilter("ignore")  # the compiler warns about its own code
            program = torch.export.export(step, inputs, dynamic_shapes=free, strict=False)
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path), inductor_configs=_OPTIONS
            )
    except (InvalidCxxCompiler, CppCompileError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"compiling needs a working C++ compiler: {reason}. Install g++, or name another in "
            "the variable CXX, or use --no-compile."
        ) from error


def _example(
    step: GraphStep, cache_dtype: torch.dtype, *, is_batch: bool
) -> tuple[Example, Example]:
    """Return example inputs of GraphStep.forward, and their dynamic dimensions."""
    config, device = step.model.config, next(step.parameters()).device
    n_rows, n_view, n_room = 1 + is_batch, 16, 32
    shape = (n_rows, config.n_kv_head, n_room, config.d_head)
    caches = [
        [torch.zeros(shape, device=device, dtype=cache_dtype) for _ in range(config.n_layer)]
        for _ in range(2)
    ]
    tokens = torch.zeros(n_rows, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    rows = {0: torch.export.Dim("n_rows", min=2)} if is_batch else {}
    view, room = torch.export.Dim("n_view", min=2), torch.export.Dim("n_room", min=2)
    free_caches = [{**rows, 2: room}] * config.n_layer
    return (
        (tokens, position, torch.empty(n_view, device=device), *caches),
        (rows, {}, {0: view}, free_caches, free_caches),
    )
