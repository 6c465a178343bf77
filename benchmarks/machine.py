"""Describe the machine of a measurement."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Instruction sets that determine the speed of products in a dtype.
_ABILITIES = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "bf16")


def machine_facts(device: str, packages: list[str]) -> dict[str, Any]:
    """Return the CPU or GPU, its instruction sets, the load, and the versions of packages."""
    abilities = torch.cpu.get_capabilities()
    facts: dict[str, Any] = {
        "processor": abilities.get("cpu_name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [name for name in _ABILITIES if abilities.get(name)],
        "load": round(os.getloadavg()[0], 2),
        "python": sys.version.split()[0],
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    return facts


def child_environment(threads: int) -> dict[str, str]:
    """Return the environment of a child process with this many threads and minigpt on its path."""
    paths = [str(Path(__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(threads),
        # The same for all contenders.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "100000"),
    }
