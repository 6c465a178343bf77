"""Run folders: no kill, full disk or second run costs a checkpoint; which folder is meant."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minigpt.checkpoint.finding import resolve_model
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.errors import CheckpointError, LockedError, ResourceError


@pytest.fixture(autouse=True)
def fsync_that_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here


def write_step(run: RunFolder, step: int, text: str = "weights", **facts: Any) -> None:
    with run.writing_step(step) as folder:
        (folder / "config.json").write_text("{}")
        (folder / "training_state").mkdir()
        (folder / "training_state" / "momentum").write_text(text)
    run.point("latest", step, **facts)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "tales")
    with run.lock():
        write_step(run, 1, val_loss=2.0)
        write_step(run, 2, val_loss=1.5)
    return run


class Boundaries:
    """Interferes with the n-th thing that a block does to the files under a folder."""

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
def boundaries() -> Boundaries:
    return Boundaries()


def assert_holds(run: RunFolder, *steps: int) -> None:
    """The latest checkpoint is one of steps, whole to the last byte; nothing else lies about."""
    latest = run.latest()
    assert latest is not None
    assert latest.step in steps
    verify(latest.folder, hashes=True)
    assert not [path.name for path in run.path.glob(".*") if path.name != ".lock"]


def test_disk_that_fills_at_any_moment_costs_no_checkpoint(
    run: RunFolder, boundaries: Boundaries
) -> None:
    for n in range(100):
        failure = ""
        try:
            with boundaries.failing_from(n, run.path, errno.ENOSPC):
                write_step(run, 3)
        except ResourceError as error:
            failure = str(error)
        assert_holds(run, 2, 3)
        if not failure:
            break
        assert "No space left" in failure
        assert "Free some space" in failure
    assert 5 < n < 100
    assert_holds(run, 3)


def test_fsync_that_fails_at_any_moment_costs_no_checkpoint(
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
            assert_holds(run, 2)
        else:
            break
    assert 5 < n < 100
    assert_holds(run, 2)


KILLED = """
import os, signal, sys
from pathlib import Path
from minigpt.checkpoint.folder import RunFolder

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
            run.prune(0)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked children")
def test_kill_at_any_moment_costs_no_checkpoint(tmp_path: Path) -> None:
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
            assert_holds(run, 2, 3)
            latest = run.latest()
            assert latest is not None
            assert latest.step >= newest  # a later death never has less
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


def test_second_writer_is_refused_until_the_first_is_dead(run: RunFolder) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, run.path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(LockedError, match=r"another run is writing .*tales"), run.lock():
            pass
        holder.send_signal(signal.SIGKILL)
    with run.lock():
        assert_holds(run, 2)


def test_lock_is_not_shared_within_a_process(run: RunFolder) -> None:
    with run.lock(), pytest.raises(LockedError), RunFolder(run.path).lock():
        pass


def test_exception_leaves_no_trace_of_the_step(run: RunFolder) -> None:
    def write_and_interrupt() -> None:
        with run.writing_step(3) as folder:
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_and_interrupt()
    assert run.steps() == [1, 2]
    assert_holds(run, 2)


def test_step_is_not_seen_before_it_is_whole(run: RunFolder) -> None:
    with run.writing_step(3) as folder:
        (folder / "config.json").write_text("{}")
        assert run.steps() == [1, 2]
        assert resolve_model(str(run.path)) == run.step_folder(2)
    assert run.steps() == [1, 2, 3]


def test_permission_is_a_resource_error(
    run: RunFolder, boundaries: Boundaries
) -> None:  # root may write anywhere, so the refusal is injected
    with (
        pytest.raises(ResourceError, match=r"Permission denied\. Check the owner"),
        boundaries.failing_from(0, run.path, errno.EACCES),
    ):
        write_step(run, 3)


@pytest.mark.parametrize("name", ["x" * 300, "file/run"])
def test_impossible_run_name_is_an_error_of_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="Choose another name"):
        RunFolder(tmp_path / name).lock().__enter__()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is missing": lambda folder: (folder / "training_state" / "momentum").unlink(),
    "has 3 bytes, 7 when": lambda folder: (folder / "training_state" / "momentum").write_text(
        "abc"
    ),
    "manifest.json is missing": lambda folder: (folder / "manifest.json").unlink(),
    "lists no files": lambda folder: (folder / "manifest.json").write_text("{}"),
    "is not JSON": lambda folder: (folder / "manifest.json").write_text('{"files"'),
    "is damaged at '../../x'": lambda folder: (folder / "manifest.json").write_text(
        '{"files": {"../../x": {"bytes": 0}}}'
    ),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_step_is_passed_over(run: RunFolder, says: str) -> None:
    run.point("best", 2)
    DAMAGES[says](run.step_folder(2))
    with pytest.raises(CheckpointError, match=says):
        verify(run.step_folder(2))
    for pointer in (run.latest(), run.best()):
        assert pointer is not None
        assert pointer.step == 1
    assert resolve_model(str(run.path)) == run.step_folder(1)
    DAMAGES[says](run.step_folder(1))
    assert run.latest() is None
    with pytest.raises(CheckpointError, match=says):
        resolve_model(str(run.path))


def test_changed_byte_is_found_by_hash_only(run: RunFolder) -> None:
    (run.step_folder(2) / "training_state" / "momentum").write_text("Weights")
    verify(run.step_folder(2))
    with pytest.raises(CheckpointError, match="SHA-256 differs"):
        verify(run.step_folder(2), hashes=True)


def test_pointer_gives_the_facts_of_its_own_step_only(run: RunFolder) -> None:
    run.point("best", 1, val_loss=1.25)
    best, latest = run.best(), run.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, best.facts) == (1, {"val_loss": 1.25})
    assert (latest.step, latest.facts) == (2, {"val_loss": 1.5})
    with run.writing_step(3) as folder:  # and killed before point()
        (folder / "config.json").write_text("{}")
    latest = run.latest()
    assert latest is not None
    assert (latest.step, latest.facts) == (3, {})


@pytest.mark.parametrize("text", ["", "[1]", '{"step": "1"}', '{"step": 99}', "\0\xff"])
def test_damaged_pointer_falls_back_to_the_latest_step(run: RunFolder, text: str) -> None:
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
    assert run.prunable(keep) == sorted({1, 2, 3, 4, 5, 6} - {*left})
    run.prune(keep)
    assert run.steps() == left
    assert_holds(run, 6)


def test_model_is_found_by_path_step_and_name(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run.path.parent
    run.point("best", 1)
    plain = tmp_path / "gpt2"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert resolve_model(str(run.path), root) == run.step_folder(1)
    assert resolve_model("tales", root) == run.step_folder(1)
    assert resolve_model(str(run.step_folder(2)), root) == run.step_folder(2)
    assert resolve_model(str(plain), root) == plain
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tales").mkdir()  # texts, say; no model, so it hides no run
    assert resolve_model("tales", root) == run.step_folder(1)
    assert resolve_model("gpt2", root) == Path("gpt2")


def test_without_a_name_the_newest_run_is_meant_then_what_ships(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere.*`minigpt train`"):
        resolve_model(None, tmp_path / "nowhere")
    shipped = tmp_path / "a-shipped"
    shipped.mkdir()
    (shipped / "config.json").write_text("{}")
    (tmp_path / "z-empty-run").mkdir()
    assert resolve_model(None, tmp_path) == shipped
    for age, name in enumerate(["newest", "older"]):
        run = RunFolder(tmp_path / name)
        with run.lock():
            write_step(run, 5)
        os.utime(run.step_folder(5) / "manifest.json", ns=(0, 10**18 - age * 10**9))
    assert resolve_model(None, tmp_path) == tmp_path / "newest" / "step-000005"


def test_wrong_name_is_told_the_nearest_run(run: RunFolder, tmp_path: Path) -> None:
    root = run.path.parent
    (root / "empty").mkdir()
    (root / "\x1b[31mtails").mkdir()
    (root / "\x1b[31mtails" / "config.json").write_text("{}")
    for spec, says in {
        "tails": "there is no model 'tails' in .*Did you mean tales",
        str(tmp_path / "tals"): "there is no model .*Did you mean tales",
        "empty": "holds no checkpoint.*Choose from tales",
        "\x1b[31m" + "x" * 5000: r"there is no model '\\x1b\[31mxx",
        "nul\0": r"there is no model 'nul\\x00'",
    }.items():
        with pytest.raises(CheckpointError, match=says) as caught:
            resolve_model(spec, root)
        assert caught.value.exit_code == 4
        assert len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match=r"there is no model 'x' .*`minigpt train`"):
        resolve_model("x", tmp_path / "nowhere")


def test_half_written_step_is_refused(run: RunFolder) -> None:
    half = run.path / ".writing-step-000003"
    half.mkdir()
    (half / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="half written"):
        resolve_model(str(half))
    with run.lock():
        assert_holds(run, 2)


def test_manifest_lists_every_file_of_the_step(run: RunFolder) -> None:
    manifest = json.loads((run.step_folder(2) / "manifest.json").read_text())
    assert manifest["files"]["training_state/momentum"] == {
        "bytes": 7,
        # sha256sum of "weights"
        "sha256": "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c",
    }
    assert set(manifest["files"]) == {"config.json", "training_state/momentum"}
