"""How long OpenMP threads spin while they wait, which must be set before torch is imported.

A spinning thread answers at once, but takes the core from other work; a sleeping one takes up to
0.1 ms and more to wake. docs/decoding.md and docs/training.md have the measurements.
"""

import os
from collections.abc import Sequence
from pathlib import Path

_SHORT, _LONG = 10_000, 100_000  # polls of a flag: about 0.1 and 1 ms
_LOAD = Path("/proc/loadavg")


def set_spin_count(words: Sequence[str]) -> None:
    """Set GOMP_SPINCOUNT for a command line, unless the environment has it.

    Training runs for hours, and the machine may become busy: it spins briefly. Decoding is over
    soon, and its products follow each other within the time that a thread takes to fall asleep: it
    spins long if nothing else is running.
    """
    is_decoding = words[:1] in (["generate"], ["attention-trace"])
    count = _LONG if is_decoding and _is_alone() else _SHORT
    os.environ.setdefault("GOMP_SPINCOUNT", str(count))


def _is_alone() -> bool:
    """Tell whether no other process is running."""
    try:
        running = _LOAD.read_text().split()[3].split("/")[0]
    except (OSError, IndexError):
        return False
    return running == "1"
