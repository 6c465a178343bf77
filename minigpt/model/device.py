"""Device and dtype selection, what the hardware can do, and settings of the whole process."""

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor

from minigpt.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device for a name: auto (the fastest available), cpu, cuda or mps.

    Raises: ConfigError if it is not available.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    available = [*(["cuda"] if cuda else []), *(["mps"] if mps else []), "cpu"]
    if name not in ("auto", *available):
        names = ", ".join(available)
        raise ConfigError(f"device {name} is not available here. Use auto or one of: {names}.")
    return torch.device(available[0] if name == "auto" else name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether the hardware multiplies bfloat16 faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        abilities = torch.cpu.get_capabilities()
        return any(abilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a name: auto (bfloat16 if it is fast), float32, tf32 or bfloat16.

    tf32 is float32 with TF32 matrix products, which are enabled or disabled for the process.

    Raises: ConfigError for tf32 without CUDA.
    """
    is_tf32 = name == "tf32"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if is_tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = is_tf32  # used by LSTMs; True by default
    elif is_tf32:
        raise ConfigError(f"dtype tf32 needs a CUDA device: this is {device.type}. Use float32.")
    if name == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def widest_float(device: torch.device | str) -> torch.dtype:
    """Return float64, or float32 on MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def inference_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a name in evaluation and generation: auto is float32 on a CPU.

    float32 gives the same loss on every CPU, and small models decode no slower than in bfloat16.
    """
    is_default = name == "auto" and device.type == "cpu"
    return resolve_dtype("float32" if is_default else name, device)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return the autocast context in which float32 weights compute in ``dtype``."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(tensors: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Move tensors of equal dtype to a device; to a GPU, in one non-blocking copy."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    joined = torch.cat([tensor.flatten() for tensor in tensors]).pin_memory()
    parts = joined.to(device, non_blocking=True).split(sizes)
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def keep_freed_memory() -> None:
    """Make malloc keep the memory that a step frees for the next one, for the whole process.

    The system zeroes the pages of returned memory when they are used again, which takes up to 15%
    of a training step. Does nothing without glibc.
    """
    _set_malloc_thresholds(2**25, 2**31 - 1)  # 32 MB is the most to which glibc itself raises it


def return_freed_memory() -> None:
    """Make malloc return large blocks to the system when they are freed, for the whole process.

    Otherwise weights that are converted one by one leave holes that are too small for the next:
    140 MB for GPT-2. Does nothing without glibc.
    """
    _set_malloc_thresholds(2**18, 2**19)


def _set_malloc_thresholds(mapped_bytes: int, kept_bytes: int) -> None:
    """Args: smallest block that is mapped alone; most free memory kept at the end of the heap."""
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-3, mapped_bytes)  # M_MMAP_THRESHOLD
        mallopt(-1, kept_bytes)  # M_TRIM_THRESHOLD


@contextmanager
def torch_modes() -> Iterator[None]:
    """Use the CPU by default, and no autocast; restore the caller's modes of this thread."""
    with ExitStack() as stack:
        # A context of torch.device makes each call of torch slower, and torch.get_default_device
        # takes 10 us.
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in filter(torch.is_autocast_enabled, ("cpu", "cuda", "mps")):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Use ``torch_modes`` and float32 by default; restore the caller's settings."""
    dtype = torch.get_default_dtype()
    with torch_modes():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
