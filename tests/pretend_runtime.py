"""The torch.cuda functions, streams and CUDA graphs of the devices of ``pretend_cuda.py``."""

import contextlib
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from pretend_tensor import (
    PretendTensor,
    ToDevice,
    current,
    is_here,
    leaves,
    mapped,
    move_from_host,
)
from torch.overrides import TorchFunctionMode

TOTAL_MEMORY = 80 * 2**30
_NORMS = (torch.layer_norm, torch.rms_norm, F.layer_norm, F.rms_norm)


def patches(device: Any) -> Iterator[Any]:
    """Yield the patches that make torch behave as on a ``PretendCuda``."""
    cuda = torch.cuda
    properties = types.SimpleNamespace(
        name=device.name, total_memory=TOTAL_MEMORY, major=9, minor=0, multi_processor_count=132
    )
    answers: dict[str, Any] = {
        "_lazy_init": lambda *a: None,
        "is_available": lambda: device.where.type == "cuda",
        "device_count": lambda: 1,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "current_device": lambda: 0,
        "set_device": lambda d: None,
        "get_device_capability": lambda d=None: (9, 0),
        "get_device_name": lambda d=None: device.name,
        "get_device_properties": lambda d=None: properties,
        "mem_get_info": lambda d=None: (device.free_memory, TOTAL_MEMORY),
        "synchronize": lambda d=None: device.count("syncs", "synchronize"),
        "is_bf16_supported": lambda *a, **k: True,
        "manual_seed_all": lambda s: None,
        "manual_seed": lambda s: None,
        "is_current_stream_capturing": lambda: device.recording is not None,
        "Stream": _Stream,
        "current_stream": lambda d=None: _Stream(),
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": _Graph,
        "graph": _Capture,
        "max_memory_allocated": lambda d=None: 0,
        "reset_peak_memory_stats": lambda d=None: None,
        "empty_cache": lambda: None,
        "device": lambda d: contextlib.nullcontext(),
        "set_sync_debug_mode": device.set_sync_debug_mode,
        "get_rng_state": lambda d="cuda": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda s, d="cuda": None,
    }
    for key, answer in answers.items():
        yield mock.patch.object(cuda, key, answer)
    has_mps = device.where.type == "mps"
    yield mock.patch.object(torch.backends.mps, "is_available", return_value=has_mps)
    wait = answers["synchronize"]
    yield mock.patch.object(torch.mps, "synchronize", wait)
    group = torch.nn.utils.clip_grad._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        found = group(tensors, with_indices)
        is_ours = isinstance(tensors[0][0], PretendTensor)
        return {(device.where if is_ours else key[0], key[1]): v for key, v in found.items()}

    clip_grad = torch.nn.utils.clip_grad
    name = "_group_tensors_by_device_and_dtype"
    yield mock.patch.object(clip_grad, name, grouped)

    # A view of a wrapper needs a version counter, which inference tensors do not have.
    def enter(self: Any) -> None:
        self._instead = torch.no_grad()
        self._instead.__enter__()

    def leave(self: Any, *args: Any) -> None:
        self._instead.__exit__(*args)

    yield mock.patch.object(torch.inference_mode, "__enter__", enter)
    yield mock.patch.object(torch.inference_mode, "__exit__", leave)
    # The default check runs inside an operation, where C++ reports the wrong device.
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    by_shape = {"default": lambda x: {"shape": x.shape, "dtype": x.dtype}}
    yield mock.patch.dict(checks, by_shape)
    autocast = torch.autocast

    def autocast_on_cpu(kind: str, **options: Any) -> Any:
        return autocast("cpu" if kind == device.where.type else kind, **options)

    yield mock.patch.object(torch, "autocast", autocast_on_cpu)
    yield mock.patch.object(torch.Tensor, "pin_memory", _pinned)
    # Called for each LSTM; without cuDNN, torch computes the same with its own kernels.
    cudnn = torch.backends.cudnn
    yield mock.patch.object(cudnn, "is_acceptable", return_value=False)
    yield _Functions(device)


def _pinned(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
    made: Any = tensor.clone()
    made.is_pretend_pinned = True
    return made  # type: ignore[no-any-return]


class _Functions(TorchFunctionMode):
    """Handles functions in which C++ branches on the device, and records attention calls."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_grad = func is torch.autograd.grad
        if is_grad or func is torch.Tensor.backward:  # recomputed operations are counted, too
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
        ):  # as in C++: created on the host, then copied
            made = func(*args, **{**kwargs, "device": "cpu"})
            return ToDevice.apply(made, kwargs.get("dtype") or made.dtype, False)  # type: ignore[no-untyped-call]
        if func in (torch.Tensor.to, torch.Tensor.cuda) and not isinstance(args[0], PretendTensor):
            return move_from_host(func, args, kwargs)
        if (
            func in _NORMS
            and torch.is_autocast_enabled("cpu")
            and isinstance(args[0], PretendTensor)
        ):
            args, kwargs = mapped(  # CUDA's autocast uses float32 here, the CPU's does not
                lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs)
            )
        if func in (torch.rms_norm, F.rms_norm) and isinstance(args[0], PretendTensor):
            with self.device.as_one_kernel("rms_norm"):
                return func(*args, **kwargs)
        if func is torch.lstm and torch.backends.cpu.get_cpu_capability() != "AVX512":
            with torch.autocast("cpu", enabled=False):  # oneDNN has no LSTM in bfloat16 here
                return func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._record_attention(*args, **kwargs)
        return func(*args, **kwargs)

    def _record_attention(self, q: torch.Tensor, k: torch.Tensor, *_: Any, **options: Any) -> None:
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
    """A CUDA graph: replaying recomputes the captured operations into the same tensors."""

    def __init__(self) -> None:
        self.ops: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        current().count("launches", "graph")
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            if any(result.alias_info is not None for result in func._schema.returns):
                continue  # a view, or written in-place
            for old, new in zip(leaves(out), leaves(again), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


class _Capture(contextlib.AbstractContextManager[None]):
    def __init__(self, graph: _Graph, *args: Any, **kwargs: Any) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        current().count("captures", "capture")
        current().recording = self.graph.ops

    def __exit__(self, *args: Any) -> None:
        current().recording = None
