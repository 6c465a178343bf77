"""Pretend CUDA and MPS devices, for tests on machines without a GPU.

Tensors report the device cuda:0 (or mps:0) and are computed on the CPU. An operation that the real
device would refuse, because its operands are on two devices, or because it is float64 on MPS,
raises. Synchronizations, copies and kernel launches are counted, each with the line of minigpt that
caused it, and CUDA graphs are captured and replayed.

    with PretendCuda() as device:
        model.to("cuda")
        ...
    device.syncs, device.launches, device.copies

It knows nothing of speed, memory, or rounding: float32 results are those of the CPU.
"""

import contextlib
import functools
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

import minigpt

CUDA = torch.device("cuda", 0)
TOTAL_MEMORY = 80 * 2**30
_PACKAGE = str(Path(minigpt.__file__).parent)

# Views, allocations, and operations that only look at the shape: no kernel.
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
# The host needs the result, or the size of the result.
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
# Accept CPU indices beside a CUDA tensor, and copy them, which waits.
_TAKES_CPU_INDEX = frozenset(
    ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
)


_NORMS = (torch.layer_norm, torch.rms_norm, F.layer_norm, F.rms_norm)


def here() -> torch.device:
    """Return the device that is pretended."""
    assert PretendCuda.current is not None, "a pretend tensor outside of its device"
    return PretendCuda.current.where


def is_here(device: Any) -> bool:
    """Return whether a device, or None, is the one that is pretended."""
    return device is not None and torch.device(device).type == here().type


class PretendTensor(torch.Tensor):
    """A tensor on cuda:0 whose numbers are in a CPU tensor."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "PretendTensor":
        # C++ believes that the tensor is on the CPU, where autograd works; Python is told otherwise
        # in __torch_function__.
        made: Any = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=elem.device,
            requires_grad=False,
        )
        made.elem = elem
        return made  # type: ignore[no-any-return]

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["elem"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> "PretendTensor":
        return PretendTensor(inner["elem"])

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({self.elem!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__ and isinstance(args[0], PretendTensor):  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                func(*args)
            args[0].elem = args[1].elem
            return None
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return here()
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return here().type == "cuda"
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return _move(func, args, kwargs or {})
        if func in (torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage):
            return func(args[0].elem)
        if func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError(f"can't convert {here()} device type tensor to numpy")
        if func is torch.Tensor.tolist:
            return args[0].to("cpu").tolist()
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            # A list becomes an index tensor in C++, on the tensor's device: a copy that waits.
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            where = tuple(torch.tensor(i).to(here()) if isinstance(i, list) else i for i in where)
            args = (args[0], where, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert PretendCuda.current is not None, "a pretend tensor outside of its device"
        return PretendCuda.current.dispatch(func, args, kwargs or {})


def _move(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Tensor.to of a pretend tensor; C++ would find that there is nothing to do."""
    tensor, options = args[0], dict(kwargs)
    if func is torch.Tensor.cpu:
        options["device"] = "cpu"
    elif func is torch.Tensor.to:
        for value in args[1:]:
            if isinstance(value, torch.Tensor):
                options |= {"device": value.device, "dtype": value.dtype}
            elif isinstance(value, torch.dtype):
                options["dtype"] = value
            elif isinstance(value, (str, torch.device)):
                options["device"] = value
    device = torch.device(options.pop("device", None) or here())
    dtype = options.get("dtype") or tensor.dtype
    with torch._C.DisableTorchFunctionSubclass():
        if device.type == here().type:
            if options.get("dtype") or options.get("copy"):
                return tensor.to(dtype, copy=options.get("copy", False))  # type: ignore[no-any-return]
            return tensor  # type: ignore[no-any-return]
        return _ToHost.apply(tensor, dtype)  # type: ignore[no-any-return,no-untyped-call]


def _move_from_host(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Tensor.to of a tensor on the host."""
    values = [*args[1:], *kwargs.values()]
    devices = [
        value.device if isinstance(value, torch.Tensor) else torch.device(value)
        for value in values
        if isinstance(value, (str, torch.device, torch.Tensor))
    ]
    if func is not torch.Tensor.cuda and not any(is_here(device) for device in devices):
        return func(*args, **kwargs)  # type: ignore[no-any-return]
    dtypes = [value for value in values if isinstance(value, torch.dtype)]
    is_async = bool(kwargs.get("non_blocking")) and getattr(args[0], "is_pretend_pinned", False)
    dtype = dtypes[0] if dtypes else args[0].dtype
    return _ToDevice.apply(args[0], dtype, is_async)  # type: ignore[no-any-return,no-untyped-call]


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: PretendTensor, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        assert PretendCuda.current is not None
        PretendCuda.current.count("syncs", "copy to the host")
        return tensor.elem.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient.to(here()), None


class _ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, tensor: torch.Tensor, dtype: torch.dtype, is_async: bool
    ) -> torch.Tensor:
        device = PretendCuda.current
        assert device is not None
        kind = "async_copies" if is_async else "copies"
        device.count(kind, f"copy to the device {tuple(tensor.shape)}")
        device.require_dtype(dtype)
        return PretendTensor(tensor.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient.cpu(), None, None


class PretendCuda(TorchDispatchMode):
    """The device; see the module."""

    current: "PretendCuda | None" = None
    where = CUDA

    def __init__(self, *, name: str = "NVIDIA H100 80GB HBM3", free_memory: int = TOTAL_MEMORY):
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()
        """Waits of the host for the device."""
        self.copies: Counter[str] = Counter()
        """Copies to the device that the host waits for."""
        self.async_copies: Counter[str] = Counter()
        """Copies to the device from pinned memory, which do not wait."""
        self.sdpa: Counter[str] = Counter()
        """Calls of scaled_dot_product_attention with what they asked for."""
        self.captures: Counter[str] = Counter()
        """CUDA graphs."""
        self.name, self.free_memory = name, free_memory
        self.recording: list[tuple[Any, Any, Any, Any]] | None = None
        """Operations of the CUDA graph that is being captured."""
        self.sync_is_an_error = self.is_one_kernel = False
        self._stack = contextlib.ExitStack()

    def set_sync_debug_mode(self, mode: str) -> None:
        """Raise from now on where the host waits, as torch.cuda.set_sync_debug_mode("error")."""
        self.sync_is_an_error = mode == "error"

    # -- what torch.cuda reports -------------------------------------------------------------
    def __enter__(self) -> "PretendCuda":
        cuda, stack = torch.cuda, self._stack
        properties = types.SimpleNamespace(
            name=self.name, total_memory=TOTAL_MEMORY, major=9, minor=0, multi_processor_count=132
        )
        answers: dict[str, Any] = {
            "_lazy_init": lambda *a: None,
            "is_available": lambda: self.where.type == "cuda",
            "device_count": lambda: 1,
            "is_initialized": lambda: True,
            "_is_in_bad_fork": lambda: False,
            "current_device": lambda: 0,
            "set_device": lambda d: None,
            "get_device_capability": lambda d=None: (9, 0),
            "get_device_name": lambda d=None: self.name,
            "get_device_properties": lambda d=None: properties,
            "mem_get_info": lambda d=None: (self.free_memory, TOTAL_MEMORY),
            "synchronize": lambda d=None: self.count("syncs", "synchronize"),
            "is_bf16_supported": lambda *a, **k: True,
            "manual_seed_all": lambda s: None,
            "manual_seed": lambda s: None,
            "is_current_stream_capturing": lambda: self.recording is not None,
            "Stream": _Stream,
            "current_stream": lambda d=None: _Stream(),
            "stream": lambda s: contextlib.nullcontext(),
            "CUDAGraph": _Graph,
            "graph": _Capture,
            "max_memory_allocated": lambda d=None: 0,
            "reset_peak_memory_stats": lambda d=None: None,
            "empty_cache": lambda: None,
            "device": lambda d: contextlib.nullcontext(),
            "set_sync_debug_mode": self.set_sync_debug_mode,
            "get_rng_state": lambda d="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda s, d="cuda": None,
        }
        for key, answer in answers.items():
            stack.enter_context(mock.patch.object(cuda, key, answer))
        has_mps = self.where.type == "mps"
        stack.enter_context(
            mock.patch.object(torch.backends.mps, "is_available", return_value=has_mps)
        )
        wait = answers["synchronize"]
        stack.enter_context(mock.patch.object(torch.mps, "synchronize", wait))
        group = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype

        def grouped(tensors: Any, with_indices: bool = False) -> Any:
            found = group(tensors, with_indices)
            is_ours = isinstance(tensors[0][0], PretendTensor)
            return {(self.where if is_ours else key[0], key[1]): v for key, v in found.items()}

        clip_grad = torch.nn.utils.clip_grad
        name = "_group_tensors_by_device_and_dtype"
        stack.enter_context(mock.patch.object(clip_grad, name, grouped))

        # Inference tensors have no version counter, which a view of a wrapper would be given.
        def enter(self: Any) -> None:
            self._instead = torch.no_grad()
            self._instead.__enter__()

        def leave(self: Any, *args: Any) -> None:
            self._instead.__exit__(*args)

        stack.enter_context(mock.patch.object(torch.inference_mode, "__enter__", enter))
        stack.enter_context(mock.patch.object(torch.inference_mode, "__exit__", leave))
        # The default check runs inside an operation, where C++ answers for the device.
        checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
        by_shape = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
        stack.enter_context(mock.patch.dict(checks, by_shape))
        autocast = torch.autocast

        def autocast_on_cpu(kind: str, **options: Any) -> Any:
            return autocast("cpu" if kind == self.where.type else kind, **options)

        stack.enter_context(mock.patch.object(torch, "autocast", autocast_on_cpu))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pinned))
        # Asked for each LSTM; without it, torch computes the same with its own kernels.
        cudnn = torch.backends.cudnn
        stack.enter_context(mock.patch.object(cudnn, "is_acceptable", return_value=False))
        stack.enter_context(_Functions(self))
        PretendCuda.current = self
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *args: Any) -> Any:
        result = super().__exit__(*args)
        self._stack.close()
        PretendCuda.current = None
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
        """Count an event of a kind; raise if a CUDA graph that is captured does not permit it."""
        if self.recording is not None and kind in ("syncs", "copies", "async_copies"):
            raise RuntimeError(f"not permitted when stream is capturing: {what} {_line()}")
        if self.sync_is_an_error and kind in ("syncs", "copies"):
            raise RuntimeError(f"called a synchronizing CUDA operation: {what} {_line()}")
        if not (self.is_one_kernel and kind == "launches"):
            getattr(self, kind)[f"{what} {_line()}"] += 1

    @contextlib.contextmanager
    def as_one_kernel(self, name: str) -> Iterator[None]:
        """Count the operations inside as one launch, as CUDA has one kernel for them."""
        self.is_one_kernel = True
        try:
            yield
        finally:
            self.is_one_kernel = False
        self.count("launches", name)

    def require_dtype(self, dtype: torch.dtype) -> None:
        """Raise as torch does for a tensor of a dtype that the device does not have."""

    # -- what an operation does --------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.dispatch(func, args, kwargs or {})

    def dispatch(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the CPU, count what it costs, and raise if CUDA would."""
        flat = list(_leaves((args, kwargs)))
        ours = [x for x in flat if isinstance(x, PretendTensor)]
        wanted = kwargs.get("device")
        to_cuda = is_here(wanted)
        # "cpu" beside a pretend tensor is what C++ believes; Tensor.to is _move.
        to_cpu = wanted is not None and torch.device(wanted).type == "cpu" and not ours
        if not ours and not to_cuda:
            return func(*args, **kwargs)
        if func.namespace == "quantized":
            raise NotImplementedError(f"{func} has no kernel for {here().type} at {_line()}")
        name = _name(func)
        hosts = [
            x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, PretendTensor)
        ]
        self._judge(func, name, args, ours, hosts, to_cuda=to_cuda, to_cpu=to_cpu)
        if wanted is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        plain_args, plain_kwargs = _mapped(_on_host, (args, kwargs))
        out = func(*plain_args, **plain_kwargs)
        if self.recording is not None:
            self.recording.append((func, plain_args, plain_kwargs, out))
        if to_cpu or name in ("_local_scalar_dense", "equal"):
            return out
        if name == "copy_" and not isinstance(args[0], PretendTensor):
            return args[0]
        for made in _leaves(out):
            if isinstance(made, torch.Tensor):
                self.require_dtype(made.dtype)
        wrapped = _mapped(_on_device, out)
        if not ours:
            return wrapped
        if name in ("set_", "resize_"):
            return args[0]
        return return_and_correct_aliasing(func, args, kwargs, wrapped)

    def _judge(
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
            raise RuntimeError(f"CUDA's {name} would read other rows, at {_line()}")  # silently
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
    """A pretend MPS device, which has no float64."""

    where = torch.device("mps", 0)

    def require_dtype(self, dtype: torch.dtype) -> None:
        if dtype == torch.float64:
            raise TypeError(f"the MPS framework doesn't support float64, at {_line()}")


# Arguments of operations are nested in lists, tuples and dicts alone, which torch's own functions
# for trees, made for every class that can be registered, take a multiple of the time to walk.
def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves([*value.values()])
    else:
        yield value


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([_mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(change, part) for key, part in value.items()}
    return change(value)


def _on_host(value: Any) -> Any:
    return value.elem if isinstance(value, PretendTensor) else value


def _on_device(value: Any) -> Any:
    return PretendTensor(value) if type(value) in (torch.Tensor, torch.nn.Parameter) else value


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


def _pinned(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    made: Any = tensor.clone()
    made.is_pretend_pinned = True
    return made  # type: ignore[no-any-return]


class _Functions(TorchFunctionMode):
    """Answers what C++ would decide by the device, and notes calls of attention."""

    def __init__(self, device: PretendCuda) -> None:
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_grad = func is torch.autograd.grad
        if is_grad or func is torch.Tensor.backward:  # what is recomputed in it counts too
            (output,), inputs = args[:2] if is_grad else (args[:1], ())
            with self:
                return torch.autograd.graph._engine_run_backward(
                    (output,),
                    (torch.ones_like(output),),
                    False,
                    False,
                    inputs,
                    allow_unreachable=not is_grad,
                    accumulate_grad=not is_grad,
                )
        wanted = kwargs.get("device")
        is_ours = is_here(wanted)
        if (
            func in (torch.tensor, torch.as_tensor) and is_ours
        ):  # as in C++: on the host, then a copy
            made = func(*args, **{**kwargs, "device": "cpu"})
            return _ToDevice.apply(made, kwargs.get("dtype") or made.dtype, False)  # type: ignore[no-untyped-call]
        if func in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], PretendTensor):
            return _move_from_host(func, args, kwargs)
        if (
            func in _NORMS
            and torch.is_autocast_enabled("cpu")
            and isinstance(args[0], PretendTensor)
        ):
            args, kwargs = _mapped(  # float32 in CUDA's autocast, not in the CPU's
                lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs)
            )
        if func in (torch.rms_norm, F.rms_norm) and isinstance(args[0], PretendTensor):
            with self.device.as_one_kernel("rms_norm"):
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._note_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _note_attention(self, q: torch.Tensor, k: torch.Tensor, *_: Any, **options: Any) -> None:
        if not isinstance(q, PretendTensor):
            return
        mask = options.get("attn_mask")
        self.device.count(
            "sdpa",
            f"q{tuple(q.shape)} k{tuple(k.shape)} "
            f"mask={None if mask is None else tuple(mask.shape)} "
            f"causal={options.get('is_causal', False)}",
        )


class _Stream:
    def __init__(self, *args: Any) -> None: ...
    def wait_stream(self, other: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Graph:
    """A CUDA graph: the operations of its capture, computed again into the same tensors."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        assert PretendCuda.current is not None
        PretendCuda.current.count("launches", "graph")
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            if any(result.alias_info is not None for result in func._schema.returns):
                continue  # a view, or written in-place
            for old, new in zip(_leaves(out), _leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class _Capture(contextlib.AbstractContextManager[None]):
    def __init__(self, graph: _Graph, *args: Any, **kwargs: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        assert PretendCuda.current is not None
        PretendCuda.current.count("captures", "capture")
        PretendCuda.current.recording = self.graph.ops

    def __exit__(self, *args: Any) -> None:
        assert PretendCuda.current is not None
        PretendCuda.current.recording = None
