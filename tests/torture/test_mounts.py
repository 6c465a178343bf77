"""Runs on mounted file systems that are full or read-only lose nothing.

These tests need root. test_faults.py does not, and covers more system calls.
"""

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from interrupted_runs import train, weights
from small_runs import differing

from minigpt.checkpoint.folder import RunFolder
from minigpt.errors import MinigptError, ResourceError
from minigpt.files import write_atomically
from minigpt.text.tokens import PreparedData

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Return a function that mounts an empty file system of a given size, or a folder read-only."""
    mounted: list[Path] = []

    def begin(*, kilobytes: int = 0, read_only: Path | None = None) -> Path:
        place = read_only or tmp_path / f"disk-{len(mounted)}"
        place.mkdir(exist_ok=True)
        words = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs"]
        if read_only:
            words = ["--bind", "-o", "ro", str(place)]
        done = subprocess.run(["mount", *words, place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs root to mount: {done.stderr.strip()}")
        mounted.append(place)
        return place

    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("needs root to mount")
    yield begin
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", place], check=True)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)


def size_of(folder: Path) -> int:
    """Return the kilobytes of a folder on a tmpfs, which has pages of 4 kB."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in paths)


def fill_up(disk: Path, begun: Path, straight: Path, data: PreparedData) -> str:
    """Resume a run on a disk that may be too small, check its files, and return the error."""
    run = disk / "run"
    shutil.copytree(begun, run)
    before, message = weights(run), ""
    try:
        train(run, data)
    except ResourceError as error:
        message = str(error)
        assert os.strerror(errno.ENOSPC) in message
        assert str(run) in message, "the message must name the file"
    latest = RunFolder(run).latest()
    assert latest is not None, "the last checkpoint was lost"
    if latest.step == 2:
        assert differing(weights(run), before) == []
    left = [path for path in run.rglob("*") if path.name.startswith(".writing-")]
    assert left == [], "unfinished files must be deleted"
    enlarge(disk)
    train(run, data)
    assert differing(weights(run), weights(straight)) == []
    return message


def levels(begun: Path, straight: Path, n: int) -> list[int]:
    """Return disk sizes from the size of the initial run to the maximum that the run needs."""
    least, most = size_of(begun) + 8, size_of(begun) + 2 * size_of(straight)
    return [least + (most - least) * i // (n - 1) for i in range(n)]


@pytest.mark.integration
def test_a_full_file_system_loses_nothing_and_resumes_with_the_same_bits(
    mount: Mount, begun: Path, straight: Path, data: PreparedData
) -> None:
    messages = [
        fill_up(mount(kilobytes=size), begun, straight, data) for size in levels(begun, straight, 4)
    ]
    assert messages[0]
    assert not messages[-1], "the largest disk must have enough space"


@pytest.mark.torture
def test_a_disk_with_any_amount_of_free_space_loses_nothing(
    mount: Mount, begun: Path, straight: Path, data: PreparedData
) -> None:
    failed = [
        bool(fill_up(mount(kilobytes=size), begun, straight, data))
        for size in levels(begun, straight, 40)
    ]
    assert 2 < sum(failed) < len(failed)


def test_a_file_that_does_not_fit_keeps_the_old_one(mount: Mount) -> None:
    disk = mount(kilobytes=64)
    write_atomically(disk / "a", b"old")
    with pytest.raises(ResourceError, match="No space left on device") as caught:
        write_atomically(disk / "a", bytes(100_000))
    assert repr(str(disk / "a")) in str(caught.value)
    assert (disk / "a").read_bytes() == b"old"
    assert os.listdir(disk) == ["a"]


def test_a_run_on_a_read_only_mount_can_be_read_but_not_resumed(
    mount: Mount, begun: Path, data: PreparedData, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(begun, run)
    before = weights(run)
    mount(read_only=run)
    with pytest.raises(MinigptError, match="Read-only file system") as caught:
        train(run, data)
    assert caught.value.exit_code == 6
    assert str(run) in str(caught.value)
    assert "mount it for writing" in str(caught.value).lower()
    assert differing(weights(run), before) == []
