"""Tensors that are computed on the CPU but report a device of ``pretend_cuda.py``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

_devices: list[Any] = []


def current() -> Any:
    """Return the active ``PretendCuda``."""
    assert _devices, "pretend tensor used outside its device context"
    return _devices[-1]


@contextlib.contextmanager
def pretending(device: Any) -> Iterator[None]:
    """Make a device the active one."""
    _devices.append(device)
    try:
        yield
    finally:
        _devices.pop()


def here() -> torch.device:
    """Return the torch device of the active ``PretendCuda``."""
    return current().where  # type: ignore[no-any-return]


def is_here(device: Any) -> bool:
    """Return whether a device is the pretend one; False for None."""
    return device is not None and torch.device(device).type == here().type


class PretendTensor(torch.Tensor):
    """A tensor that reports the pretend device and stores its data in a CPU tensor."""

    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "PretendTensor":
        # For C++ the tensor is on the CPU, so that autograd works; __torch_function__ reports the
        # pretend device to Python.
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
            # C++ copies a list to an index tensor on the tensor's device, which waits.
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            where = tuple(torch.tensor(i).to(here()) if isinstance(i, list) else i for i in where)
            args = (args[0], where, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current().dispatch(func, args, kwargs or {})


def _move(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Implement Tensor.to for a pretend tensor; C++ would not see a change of device."""
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


def move_from_host(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Implement Tensor.to for a tensor on the host."""
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
    return ToDevice.apply(args[0], dtype, is_async)  # type: ignore[no-any-return,no-untyped-call]


class _ToHost(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: PretendTensor, dtype: torch.dtype) -> torch.Tensor:  # type: ignore[override]
        current().count("syncs", "copy to the host")
        return tensor.elem.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient.to(here()), None


class ToDevice(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, tensor: torch.Tensor, dtype: torch.dtype, is_async: bool
    ) -> torch.Tensor:
        device = current()
        kind = "async_copies" if is_async else "copies"
        device.count(kind, f"copy to the device {tuple(tensor.shape)}")
        device.require_dtype(dtype)
        return PretendTensor(tensor.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient.cpu(), None, None


# Operations nest their arguments only in lists, tuples and dicts; these loops are several times
# faster than torch's pytree functions.
def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    elif isinstance(value, dict):
        yield from leaves([*value.values()])
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)([mapped(change, part) for part in value])
    if isinstance(value, dict):
        return {key: mapped(change, part) for key, part in value.items()}
    return change(value)


def on_host(value: Any) -> Any:
    return value.elem if isinstance(value, PretendTensor) else value


def on_device(value: Any) -> Any:
    return PretendTensor(value) if type(value) in (torch.Tensor, torch.nn.Parameter) else value
