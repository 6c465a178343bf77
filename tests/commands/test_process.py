"""Sharing cores with other processes, signals during imports, and printed commands."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.commands import openmp
from minigpt.commands.process import command_line

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux (libgomp and /proc)")


@linux
@pytest.mark.parametrize(("niceness", "others"), [(0, 1.5), (10, 3.5)])
def test_cores_used_by_others_exclude_idle_own_and_lower_priority_time(
    niceness: int, others: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def use(at_s: float, own_s: float, *rows: str) -> openmp.CoreUse:
        (tmp_path / "stat").write_text("\n".join(rows) + "\nintr 7\n")
        monkeypatch.setattr(openmp.time, "monotonic", lambda: at_s)
        monkeypatch.setattr(openmp.time, "process_time", lambda: own_s)
        return openmp.CoreUse()

    monkeypatch.setattr(openmp, "STAT", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 12})
    monkeypatch.setattr(os, "nice", lambda by: niceness)
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    # user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice
    before = use(10, 5, "cpu 9 9 9", "cpu0 100 0 0 0 0 0 0 0 0 0", "cpu12 0 0 0 0 0 0 0 0 0 0")
    now = use(
        11,
        6,
        "cpu 9 9 9",
        "cpu0 150 200 30 400 500 5 5 10 700 800",  # 1 s
        "cpu1 900 0 0 0 0 0 0 0 0 0",  # not a core of this process
        "cpu12 150 0 0 0 0 0 0 0 0 0",  # 1.5 s
    )
    assert now.n_cores == 2
    assert now.cores_of_others(before) == pytest.approx(others)


def test_threads_sleep_while_other_processes_use_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, ended = [], []

    class Idle:
        def __init__(self, n_threads: int) -> None:
            made.append(n_threads)

        def end(self) -> None:
            ended.append(len(made))

    monkeypatch.setattr(openmp, "IdleThreads", Idle)
    monitor = openmp.CoreMonitor()
    for n_threads, n_taken in [(1, 1.0), (2, 0.1), (2, 0.3), (2, 0.9), (2, 0.9), (2, 0.3)]:
        monitor.n_threads = n_threads
        monitor.adapt(n_taken)
    assert made == [2]
    assert not ended
    monitor.adapt(0.0)
    monitor.adapt(0.0)
    assert ended == [1]
    monitor.adapt(1.0)
    assert made == [2, 2]


@linux
def test_no_watcher_thread_is_left_when_python_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(openmp.IdleThreads, "__init__", lambda self, n_threads: None)
    monkeypatch.setattr(openmp.IdleThreads, "end", lambda self: ended.append(self))
    at_exit: list[Callable[[], None]] = []
    monkeypatch.setattr(openmp.atexit, "register", at_exit.append)
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    monitor = openmp.CoreMonitor()
    monkeypatch.setattr(openmp, "core_monitor", lambda: monitor)
    monitor.n_threads = 2
    monitor.adapt(2.0)
    idle = monitor.idle
    openmp.share_cores(2)
    assert monitor.is_alive()
    (end,) = at_exit
    end()
    assert not monitor.is_alive()
    assert ended == [idle]


COUNT_THREADS = """
import os
import time
import torch
from minigpt.commands.openmp import IdleThreads

def compute():
    torch.manual_seed(0)
    x = torch.randn(300, 300, requires_grad=True)
    x.softmax(1).matmul(x).logsumexp(0).sum().backward()
    return x.grad

def count():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
spinning = compute()
before = count()
idle = IdleThreads(2)
while count() <= len(os.sched_getaffinity(0)):
    time.sleep(0.01)
assert compute().equal(spinning)
idle.end()
while count() > before:
    time.sleep(0.01)
assert compute().equal(spinning)
"""


@pytest.mark.integration
@linux
def test_idle_threads_outnumber_the_cores_and_change_no_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT_THREADS], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


NO_MORE_THREADS = """
import os
import resource
import sys
import torch
from minigpt.commands.openmp import IdleThreads

torch.set_num_threads(2)
torch.zeros(2**16, dtype=torch.uint8).add_(1)
if os.getuid() == 0:  # whom no limit holds
    os.setuid(54321)
n_mine = 0
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        if os.stat(f"/proc/{pid}").st_uid == os.getuid():
            n_mine += len(os.listdir(f"/proc/{pid}/task"))
    except OSError:  # it has ended
        pass
limit = n_mine + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
try:
    IdleThreads(2)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.integration
@linux
@pytest.mark.parametrize("n_more", [0, 1, 2])
def test_a_process_at_its_thread_limit_works_without_idle_threads(n_more: int) -> None:
    # libgomp would abort the process if it could not start a thread.
    done = subprocess.run(
        [sys.executable, "-c", NO_MORE_THREADS, str(n_more)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "can't start new thread\n"


@linux
@pytest.mark.parametrize("text", ["cpu0 a b c d e f g h", "cpu0 1 2 3\ncpu1 1 2 3", "\n", "\xff"])
def test_the_watcher_stops_if_proc_stat_has_an_unknown_format(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stat").write_text(text, encoding="latin-1")
    monkeypatch.setattr(openmp, "STAT", tmp_path / "stat")
    monkeypatch.setattr(openmp.os, "sched_getaffinity", lambda _: {0, 1})
    monitor = openmp.CoreMonitor()
    monitor.start()
    monitor.join()  # an exception in the thread would be a warning, which fails the test


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_environment_variables_disable_the_watcher(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = openmp.CoreMonitor()
    monkeypatch.setattr(openmp, "core_monitor", lambda: monitor)
    monkeypatch.setenv(variable, "7")
    openmp.share_cores(2)
    assert monitor.ident is None


@linux
def test_the_watcher_runs_only_for_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = openmp.CoreMonitor()
    started = []
    monkeypatch.setattr(monitor, "start", lambda: started.append(monitor.n_threads))
    monkeypatch.setattr(openmp.atexit, "register", lambda end: None)
    monkeypatch.setattr(openmp, "core_monitor", lambda: monitor)
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(variable, raising=False)
    openmp.share_cores(1)
    openmp.share_cores(2)
    assert started == [2]


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_torch_is_imported_exits_at_once(name: str, tmp_path: Path) -> None:
    # Like C++ code that calls Python, this callback aborts on an exception.
    lines = [
        "import os, signal, time",
        "try:",
        f"    os.kill(os.getpid(), signal.{name})",
        "    time.sleep(1)",
        "except BaseException:",
        "    os.abort()",
    ]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    path = os.pathsep.join([str(tmp_path), *sys.path])
    result = subprocess.run(
        [sys.executable, "-m", "minigpt", "generate", "Hello"],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 128 + signal.Signals[name]
    assert result.stderr == ("interrupted\n" if name == "SIGINT" else "")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Return a script bin/minigpt that prints its arguments."""
    path = tmp_path / "a bin" / "minigpt"
    path.parent.mkdir()
    path.write_text('#!/bin/sh\nfor word; do printf "%s|" "$word"; done\n')
    path.chmod(0o755)
    return path


ODD_ARGUMENTS = ["--name", "it's; $(touch x) `y` *", "two words"]


@pytest.mark.parametrize("is_on_path", [True, False])
def test_printed_commands_call_the_same_script_with_the_same_arguments(
    script: Path, monkeypatch: pytest.MonkeyPatch, is_on_path: bool
) -> None:
    monkeypatch.chdir(script.parents[1])
    path = f"{script.parent}:{os.environ['PATH']}" if is_on_path else os.environ["PATH"]
    monkeypatch.setenv("PATH", path)
    monkeypatch.setattr(sys, "argv", [str(script)])
    line = command_line("train", *ODD_ARGUMENTS)
    assert line.split()[0] == ("minigpt" if is_on_path else "'./a")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "|".join(["train", *ODD_ARGUMENTS, ""])
    assert not Path("x").exists()


def test_printed_commands_use_the_full_path_of_a_script_not_on_path(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert shlex.split(command_line("train")) == [str(script), "train"]


def test_printed_commands_call_modules_and_files_with_this_python(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/minigpt/__main__.py", "train"])
    words = shlex.split(command_line("generate"))
    assert words[1:] == ["-m", "minigpt", "generate"]
    python = subprocess.run([words[0], "-c", "import sys; print(sys.prefix)"], capture_output=True)
    assert python.stdout.decode().strip() == sys.prefix
    monkeypatch.setattr(sys, "argv", ["cli.py", "train"])
    assert shlex.split(command_line("generate"))[1:] == ["cli.py", "generate"]
