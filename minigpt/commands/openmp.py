"""Make OpenMP threads spin while they wait, but sleep while other processes need their cores.

Threads wait for each other about fifty times per token. A spinning thread resumes immediately, but
takes CPU time from other processes, and thus from the thread that it waits for; a sleeping one
needs 0.1 ms or more to wake up. libgomp reads the spin time only once, when torch is imported. But
if a process has more threads than cores, they sleep almost immediately (libgomp manual,
GOMP_SPINCOUNT). So while the machine is busy, this process starts additional, idle threads.
"""

import atexit
import math
import os
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

STAT = Path("/proc/stat")
_INTERVAL_S = 0.25
_N_SPARE = 16  # threads left for other processes
_BUSY, _FREE = 0.4, 0.2  # cores taken by others, above and below which threads sleep and spin


def share_cores(n_threads: int) -> None:
    """Start watching whether other processes need the cores of this process's OpenMP threads.

    Does nothing if the environment sets how long threads spin, or without /proc/stat (Linux).
    Results stay bit-identical, because the number of computing threads does not change.
    """
    is_decided = "GOMP_SPINCOUNT" in os.environ or "OMP_WAIT_POLICY" in os.environ
    if is_decided or not STAT.exists():
        return
    monitor = core_monitor()
    monitor.n_threads = n_threads
    if n_threads > 1 and monitor.ident is None:
        with suppress(RuntimeError):  # no more threads can be started
            monitor.start()
            atexit.register(monitor.end)


@cache
def core_monitor() -> "CoreMonitor":
    """Return the monitor of this process."""
    return CoreMonitor()


class CoreMonitor(threading.Thread):
    """Checks several times a second whether the threads should sleep or spin."""

    n_threads = 1
    idle: "IdleThreads | None" = None

    def __init__(self) -> None:
        super().__init__(name="minigpt-cores", daemon=True)
        self._is_over = threading.Event()

    def run(self) -> None:
        try:
            before = CoreUse()
            while not self._is_over.wait(_INTERVAL_S):
                now = CoreUse()
                self.adapt(now.cores_of_others(before) + self.n_threads - now.n_cores)
                before = now
        except (OSError, RuntimeError):
            return  # no more files can be opened, or threads started
        except (ValueError, IndexError):
            return  # /proc/stat has a different format, as in some containers
        finally:
            self.adapt(-math.inf)

    def end(self) -> None:
        """End the threads: Python aborts at exit if one of them is inside torch."""
        self._is_over.set()
        self.join()

    def adapt(self, n_taken: float) -> None:
        """Make the threads sleep or spin. Args: n_taken, cores that other processes take."""
        if self.idle is None and n_taken > _BUSY and self.n_threads > 1:
            self.idle = IdleThreads(self.n_threads)
        elif self.idle is not None and n_taken < _FREE:
            self.idle.end()
            self.idle = None


class CoreUse:
    """CPU seconds of this process, and of all processes on the cores that it may use."""

    def __init__(self) -> None:
        self.at_s, self.own_s = time.monotonic(), time.process_time()
        cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        self.n_cores = len(cores)
        # user, nice, system, idle, iowait, irq, softirq, steal. Low-priority (nice) processes
        # take no core from this one, unless it is one itself.
        fields = (1, 2, 3, 6, 7, 8) if os.nice(0) > 0 else (1, 3, 6, 7, 8)
        rows = [line.split() for line in STAT.read_text().splitlines()]
        ticks = sum(int(row[field]) for row in rows if row[0] in cores for field in fields)
        self.all_s = ticks / os.sysconf("SC_CLK_TCK")

    def cores_of_others(self, before: "CoreUse") -> float:
        """Return the average number of cores that other processes used since ``before``."""
        others_s = self.all_s - before.all_s - (self.own_s - before.own_s)
        return others_s / (self.at_s - before.at_s)


class IdleThreads:
    """Enough idle OpenMP threads that this process has more threads than cores."""

    def __init__(self, n_threads: int) -> None:
        """Args: n_threads, number of threads that compute in parallel, more than one.

        Raises: RuntimeError if that many threads, and a few more, cannot be started.
        """
        self._has_ended = threading.Event()
        n_missing = len(os.sched_getaffinity(0)) - n_threads + 1
        self._holders = [
            threading.Thread(target=self._hold, args=(n_threads,), daemon=True)
            for _ in range(-(-n_missing // (n_threads - 1)))
        ]
        _try_threads(len(self._holders) * n_threads + _N_SPARE)
        for holder in self._holders:
            holder.start()

    def _hold(self, n_threads: int) -> None:
        import torch

        # A thread that computes in parallel gets its own OpenMP threads, until it ends.
        torch.zeros(n_threads * 2**15, dtype=torch.uint8).add_(1)
        self._has_ended.wait()

    def end(self) -> None:
        """End the threads."""
        self._has_ended.set()
        for holder in self._holders:
            holder.join()


def _try_threads(n_threads: int) -> None:
    """Start and end threads as a test, because libgomp exits if it cannot start one.

    Raises: RuntimeError if that many cannot be started.
    """
    is_tried = threading.Event()
    tried: list[threading.Thread] = []
    try:
        for _ in range(n_threads):
            thread = threading.Thread(target=is_tried.wait, daemon=True)
            thread.start()
            tried.append(thread)
    finally:
        is_tried.set()
        for thread in tried:
            thread.join()
