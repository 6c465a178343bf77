"""Changes to torch's compiler: less code, faster loads of int8, and the C++ compiler in parallel.

torch's compiler is one thread that waits for each run of the C++ compiler: first for small programs
that detect its vector instructions, then for the two files that torch generated. None of these runs
depends on another.
"""

import gc
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

_MAX_KERNEL_TENSORS = 32
"""Number of tensors above which no more loops are fused into a kernel. Low, so that layers have
equal kernels, which are compiled once and run faster: torch's 500 makes one or two per model."""
_INT8 = "at::vec::Vectorized<int8_t>"
_PARTIAL_LOAD = re.compile(rf"{_INT8}::loadu\((.*), static_cast<int64_t>\(8\)\)")
_PART = "struct Part { void* start; void* data_ptr() const { return start; } void reset() {} };"


@contextmanager
def less_code() -> Iterator[None]:
    """Generate code for a CPU without repeated kernels, tensors for parts, and input checks.

    The checks would run only if the variable AOTI_RUNTIME_CHECK_INPUTS is set. If a version of
    torch does not have the patched names, more code is compiled.
    """
    from torch._inductor.codegen.cpp import CppScheduling
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
    from torch._inductor.virtualized import V

    size, part = "MAX_FUSED_KERNEL_ARGS_NUM", "codegen_deferred_allocation"
    checks = "generate_input_output_runtime_checks"
    generate: Callable[[Any], None] | None = getattr(CppWrapperCpu, checks, None)
    allocate: Callable[[Any, str, Any], None] | None = getattr(CppWrapperCpu, part, None)
    with ExitStack() as patches:
        if hasattr(CppScheduling, size):
            patches.enter_context(patch.object(CppScheduling, size, _MAX_KERNEL_TENSORS))
        if generate is not None:

            def generate_none(wrapper: Any) -> None:
                wrapper.prefix.writeline(_PART)
                with patch.object(V.graph, "graph_inputs", {}):
                    generate(wrapper)

            patches.enter_context(patch.object(CppWrapperCpu, checks, generate_none))
            if allocate is not None:
                point = partialmethod(_point_to_part, allocate)
                patches.enter_context(patch.object(CppWrapperCpu, part, point))
        yield


def _point_to_part(
    wrapper: Any, allocate: Callable[[Any, str, Any], None], name: str, view: Any
) -> None:
    """Declare a part of torch.cat's result as a pointer, which is all that kernels need.

    torch creates a tensor for each part, four in a product, at each token: 4 to 9% of mini's time
    in int8, and 10% of the compilation time of GPT-2's wrapper.
    """
    from torch._inductor.codegen.common import DeferredLine

    if wrapper.device != "cpu":
        allocate(wrapper, name, view)
        return
    n_bytes = wrapper.codegen_sizevar(view.layout.offset * view.get_dtype().itemsize)
    start = f"static_cast<char*>({view.get_name()}.data_ptr()) + {n_bytes}"
    wrapper.writeline(DeferredLine(name, f"Part {name}{{{start}}};"))


@contextmanager
def loads_in_registers() -> Iterator[None]:
    """Load int8 for AVX2 into a register, not through memory.

    Eight values are loaded to become a vector of float32; they fill a quarter of a vector of int8.
    torch first writes them and a padding to memory, and the processor has to wait until it can
    read them back as one vector. For AVX512 and for bfloat16, torch does not do so.
    """
    from torch._inductor.codegen.cpp import CppVecKernel

    name = "_get_vec_load_line"
    load: Callable[..., str] | None = getattr(CppVecKernel, name, None)
    if load is None:
        yield
        return
    with patch.object(CppVecKernel, name, partialmethod(_load_in_register, load)):
        yield


def _load_in_register(kernel: Any, load: Callable[..., str], *args: Any) -> str:
    """Return the C++ expression that loads a vector. Args: those of torch's function."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    line = load(kernel, *args)
    found = _PARTIAL_LOAD.fullmatch(line)
    if found is None or str(pick_vec_isa()) != "avx2":
        return line
    quarter = f"_mm_loadl_epi64(reinterpret_cast<const __m128i*>({found[1]}))"
    return f"{_INT8}(_mm256_castsi128_si256({quarter}))"


@contextmanager
def overlapped() -> Iterator[None]:
    """Overlap runs of the C++ compiler with each other and with Python.

    If a version of torch does not have the patched functions, they run one after another.
    """
    from torch._inductor import cpp_builder, cpu_vec_isa

    probe = getattr(cpu_vec_isa, "valid_vec_isa_list", None)
    run = getattr(cpp_builder, "_run_compile_cmd", None)
    if probe is None or run is None:
        yield
        return
    with ThreadPoolExecutor(2) as pool:
        # In one thread, because a probe temporarily changes the flags of its object.
        isas = pool.submit(_best_isa, probe)
        with (
            patch.object(cpu_vec_isa, "valid_vec_isa_list", isas.result),
            patch.object(cpp_builder, "_run_compile_cmd", _deferring_wrapper(run, pool)),
        ):
            yield


def _best_isa(probe: Any) -> list[Any]:
    """Return the widest vector instructions that work; torch probes all and uses the first."""
    from torch._inductor import cpu_vec_isa

    if "ATEN_CPU_CAPABILITY" in os.environ:  # the user chose others
        return list(probe())
    for isa in cpu_vec_isa.supported_vec_isa_list:
        with patch.object(cpu_vec_isa, "supported_vec_isa_list", [isa]):
            if found := probe.__wrapped__():
                return list(found)
    return []


def _deferring_wrapper(
    run: Callable[[str, str], None], pool: ThreadPoolExecutor
) -> Callable[[str, str], None]:
    """Return ``run``, changed to compile the first file, the wrapper, in parallel until linking."""
    running: list[Future[None]] = []

    def start(command: str, folder: str) -> None:
        if " -c " in command and ".wrapper.cpp" in command:
            # The folder itself is removed when this returns; paths in the command are absolute.
            running.append(pool.submit(run, command, str(Path(folder).parent)))
            return
        if " -c " not in command:
            while running:
                running.pop().result()
        run(command, folder)

    return start


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable the cyclic garbage collector, which would traverse the graph's objects repeatedly."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
