"""Decoding with a compiled graph of the decode step: ``--compile``.

AOTInductor compiles ahead of time, for later processes too. torch.compile's own caches only save
the C++ compiler's time: every process would import the compiler and trace the model again, while
torch loads a package without either. The weights are not part of the package, so it is small
and works for every checkpoint of the same shape.

Shapes: B rows, S positions in view.
"""

import hashlib
import inspect
import json
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.errors import ConfigError, ResourceError
from minigpt.fields import round_up
from minigpt.generation.fast import decode_step, graph, nodes, toolchain
from minigpt.generation.fast.decode_step import Shown, StepForward
from minigpt.generation.fast.eager import EagerKernels, PromptStep
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.fast.idle import borrow, has_idle_step, lend
from minigpt.generation.fast.packages import cached_package, find_package, slower_path
from minigpt.model import layers
from minigpt.model.attention import Recorder
from minigpt.model.gpt import GPT

CompiledStep = Callable[[list[Tensor]], list[Tensor]]
"""Takes the tensors of GraphStep.forward as one list and returns its results as another."""

_CPU_VIEW = 16  # positions in view are rounded up to full vectors
_CUDA_VIEW = 256  # on CUDA: to a power of two, at least this, as each has its own CUDA graph

_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    # Vectors of up to 8 weights would become numbers in the code, which other checkpoints use too.
    "always_keep_tensor_constants": True,
    # Would only speed up later compilations.
    "aot_inductor.precompile_headers": False,
    "size_asserts": False,
    # a * b + c in one instruction, as in the matrix products of libraries.
    "cpp.enable_floating_point_contract_flag": "fast",
    # Fuse the loops that write a key and a value, which share only the position.
    "score_fusion_memory_threshold": 1,
    # On CUDA, it would keep bias additions and cache writes from fusing with their products.
    "loop_ordering_after_fusion": False,
}

_idle_loaders: defaultdict[Path, list[Any]] = defaultdict(list)
"""Loaded packages not in use by a decoder: checking and loading one takes longer than a token."""
_CUDA_HEADERS = ("cuda_runtime.h", "crt/host_defines.h", "nv/target")
_FIRST_CUDA_OF_ONE_FOLDER = 13
"""First CUDA version whose wheels from NVIDIA all install their headers into one folder."""


class CompiledForward(StepForward):
    """Decodes one token per row with a compiled graph whose number of positions is dynamic.

    In the graph for several rows, the number of rows is dynamic too, but at least two.
    """

    is_compiled = True

    def __init__(
        self, model: GPT, *, capacity: int, n_rows: int = 1, recorder: Recorder | None = None
    ) -> None:
        """Load the graph, compiling it if no earlier process has.

        Args: capacity, the number of positions that the cache has room for; n_rows, the largest
            number of rows.
        Raises: ConfigError if there is no C++ compiler; ResourceError if the cache folder cannot
            be written.
        """
        super().__init__(model, capacity=round_up(capacity, _CPU_VIEW), recorder=recorder)
        self.min_rows = 2 if n_rows > 1 else 1
        # Unfilled positions have weight 0, but 0 times NaN or inf would be NaN.
        self.cache.keys_LBGSD.zero_()
        self.cache.values_LBGSD.zero_()
        # One graph works with and without a trace; on CUDA, unneeded outputs would cost kernels.
        shown = decode_step.shown_to(recorder) if model.device.type == "cuda" else "residual"
        kind = _kind(shown, is_batch=n_rows > 1)
        make = partial(_make_step, model, shown, is_batch=n_rows > 1)
        self._run, self._prompt = borrow(self, model, kind, make)
        self._bind()

    def _bind(self) -> None:
        keys, values = self.cache.keys_LBGSD, self.cache.values_LBGSD
        self._tokens = torch.zeros(self.cache.n_rows, dtype=torch.int64, device=self.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._view = torch.empty(self.cache.capacity, device=self.device)
        self._caches = [*keys.unbind(), *values.unbind()]
        self._replays: dict[int, tuple[torch.cuda.CUDAGraph, list[Tensor]]] = {}

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only these rows. On CUDA, buffers shrink only when half of them are unused.

        Every number of rows needs its own CUDA graphs, and capturing one takes as long as many
        tokens. The rows that are kept move to the front; the others repeat the last one.
        """
        n_held = self.cache.n_rows
        is_small = n_held == self.min_rows or n_held < 2 * len(rows)
        if self.device.type != "cuda" or len(rows) > n_held or not is_small:
            super().keep(rows)
            return
        index = torch.tensor([*rows, *[rows[-1]] * (n_held - len(rows))], device=self.device)
        for kind in (self.cache.keys_LBGSD, self.cache.values_LBGSD):
            kind.copy_(kind.index_select(1, index))

    def _decode(self, tokens: Tensor, position: int) -> Sequence[Tensor]:
        self._tokens.copy_(tokens)
        self._position.fill_(position)
        n_view = self._n_view(position + 1)
        inputs = [self._tokens, self._position, self._view[:n_view], *self._caches]
        if self.device.type != "cuda":
            return self._run(inputs)
        if n_view not in self._replays:
            self._replays[n_view] = self._capture(inputs)
        cuda_graph, outputs = self._replays[n_view]
        cuda_graph.replay()
        return outputs

    def _n_view(self, n_filled: int) -> int:
        """Return how many positions to read, rounded up so that only a few numbers occur."""
        if self.device.type == "cuda":
            n_view = max(_CUDA_VIEW, 1 << (n_filled - 1).bit_length())
        else:
            n_view = round_up(n_filled, _CPU_VIEW)
        return min(n_view, self.cache.capacity)

    def _capture(self, inputs: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
        """Capture the kernels as a CUDA graph: one launch per token."""
        warm_up = torch.cuda.Stream(self.device)
        warm_up.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(warm_up):
            self._run(inputs)  # the first call's initialization must not be captured
        torch.cuda.current_stream(self.device).wait_stream(warm_up)
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            outputs = self._run(inputs)
        return cuda_graph, outputs


def _kind(shown: Shown = "residual", *, is_batch: bool = False) -> tuple[Any, ...]:
    return "graph", shown, is_batch, torch.get_num_threads()


def _make_step(
    model: GPT, shown: Shown, *, is_batch: bool
) -> tuple[CompiledStep, PromptStep | None]:
    run = load_step(GraphStep(model, shown), is_batch=is_batch)
    if model.device.type != "cpu":
        return run, None
    return run, PromptStep(model, EagerKernels(model, copies=False), "nothing")


def is_default(model: GPT) -> bool:
    """Return whether a model's step is idle, or in the cache and not slower than the eager step.

    For a model whose weights were prepared for eager decoding, it is not.
    """
    if has_idle_step(model, _kind()):
        return True
    key = package_key(model)
    return find_package(key) is not None and not slower_path(key).exists()


def package_key(model: GPT) -> str:
    """Return the cache key of the package of a model's step for one row."""
    return _key(GraphStep(model), is_batch=False)


def compile_step(model: GPT) -> Path:
    """Return the package of a model's step for one row, compiled if it is not in the cache.

    Raises: as ``load_step``.
    """
    return _package(GraphStep(model), is_batch=False)


def _package(step: GraphStep, *, is_batch: bool) -> Path:
    key = _key(step, is_batch=is_batch)
    return cached_package(key, lambda path: _compile(step, path, is_batch=is_batch))


def _tensors(step: GraphStep) -> dict[str, Tensor]:
    # torch chooses one of the names of a tied tensor.
    tensors: dict[str, Tensor] = dict(step.named_buffers(remove_duplicate=False))
    return tensors | dict(step.named_parameters(remove_duplicate=False))


def load_step(step: GraphStep, *, is_batch: bool) -> CompiledStep:
    """Return the compiled step, for one row or for two or more; it is cached on disk.

    Raises: ConfigError if there is no working C++ compiler; ResourceError if the cache folder
        cannot be used.
    """
    return LoadedStep(_package(step, is_batch=is_batch), _tensors(step))


class LoadedStep:
    """A loaded package with the weights of a model."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self._loader = lend(_idle_loaders[path], self, lambda: _loader(path))
        names = self._loader.get_constant_fqns()
        assert tensors.keys() >= set(names), "the weights were prepared for eager decoding"
        # Keeps them alive, because the loader only has pointers.
        self._weights = {name: tensors[name].detach().contiguous() for name in names}
        self._loader.load_constants(self._weights, False, True, True)  # require all; do not copy

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        return self._loader.run(inputs)


def _loader(path: Path) -> Any:
    # torch._inductor.aoti_load_package does the same, but also imports the compiler.
    try:
        return torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1)
    except RuntimeError as error:
        path.unlink(missing_ok=True)
        reason = str(error).strip().splitlines()[0]
        raise ResourceError(
            f"the compiled step {str(path)!r} cannot be loaded: {reason} It was deleted. Run "
            "again to compile it, or use --no-compile."
        ) from error


def _key(step: GraphStep, *, is_batch: bool) -> str:
    """Return everything that the machine code depends on, as text."""
    device = step.model.device
    hardware: Any = [dict(torch.cpu.get_capabilities()), torch.get_num_threads()]
    if device.type == "cuda":
        hardware = torch.cuda.get_device_properties(device).name
    return json.dumps(
        {
            "torch": [torch.__version__, torch.version.git_version],
            "code": _code_digests(),
            "options": _OPTIONS,
            "config": asdict(step.model.config),
            "tensors": {n: [str(t.dtype), t.shape] for n, t in _tensors(step).items()},
            "cache": [str(step.model.dtype), is_batch],
            "shown": step.shown,
            "device": hardware,
        },
        sort_keys=True,
    )


@cache
def _code_digests() -> list[str]:
    sources = map(inspect.getsource, (decode_step, graph, layers, nodes, toolchain))
    return [hashlib.sha256(source.encode()).hexdigest() for source in sources]


def _export(step: GraphStep, *, is_batch: bool) -> torch.export.ExportedProgram:
    """Return GraphStep.forward with a dynamic number of positions, and of rows in a batch."""
    config, device = step.model.config, step.model.device
    n_rows, n_view, n_room = 1 + is_batch, 16, 32
    shape = (n_rows, config.n_kv_head, n_room, config.d_head)
    caches = [
        [torch.zeros(shape, device=device, dtype=step.model.dtype) for _ in range(config.n_layer)]
        for _ in range(2)
    ]
    tokens = torch.zeros(n_rows, dtype=torch.int64, device=device)
    position = torch.zeros(1, dtype=torch.int64, device=device)
    inputs = (tokens, position, torch.empty(n_view, device=device), *caches)
    rows: Any = {0: torch.export.Dim("n_rows", min=2)} if is_batch else {}
    in_view, room = torch.export.Dim("n_view", min=2), torch.export.Dim("n_room", min=2)
    free = [{**rows, 2: room}] * config.n_layer
    dynamic: Any = (rows, {}, {0: in_view}, free, free)
    return torch.export.export(step, inputs, dynamic_shapes=dynamic, strict=False)


def _compile(step: GraphStep, path: Path, *, is_batch: bool) -> None:
    """Write the package of a step's graph."""
    # Imported here because it takes a second, and only the first run needs it.
    import torch._inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler
    from torch._inductor.utils import fresh_cache

    device = step.model.device
    if device.type == "cuda":
        _find_cuda_headers()
    try:
        get_cpp_compiler()  # fail before the work, not after it
        # The compiler's own cache has a guessable name in the system's temporary folder.
        with (
            warnings.catch_warnings(),
            fresh_cache(),
            torch.no_grad(),
            toolchain.gc_disabled(),
            toolchain.less_code(),
            toolchain.loads_in_registers(),
            toolchain.overlapped(),
        ):
            warnings.simplefilter("ignore")  # the compiler warns about its own code
            nodes.register_lowerings()
            torch._inductor.aoti_compile_and_package(
                _export(step, is_batch=is_batch),
                package_path=str(path),
                inductor_configs=dict(_OPTIONS),  # it adds some
            )
    except (OSError, RuntimeError) as error:
        cause = getattr(error, "inner_exception", error)  # the compiler wraps its own errors
        reason = _error_line(cause)
        if device.type == "cuda":
            raise ConfigError(f"compiling for CUDA failed: {reason}. {_cuda_remedy()}") from error
        if not isinstance(cause, (InvalidCxxCompiler, CppCompileError)):
            raise
        raise ConfigError(
            f"compiling needs a working C++ compiler: {reason}. Install g++, set the variable CXX "
            "to another compiler, or use --no-compile."
        ) from error


def _error_line(error: BaseException) -> str:
    """Return the line with the error from a compiler's output, which starts with its command."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    named = (line for line in lines if "error:" in line or "cannot find" in line)
    return next(named, lines[0]).rstrip(".")


def _cuda_remedy() -> str:
    version = torch.version.cuda or "12"
    wheels = f", or: pip install 'cuda-toolkit[crt,cccl]=={version}.*'"
    return (
        f"Install the CUDA toolkit {version} and set CUDA_HOME to its folder"
        f"{wheels if int(version.split('.')[0]) >= _FIRST_CUDA_OF_ONE_FOLDER else ''}, or use "
        "--no-compile."
    )


def _find_cuda_headers() -> None:
    """Point torch at the CUDA headers of NVIDIA's wheels, if no toolkit is installed.

    torch itself does not look there. pip installs some of these wheels with torch; those with the
    headers that cuda_runtime.h includes must be installed separately.
    Raises: ConfigError if headers are missing; the compiler would only notice after a minute.
    """
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME is not None or torch.version.cuda is None:
        return
    folder = Path(torch.__file__).parents[1] / f"nvidia/cu{torch.version.cuda.split('.')[0]}"
    missing = [name for name in _CUDA_HEADERS if not (folder / "include" / name).is_file()]
    if missing:
        raise ConfigError(
            f"compiling for CUDA needs the header {missing[0]}, and CUDA_HOME is not set. "
            f"{_cuda_remedy()}"
        )
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(folder)
