"""System errors are one line with the right exit code, and lose no checkpoint."""

import errno
import os
import re
import resource
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from calls import ROOT, TINY, Run, error_line


def test_a_full_disk_is_an_error_and_keeps_the_last_checkpoint(run: Run, at_trained: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # the weights are larger
    try:
        result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert result.code == 6
    assert "error: " in result.err.splitlines()[-1]
    assert "File too large" in result.err.splitlines()[-1]
    assert run("generate", "text", "--max-new-tokens", "1").code == 0


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "many"}, "WORLD_SIZE=many.*, but WORLD_SIZE is 'many'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2.*, but RANK is ''"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "but LOCAL_RANK is ''"),
        (
            {name: "2" for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")},
            "but RANK is '2'",
        ),
    ],
)
def test_variables_that_torchrun_did_not_set_are_refused(
    variables: dict[str, str],
    says: str,
    run: Run,
    at_trained: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = run("train", "corpus.txt", "--name", "new", *TINY)
    assert result.code == 2
    assert re.search(f"{says}.*unset WORLD_SIZE", error_line(result))


def test_an_empty_world_size_means_one_process(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "")
    assert run("train", "corpus.txt", "--name", "new", *TINY, "--dry-run").code == 0
    result = run("train", "corpus.txt", "--name", "new", *TINY, "--shard")
    assert result.code == 2
    assert "Start them with torchrun" in error_line(result)


def test_a_folder_without_write_permission_is_reported(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def refuse(path: Path, *words: Any, **more: Any) -> None:
        if path.name == "new":  # root can write anywhere, so the error is injected
            raise PermissionError(13, "Permission denied", str(path))
        make(path, *words, **more)

    monkeypatch.setattr(Path, "mkdir", refuse)
    result = run("train", "corpus.txt", "--name", "new", *TINY)
    assert result.code == 6
    assert "'checkpoints/new': Permission denied" in error_line(result)


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs /proc, where no file can be created"
)
def test_a_folder_that_cannot_be_created_is_a_resource_error(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["prepare", "corpus.txt", "--out", "/proc/new"],
        ["attention-trace", "text", "--html", "/proc/new.html"],
        ["checkpoints", "export", "tiny", "--gguf", "/proc/new/a.gguf"],
    ):
        result = run(*words)
        assert result.code == 6, result.err
        assert "'/proc/new" in error_line(result)
    corpus = str(at_trained / "corpus.txt")
    monkeypatch.setenv("MINIGPT_CACHE_DIR", "/proc/cache")
    result = run("train", corpus, "--name", "new", *TINY)
    assert result.code == 6
    assert "MINIGPT_CACHE_DIR" in error_line(result)
    monkeypatch.delenv("MINIGPT_CACHE_DIR")
    monkeypatch.chdir("/proc")
    result = run("train", corpus, "--name", "new", *TINY)
    assert result.code == 6
    assert "'checkpoints/new'" in error_line(result)


def test_a_deleted_working_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    call = f"cd gone && rmdir ../gone && exec {shlex.quote(sys.executable)} -m minigpt generate Hi"
    done = subprocess.run(
        ["sh", "-c", call],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 6
    assert "error: the working directory was deleted." in done.stderr


def test_a_file_named_checkpoints_is_a_one_line_error(run: Run, workplace: Path) -> None:
    (workplace / "checkpoints").write_text("a file")
    (workplace / "corpus.txt").write_text("Once upon a time.\n" * 100)
    result = run("train", "corpus.txt", *TINY)
    assert result.code == 6
    assert "checkpoints" in error_line(result)


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock"])
def test_a_folder_in_place_of_a_run_file_is_reported(run: Run, at_trained: Path, name: str) -> None:
    path = at_trained / "checkpoints/tiny" / name
    path.unlink(missing_ok=True)
    path.mkdir()
    result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    assert result.code == 6
    assert f"checkpoints/tiny/{name}'" in error_line(result)


def cuda_error(text: str) -> RuntimeError:
    return RuntimeError(f"CUDA error: {text}")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(28, "No space left on device", "/a/\x1bb"), 6, ["'/a/\\x1bb'", "No space left"]),
        (PermissionError(13, "Permission denied", "/a"), 6, ["'/a'", "Permission denied"]),
        (OSError(5, "Input/output error"), 6, ["Input/output error", "disk"]),
        (MemoryError(), 6, ["out of memory", "--batch-size"]),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 6, ["out of memory"]),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), 6, ["out of memory."]),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA ke"), 6, ["out of memory."]),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), 6, ["out of memory."]),
        (cuda_error("CUBLAS_STATUS_ALLOC_FAILED when calling"), 6, ["out of memory."]),
        (cuda_error("CUBLAS_STATUS_NOT_INITIALIZED when calling"), 6, ["out of memory."]),
        (cuda_error("CUBLAS_STATUS_EXECUTION_FAILED when\nat"), 1, ["FAILED when. Start again"]),
        (cuda_error("no kernel image is available"), 1, ["no kernel image", "--device cpu."]),
        (cuda_error("all CUDA-capable devices are busy or unavailable"), 1, ["--device cpu."]),
        (cuda_error("CUDA driver version is insufficient"), 1, ["driver or install an older"]),
        (cuda_error("device-side assert triggered"), 1, ["CUDA_LAUNCH_BLOCKING=1"]),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), 1, ["cuDNN", "--debug"]),
        (dist.DistBackendError("NCCL error in: x.cpp:94, unhandled"), 1, ["NCCL_DEBUG=INFO"]),
        (ModuleNotFoundError("No module named 'rich'", name="rich"), 1, ["rich", "not installed"]),
    ],
)
def test_system_errors_are_one_line(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    code: int,
    said: list[str],
) -> None:
    from minigpt.commands import loading

    def fail(*words: Any) -> None:
        raise error

    monkeypatch.setattr(loading, "resolve_model", fail)
    result = run("generate", "text")
    line = error_line(result)
    assert result.code == code
    assert all(part in line for part in said), line


def test_an_unexpected_error_is_one_line_and_debug_adds_the_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt.commands import loading

    class PanicError(BaseException):
        """Like tiktoken's panics, not a subclass of Exception."""

    def fail(*words: Any) -> None:
        raise PanicError("line one\nline \x1b[31m two")

    monkeypatch.setattr(loading, "resolve_model", fail)
    plain = run("generate", "text")
    assert plain.code == 1
    expected = "error: PanicError: line one line \\x1b[31m two. This is a bug in minigpt; --debug"
    assert plain.err.startswith(expected)
    assert plain.err.count("\n") == 1
    traced = run("generate", "text", "--debug")
    assert traced.code == 1
    assert "Traceback (most recent call last)" in traced.err
    assert traced.err.splitlines()[-1] == plain.err.rstrip("\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows does not sync folders")
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_checkpoints_are_saved_on_file_systems_that_cannot_sync_folders(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    assert run("train", "corpus.txt", "--name", "mounted", *TINY).code == 0
    assert run("generate", "text", "--model", "mounted", "--max-new-tokens", "1").code == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ESTALE])
def test_a_file_system_without_locks_is_reported_with_the_remedy(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    import fcntl

    flock = fcntl.flock

    def refuse(descriptor: int, operation: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("tiny/.lock"):
            raise OSError(number, os.strerror(number))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    assert result.code == 6
    line = error_line(result)
    assert f"'checkpoints/tiny/.lock' cannot be locked: {os.strerror(number)}. Choose" in line
    assert run("generate", "text", "--model", "tiny", "--max-new-tokens", "1").code == 0
