"""How long the OpenMP threads of a command spin while they wait."""

import os
from collections.abc import Sequence
from pathlib import Path

_SHORT, _LONG = 10_000, 100_000  # polls of a flag: about 0.1 and 1 ms
_LOAD = Path("/proc/loadavg")


def set_spin_count(words: Sequence[str]) -> None:
    """Set how long OpenMP threads spin while they wait, unless the environment sets it.

    A spinning thread resumes immediately, but takes the core from other work; a sleeping one needs
    0.1 ms or more to wake up (measured in docs/decoding.md and docs/training.md). Training runs
    for hours, and the machine may become busy: it spins briefly. Decoding is over soon, and its
    products follow each other within that time: it spins long if nothing else is running.

    It must be set before torch is imported.
    """
    is_decoding = words[:1] in (["generate"], ["attention-trace"])
    count = _LONG if is_decoding and _is_alone() else _SHORT
    os.environ.setdefault("GOMP_SPINCOUNT", str(count))


def _is_alone() -> bool:
    """Tell whether no other process is running."""
    try:
        return _LOAD.read_text().split()[3].split("/")[0] == "1"
    except (OSError, IndexError):
        return False
