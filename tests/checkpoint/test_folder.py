"""Run folders lose no checkpoint to a kill, a full disk or a second run."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_steps import assert_complete, write_step

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.resolve import resolve_model
from minigpt.checkpoint.tools.pruning import prunable, prune
from minigpt.errors import LockedError, ResourceError


class FileOperations:
    """Injects a failure at the n-th file operation under a folder."""

    def __init__(self) -> None:
        self.folder: str | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder and event in ("open", "os.mkdir", "os.rename"):
            is_read = event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR)
            if str(args[0]).startswith(self.folder) and not is_read:
                self.act()

    @contextmanager
    def failing_from(self, n: int, folder: Path, code: int) -> Iterator[None]:
        n_seen = 0

        def act() -> None:
            nonlocal n_seen
            n_seen += 1
            if n_seen > n:
                raise OSError(code, os.strerror(code))

        self.act, self.folder = act, str(folder)
        try:
            yield
        finally:
            self.folder = None


@pytest.fixture(scope="module")
def operations() -> FileOperations:
    return FileOperations()


def test_a_full_disk_at_any_write_loses_no_checkpoint(
    run: RunFolder, operations: FileOperations
) -> None:
    for n in range(100):
        failure = ""
        try:
            with operations.failing_from(n, run.path, errno.ENOSPC):
                write_step(run, 3)
        except ResourceError as error:
            failure = str(error)
        assert_complete(run, 2, 3)
        if not failure:
            break
        assert "No space left" in failure
        assert "Free some space" in failure
    assert 5 < n < 100
    assert_complete(run, 3)


def test_a_failed_fsync_at_any_point_loses_no_checkpoint(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(100):
        calls = iter(range(100))

        def fsync(descriptor: int, n: int = n, calls: Iterator[int] = calls) -> None:
            if next(calls) == n:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            write_step(run, 2, "again")  # over an older checkpoint of the same step
        except ResourceError:
            assert_complete(run, 2)
        else:
            break
    assert 5 < n < 100
    assert_complete(run, 2)


KILLED = """
import os, signal, sys
from pathlib import Path
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.tools.pruning import prune

def write(run, step):
    with run.writing_step(step) as folder:
        (folder / "training_state").mkdir()
        (folder / "training_state" / "momentum").write_text(f"of {step}" * 1000)
        (folder / "config.json").write_text("{}")
    run.point("latest", step)

count, deadline = 0, None

def boundary(*_):
    global count
    count += 1
    if count == deadline:
        os.kill(os.getpid(), signal.SIGKILL)

def hook(event, args):
    is_write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if is_write or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
        boundary()

sys.addaudithook(hook)
os.fsync = boundary  # a kill does not lose what the system holds
for n in range(1, 300):
    run = RunFolder(Path(sys.argv[1]) / str(n))
    with run.lock():
        write(run, 1), write(run, 2), run.point("best", 1)
    child = os.fork()
    if not child:
        with run.lock():
            count, deadline = 0, n
            write(run, 3)
            write(run, 3)
            prune(run, 0)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.integration
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_a_kill_at_any_moment_loses_no_checkpoint(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", KILLED, tmp_path], check=True, timeout=60)
    runs = [RunFolder(path) for path in sorted(tmp_path.iterdir(), key=lambda path: int(path.name))]
    assert 40 < len(runs) < 299
    newest = 0
    for run in runs:
        latest, best = run.latest(), run.best()
        assert latest is not None
        assert best is not None
        verify(latest.folder, hashes=True)
        verify(best.folder, hashes=True)
        assert best.step == 1
        with run.lock():
            assert_complete(run, 2, 3)
            latest = run.latest()
            assert latest is not None
            assert latest.step >= newest  # a later kill never has fewer steps
            newest = latest.step
            for step in run.steps():
                verify(run.step_folder(step), hashes=True)
    assert runs[-1].steps() == [1, 3]


HOLDER = """
import sys, time
from pathlib import Path
from minigpt.checkpoint.folder import RunFolder
with RunFolder(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_writer_is_refused_while_the_first_is_alive(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=r"another run is writing .*tales"), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
    with run.lock():
        assert_complete(run, 2)


def test_lock_is_not_shared_within_a_process(run: RunFolder) -> None:
    with run.lock(), pytest.raises(LockedError), RunFolder(run.path).lock():
        pass


def test_an_exception_removes_the_unfinished_step(run: RunFolder) -> None:
    def write_and_interrupt() -> None:
        with run.writing_step(3) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()
    assert run.steps() == [1, 2]
    assert_complete(run, 2)


def test_a_step_is_not_visible_before_it_is_complete(run: RunFolder) -> None:
    with run.writing_step(3) as folder:
        (folder / "config.json").write_text("{}")
        assert run.steps() == [1, 2]
        assert resolve_model(str(run.path)) == run.step_folder(2)
    assert run.steps() == [1, 2, 3]


def test_permission_denied_is_a_resource_error(
    run: RunFolder, operations: FileOperations
) -> None:  # root can write anywhere, so the error is injected
    with (
        pytest.raises(ResourceError, match=r"Permission denied\. Check the owner"),
        operations.failing_from(0, run.path, errno.EACCES),
    ):
        write_step(run, 3)


@pytest.mark.parametrize("name", ["x" * 300, "file/run"])
def test_an_impossible_run_name_is_a_one_line_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Choose another name"):
        RunFolder(tmp_path / name).lock().__enter__()


def test_a_pointer_contains_only_data_of_its_own_step(run: RunFolder) -> None:
    write_step(run, 1, val_loss=1.25)
    run.point("best", 2, val_loss=0.5)  # as if it were from another run
    best, latest = run.best(), run.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, best.facts) == (1, {"val_loss": 1.25})
    assert (latest.step, latest.facts) == (2, {"val_loss": 1.5})
    with run.writing_step(3) as folder:  # as if killed before point()
        (folder / "config.json").write_text("{}")
    latest = run.latest()
    assert latest is not None
    assert (latest.step, latest.facts) == (3, {})


@pytest.mark.parametrize("text", ["", "[1]", '{"step": "1"}', '{"step": 99}', "\0\xff"])
def test_a_damaged_pointer_falls_back_to_the_latest_step(run: RunFolder, text: str) -> None:
    for name in ("best", "latest"):
        (run.path / f"{name}.json").write_text(text, encoding="latin-1")
    latest = run.latest()
    assert latest is not None
    assert latest.step == 2
    assert run.best() == latest


@pytest.mark.parametrize(
    ("keep", "left"),
    [(0, [2, 6]), (1, [2, 5, 6]), (5, [1, 2, 3, 4, 5, 6]), (9, [1, 2, 3, 4, 5, 6])],
)
def test_prune_keeps_best_latest_and_the_newest_others(
    run: RunFolder, keep: int, left: list[int]
) -> None:
    for step in (3, 4, 5, 6):
        write_step(run, step)
    run.point("best", 2)
    assert prunable(run, keep) == sorted({1, 2, 3, 4, 5, 6} - {*left})
    prune(run, keep)
    assert run.steps() == left
    assert_complete(run, 6)
