"""Compiled code in the cache is executed only if it is complete and owned by the user."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt.errors import ResourceError
from minigpt.generation.fast.packages import cached_package, find_package
from minigpt.places import CACHE_VARIABLE


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    return tmp_path / "compiled"


def writer(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def never(path: Path) -> None:
    raise AssertionError("compiled again")


def test_a_cached_package_is_not_compiled_again() -> None:
    path = cached_package("a key", writer(b"code"))
    assert path.read_bytes() == b"code"
    assert cached_package("a key", never) == path
    assert cached_package("another", writer(b"other")).read_bytes() == b"other"
    assert cached_package("a key", never) == path


@pytest.mark.parametrize("damage", [b"", b"cod", b"Code"])
def test_a_damaged_package_is_replaced(folder: Path, damage: bytes) -> None:
    path = cached_package("a key", writer(b"code"))
    path.write_bytes(damage)
    assert cached_package("a key", writer(b"code, again")).read_bytes() == b"code, again"
    assert len(list(folder.iterdir())) == 1


def refused(path: Path, **_: object) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def test_a_damaged_package_that_cannot_be_deleted_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cached_package("a key", writer(b"code")).write_bytes(b"damaged")
    monkeypatch.setattr(Path, "unlink", refused)
    assert find_package("a key") is None


def test_a_folder_that_cannot_be_written_is_refused_before_compiling(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(0o700)
    monkeypatch.setattr(Path, "touch", refused)
    with pytest.raises(ResourceError, match=f"or set {CACHE_VARIABLE} to a folder"):
        cached_package("a key", never)


def test_a_symlink_is_not_followed(folder: Path, tmp_path: Path) -> None:
    path = cached_package("a key", writer(b"code"))
    foreign = tmp_path / "foreign"
    path.rename(foreign)
    path.symlink_to(foreign)
    with pytest.raises(AssertionError, match="compiled again"):
        cached_package("a key", never)
    assert foreign.read_bytes() == b"code"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits for others")
def test_packages_writable_by_others_are_not_executed(folder: Path) -> None:
    path = cached_package("a key", writer(b"code"))
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o622)
    with pytest.raises(AssertionError, match="compiled again"):
        cached_package("a key", never)
    folder.chmod(0o777)
    with pytest.raises(ResourceError, match=r"others may write to .* MINIGPT_CACHE_DIR"):
        cached_package("a key", never)


@pytest.mark.skipif(
    os.name == "nt" or os.getuid() != 0, reason="only root can change the owner of a file"
)
def test_packages_of_another_user_are_not_executed(folder: Path) -> None:
    os.chown(cached_package("a key", writer(b"code")), 12345, 12345)
    with pytest.raises(AssertionError, match="compiled again"):
        cached_package("a key", never)
    os.chown(folder, 12345, 12345)
    with pytest.raises(ResourceError, match="others may write to"):
        cached_package("a key", never)


def test_an_interrupted_compilation_leaves_nothing(folder: Path) -> None:
    with pytest.raises(AssertionError, match="compiled again"):
        cached_package("a key", never)
    assert not list(folder.iterdir())
