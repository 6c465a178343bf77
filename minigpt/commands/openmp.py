"""How long OpenMP's threads wait for each other awake, which must be settled before torch is there.

Awake they answer at once, and take the processor from whom it waits for; asleep it takes them up to
0.1 ms and more to come back. docs/decoding.md and docs/training.md have what was measured.
"""

import os
from collections.abc import Sequence
from pathlib import Path

_SHORT, _LONG = 10_000, 100_000  # looks at a flag: about 0.1 and 1 ms
_LOAD = Path("/proc/loadavg")


def set_spin_count(words: Sequence[str]) -> None:
    """Settle it for the command that the words of the command line begin with.

    Short, as a busy machine needs it: a training goes on for hours, and quiet at its start says
    nothing of them. Decoding is over soon, and its products are as close to each other as a thread
    takes to fall asleep: long for it, if nothing else runs now. The environment's own value stands.
    """
    is_decoding = words[:1] in (["generate"], ["attention-trace"])
    count = _LONG if is_decoding and _is_alone() else _SHORT
    os.environ.setdefault("GOMP_SPINCOUNT", str(count))


def _is_alone() -> bool:
    """Tell whether this process is the only one that has something to do."""
    try:
        running = _LOAD.read_text().split()[3].split("/")[0]
    except (OSError, IndexError):
        return False
    return running == "1"
