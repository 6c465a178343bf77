"""Pretend CUDA and MPS devices, for tests on machines without a GPU.

Tensors report the device cuda:0 (or mps:0) and are computed on the CPU. An operation that the real
device would refuse, because its operands are on two devices, or because it is float64 on MPS,
raises. Synchronizations, copies and kernel launches are counted, each with the line of minigpt that
caused it. CUDA graphs are captured and replayed.

    with PretendCuda() as device:
        model.to("cuda")
        ...
    device.syncs, device.launches, device.copies

It does not simulate speed, memory or rounding: float32 results are those of the CPU.
"""

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pretend_runtime
import torch
from pretend_tensor import (
    PretendTensor,
    here,
    is_here,
    leaves,
    mapped,
    on_device,
    on_host,
    pretending,
)
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import minigpt

CUDA = torch.device("cuda", 0)
_PACKAGE = str(Path(minigpt.__file__).parent)

# Views, allocations and operations that only read the shape launch no kernel.
_NO_KERNEL = frozenset(
    (
        "detach",
        "alias",
        "view",
        "_unsafe_view",
        "t",
        "transpose",
        "permute",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "expand",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "unfold",
        "diagonal",
        "lift_fresh",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "_reshape_alias",
        "is_same_size",
        "sym_size",
        "set_",
        "resize_",
        "chunk",
        "unsafe_split",
        "unsafe_chunk",
        "view_as_real",
        "view_as_complex",
        "_to_copy",
        "copy_",
    )
)
# These wait: the host needs the result or its size.
_SYNCHRONIZES = frozenset(
    (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "repeat_interleave.Tensor",
        "linalg_eigvals",
    )
)
# These accept CPU indices with a CUDA tensor, and wait while copying them.
_TAKES_CPU_INDEX = frozenset(
    ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)


class PretendCuda(TorchDispatchMode):
    """A pretend CUDA device; see the module."""

    where = CUDA

    def __init__(
        self,
        *,
        name: str = "NVIDIA H100 80GB HBM3",
        free_memory: int = pretend_runtime.TOTAL_MEMORY,
    ):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        """Waits of the host for the device."""
        self.copies: Counter[str] = Counter()
        """Copies to the device that the host waits for."""
        self.async_copies: Counter[str] = Counter()
        """Copies to the device from pinned memory, which do not wait."""
        self.sdpa: Counter[str] = Counter()
        """Calls of scaled_dot_product_attention, by their options."""
        self.captures: Counter[str] = Counter()
        """Captured CUDA graphs."""
        self.name, self.free_memory = name, free_memory
        self.recording: list[tuple[Any, Any, Any, Any]] | None = None
        """Operations of the CUDA graph that is being captured."""
        self.sync_is_an_error = self.is_one_kernel = False
        self._stack = contextlib.ExitStack()

    def set_sync_debug_mode(self, mode: str) -> None:
        """Raise whenever the host waits, as torch.cuda.set_sync_debug_mode("error") does."""
        self.sync_is_an_error = mode == "error"

    def __enter__(self) -> "PretendCuda":
        self._stack.enter_context(pretending(self))
        for patch in pretend_runtime.patches(self):
            self._stack.enter_context(patch)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *args: Any) -> Any:
        result = super().__exit__(*args)
        self._stack.close()
        return result

    def clear(self) -> None:
        """Forget all counts."""
        for counter in (
            self.launches,
            self.syncs,
            self.copies,
            self.async_copies,
            self.sdpa,
            self.captures,
        ):
            counter.clear()

    def count(self, kind: str, what: str) -> None:
        """Count an event; raise if it is not permitted while a CUDA graph is captured."""
        if self.recording is not None and kind in ("syncs", "copies", "async_copies"):
            raise RuntimeError(f"not permitted when stream is capturing: {what} {_line()}")
        if self.sync_is_an_error and kind in ("syncs", "copies"):
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} {_line()}")
        if not (self.is_one_kernel and kind == "launches"):
            getattr(self, kind)[f"{what} {_line()}"] += 1

    @contextlib.contextmanager
    def as_one_kernel(self, name: str) -> Iterator[None]:
        """Count the operations inside as one launch, because CUDA has one kernel for them."""
        self.is_one_kernel = True
        try:
            yield
        finally:
            self.is_one_kernel = False
        self.count("launches", name)

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raise as torch does for a dtype that the device does not support."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU, count its costs, and raise if CUDA would."""
        flat = list(leaves((args, kwargs)))
        ours = [x for x in flat if isinstance(x, PretendTensor)]
        wanted = kwargs.get("device")
        to_cuda = is_here(wanted)
        # With a pretend tensor, "cpu" is only what C++ assumes; Tensor.to is handled by _move.
        to_cpu = wanted is not None and torch.device(wanted).type == "cpu" and not ours
        if not ours and not to_cuda:
            return func(*args, **kwargs)
        if func.namespace == "quantized":
            raise NotImplementedError(f"{func} has no kernel for {here().type} at {_line()}")
        name = _name(func)
        hosts = [
            x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)
        ]
        self._check_and_count(func, name, args, ours, hosts, to_cuda=to_cuda, to_cpu=to_cpu)
        if wanted is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        plain_args, plain_kwargs = mapped(on_host, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if self.recording is not None:
            self.recording.append((func, plain_args, plain_kwargs, out))
        if to_cpu or name in ("_local_scalar_dense", "equal"):
            return out
        if name == "copy_" and not isinstance(args[0], PretendTensor):
            return args[0]
        for made in leaves(out):
            if isinstance(made, torch.Tensor):
                self.require_dtype(made.dtype)
        wrapped = mapped(on_device, out)
        if not ours:
            return wrapped
        if name in ("set_", "resize_"):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _check_and_count(
        self, func: Any, name: str, args: Any, ours: Any, hosts: Any, *, to_cuda: bool, to_cpu: bool
    ) -> None:
        overload = f"{name}.{func._overloadname}"
        if name in ("_to_copy", "copy_"):
            if name == "copy_":
                source, target = args[1], args[0]
                crosses = isinstance(source, PretendTensor) != isinstance(target, PretendTensor)
                is_down = isinstance(source, PretendTensor) and crosses
            else:
                source = args[0]
                crosses = (to_cuda and not ours) or (to_cpu and bool(ours))
                is_down = crosses and to_cpu
            if crosses and is_down:
                self.count("syncs", "copy to the host")
            elif crosses:
                self.count("copies", f"copy to the device {tuple(source.shape)}")
            else:
                self.count("launches", name)
            return
        if name == "_weight_int8pack_mm" and not args[0].is_contiguous():
            # CUDA would silently continue.
            raise RuntimeError(f"CUDA's {name} would read other rows, at {_line()}")
        if name in _SYNCHRONIZES or overload in _SYNCHRONIZES:
            self.count("syncs", name)
        if name in _TAKES_CPU_INDEX:
            indices = [x for x in args[1] if isinstance(x, torch.Tensor)]
            for index in indices:
                if not isinstance(index, PretendTensor) and index.ndim:
                    self.count("copies", f"{name}: a list or CPU indices")
                if index.dtype in (torch.bool, torch.uint8):
                    self.count("syncs", f"{name}: a mask of unknown size")
            hosts = [x for x in hosts if not any(x is index for index in indices)]
        takes_scalars = torch.Tag.pointwise in func.tags or name in ("fill_", *_TAKES_CPU_INDEX)
        wrong = [tuple(x.shape) for x in hosts if x.ndim or not takes_scalars]
        if ours and wrong:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {overload} has {here()} and "
                f"cpu {wrong} at {_line()}"
            )
        if to_cuda and not ours and hosts:
            raise RuntimeError(f"{overload} of CPU tensors onto {here()} at {_line()}")
        if name not in _NO_KERNEL:
            self.count("launches", name)


class PretendMps(PretendCuda):
    """A pretend MPS device, without float64."""

    where = torch.device("mps", 0)

    def require_dtype(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64:
            raise TypeError(f"the MPS framework doesn't support float64, at {_line()}")


@functools.cache
def _name(func: Any) -> str:
    return str(func._schema.name.split("::")[1])


def _line() -> str:
    """Return the innermost line of minigpt on the stack."""
    frame = sys._getframe(1)
    while frame is not None and not frame.f_code.co_filename.startswith(_PACKAGE):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return "outside of minigpt"
    return f"{frame.f_code.co_filename.removeprefix(_PACKAGE + '/')}:{frame.f_lineno}"
