"""Failing system calls and power cuts: saved data is never lost.

``Disk`` records the calls that change a folder (open for writing, fsync, rename, mkdir, unlink),
fails one of them, or reconstructs the disk after a power cut: a disk may drop or reorder all writes
and renames that no fsync has ordered.
"""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import train, weights
from small_runs import differing

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.errors import CheckpointError, MinigptError, ResourceError
from minigpt.files import write_atomically
from minigpt.text.tokens import PreparedData
from minigpt.tracing.analysis.dense import writing_rows

CALLS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "open")


class Disk:
    """Counts the calls that change a folder, and fails one of them."""

    def __init__(self, folder: Path, *, fails_at: int | None = None, code: int = errno.EIO) -> None:
        self.folder, self.fails_at, self.code = str(folder), fails_at, code
        self.calls: list[tuple[str, str]] = []
        """Name and path of each call."""

    def record_call(self, name: str, path: object) -> None:
        """Count a call; fail if it is the chosen one."""
        try:
            place = os.readlink(f"/proc/self/fd/{path}") if type(path) is int else os.fspath(path)  # type: ignore[call-overload]
        except (TypeError, OSError):
            return
        if not str(place).startswith(self.folder):
            return
        self.calls.append((name, str(place)))
        if len(self.calls) - 1 == self.fails_at:
            raise OSError(self.code, os.strerror(self.code), str(place))

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the calls in the block."""
        with pytest.MonkeyPatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, self._recording(name, getattr(os, name)))
            opens = self._recording_open(io.open)
            patch.setattr(io, "open", opens)
            patch.setattr(builtins, "open", opens)
            yield

    def _recording(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(path: Any, *rest: Any, **more: Any) -> Any:
            if name != "open" or (rest and rest[0] & (os.O_WRONLY | os.O_RDWR)):
                self.record_call(name, path)
            return call(path, *rest, **more)

        return seen

    def _recording_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opened(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if set(mode) & set("wax+") and not isinstance(path, int):
                self.record_call("open", path)
            return call(path, mode, *rest, **more)

        return opened


def calls_of_a_resume(begun: Path, data: PreparedData, folder: Path) -> int:
    shutil.copytree(begun, folder / "counted")
    disk = Disk(folder / "counted")
    with disk.watched():
        train(folder / "counted", data)
    return len(disk.calls)


def fault(i: int, code: int, begun: Path, straight: Path, data: PreparedData, place: Path) -> None:
    """Fail the i-th call of a resumed run, and check that nothing is lost."""
    folder = place / f"run-{i}"
    shutil.copytree(begun, folder)
    before = weights(folder)
    with Disk(folder, fails_at=i, code=code).watched():
        try:
            train(folder, data)
        except (MinigptError, OSError) as error:
            message = str(error)
        else:
            message = ""
    assert not message or str(folder) in message, "the message must name the file"
    latest = RunFolder(folder).latest()
    assert latest is not None, "the last checkpoint was lost"
    if latest.step == 2:
        assert differing(weights(folder), before) == []
    train(folder, data)
    assert differing(weights(folder), weights(straight)) == []
    left = [path.name for path in folder.iterdir() if path.name.startswith((".writ", ".repl"))]
    assert left == [], "the next run must delete temporary files"
    shutil.rmtree(folder)


@pytest.mark.integration
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_failure_of_some_system_calls_loses_nothing_and_keeps_the_bits(
    code: int, begun: Path, straight: Path, data: PreparedData, tmp_path: Path
) -> None:
    n_calls = calls_of_a_resume(begun, data, tmp_path)
    assert n_calls > 40
    first = [errno.EIO, errno.ENOSPC, errno.EACCES].index(code)
    for i in range(first, n_calls, 20):
        fault(i, code, begun, straight, data, tmp_path)


@pytest.mark.torture
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
def test_a_failure_of_any_system_call_loses_nothing_and_keeps_the_bits(
    code: int, begun: Path, straight: Path, data: PreparedData, tmp_path: Path
) -> None:
    for i in range(calls_of_a_resume(begun, data, tmp_path)):
        fault(i, code, begun, straight, data, tmp_path)


def test_all_files_of_a_checkpoint_are_synced_before_its_folder_is_renamed(
    begun: Path, data: PreparedData, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(begun, folder)
    disk = Disk(folder)
    with disk.watched():
        train(folder, data)
    for step in (4, 6):
        final = folder / f"step-{step:06d}"
        aside = folder / f".writing-{final.name}"
        renamed = disk.calls.index(("rename", str(aside)))
        synced = {path for name, path in disk.calls[:renamed] if name == "fsync"}
        for path in final.rglob("*"):
            place = aside / path.relative_to(final)
            temporary = aside / f".writing-{path.name}.{os.getpid()}"  # the manifest
            assert {str(place), str(temporary)} & synced, f"{path} must be synced before the rename"
        assert str(aside) in synced, "the folder must be synced, too"
        after = disk.calls[renamed + 1 :]
        named = after.index(("fsync", str(folder)))
        pointed = [i for i, (name, path) in enumerate(after) if name == "replace"]
        assert named < min(pointed), (
            "the renamed folder must be synced before a pointer refers to it"
        )


def test_a_file_is_synced_before_it_replaces_another(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    with disk.watched():
        write_atomically(tmp_path / "a", b"new")
    names = [name for name, _ in disk.calls if name != "mkdir"]
    assert names == ["open", "fsync", "replace", "fsync"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "kept", ["no pointer", "old pointers", "torn temporary folder", "nothing new"]
)
def test_a_power_cut_leaves_the_old_checkpoint_or_the_complete_new_one(
    kept: str, begun: Path, straight: Path, data: PreparedData, tmp_path: Path
) -> None:
    """Reconstruct each state that the order of syncs allows, and resume from it."""
    folder, old = tmp_path / "run", tmp_path / "old"
    shutil.copytree(begun, folder)
    shutil.copytree(begun, old)
    train(folder, data, until=4)
    step = folder / "step-000004"
    if kept == "no pointer":
        for name in ("best.json", "latest.json"):
            (folder / name).unlink()
    if kept == "old pointers":
        for name in ("best.json", "latest.json"):
            shutil.copy(old / name, folder)
    if kept == "torn temporary folder":  # not renamed; every file is empty, truncated or zeros
        aside = step.rename(folder / f".writing-{step.name}")
        for i, path in enumerate(sorted(path for path in aside.rglob("*") if path.is_file())):
            content = path.read_bytes()
            path.write_bytes([b"", content[: len(content) // 2], bytes(len(content))][i % 3])
    if kept == "nothing new":
        shutil.rmtree(step)
    if kept in ("torn temporary folder", "nothing new"):
        for name in ("best.json", "latest.json"):
            shutil.copy(old / name, folder)
    latest = RunFolder(folder).latest()
    assert latest is not None
    assert latest.step == (4 if "pointer" in kept else 2)
    train(folder, data)
    assert differing(weights(folder), weights(straight)) == []


@pytest.mark.integration
def test_reordered_writes_of_a_disk_are_detected(
    begun: Path, data: PreparedData, tmp_path: Path
) -> None:
    """A disk that ignores fsync may leave torn files in a folder with the final name."""
    for name in ("config.json", "model.safetensors", "training_state/optimizer.safetensors"):
        folder = tmp_path / name.replace("/", "-")
        shutil.copytree(begun, folder)
        train(folder, data, until=4)
        torn = folder / "step-000004" / name
        torn.write_bytes(torn.read_bytes()[:-1])
        latest = RunFolder(folder).latest()
        assert latest is not None
        assert latest.step == 2
        with pytest.raises(CheckpointError, match="is damaged"):
            verify(torn.parents[name.count("/")])


class FullAtClose(io.FileIO):
    """A file whose last bytes do not fit, reported only at close as with NFS and quotas."""

    def close(self) -> None:
        if not self.closed and self.writable():
            super().close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.name))
        super().close()


def test_a_full_disk_at_close_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "best.json"
    write_atomically(path, b"old")
    real = io.open

    def opened(name: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        return FullAtClose(name, "w") if mode == "wb" else real(name, mode, *rest, **more)

    monkeypatch.setattr(io, "open", opened)
    with pytest.raises(ResourceError, match="No space left on device"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["best.json"]


def test_a_full_disk_while_writing_dense_rows_leaves_no_file(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "rows.safetensors"
    aside = path.with_name(f".writing-{path.name}.{os.getpid()}")
    aside.symlink_to("/dev/full")

    def write() -> None:
        with writing_rows(path, n_layer=1, n_head=1, metadata={}) as add:
            add(torch.ones(1, 1, 2**16))

    with pytest.raises(ResourceError, match=r"rows\.safetensors.*No space left"):
        write()
    assert os.listdir(tmp_path) == []


def test_a_read_only_folder_is_a_resource_error_that_names_it(
    tmp_path: Path,
) -> None:
    with (
        Disk(tmp_path, fails_at=1, code=errno.EROFS).watched(),
        pytest.raises(ResourceError, match="Read-only file system") as caught,
    ):
        write_atomically(tmp_path / "a", b"new")
    assert str(tmp_path) in str(caught.value)
