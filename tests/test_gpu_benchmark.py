"""Rehearsals of benchmarks/gpu.py: each part runs with tiny sizes on the CPU or a pretend GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_setup import FailedError, Setup
from machine import child_environment
from pretend_cuda import PretendCuda
from test_pretend_cuda import run_eagerly

from minigpt.errors import ConfigError
from minigpt.generation.fast import compiled

QUICK = ["--quick", "--keep-going", "--minutes", "60"]
ON_PRETEND_GPU = ["machine", "parity", "resume", "dropout", "waiting", "nanogpts", "decoding"]
ON_CPU = ["warm_up", "small", "mini", "memory_limit"]
IN_GROUPS = ["ranks", "shards"]
"""Parts rehearsed in process groups on the CPU."""


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip code generation after tracing, because compiling takes a minute."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend="eager"))
    monkeypatch.setattr(compiled, "load_step", run_eagerly)


def results(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def require_ok(folder: Path, printed: str, parts: set[str]) -> None:
    found = results(folder)
    assert found.keys() == parts
    assert {name: one["status"] for name, one in found.items()} == dict.fromkeys(parts, "ok")
    for one in found.values():
        for what, value in one["facts"].items():
            assert f"| {one['part']} | {what} | {value} |" in printed


def test_every_part_has_a_rehearsal() -> None:
    assert sorted([*ON_PRETEND_GPU, *ON_CPU, *IN_GROUPS]) == sorted(gpu.PARTS)


@pytest.mark.integration
@pytest.mark.usefixtures("without_compiler")
def test_parts_are_rehearsed_on_a_pretend_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*QUICK, "--without-transformers", "--out", str(tmp_path), "--parts", *ON_PRETEND_GPU]
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        with PretendCuda():
            assert gpu.main(words) == 0
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    require_ok(tmp_path, capsys.readouterr().out, set(ON_PRETEND_GPU))


@pytest.mark.integration
@pytest.mark.usefixtures("without_compiler")
def test_the_remaining_parts_are_rehearsed_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", *QUICK, "--out", str(tmp_path), "--parts", *ON_CPU]
    assert gpu.main(words) == 0
    require_ok(tmp_path, capsys.readouterr().out, set(ON_CPU))


@pytest.mark.dist
def test_process_groups_are_rehearsed_on_the_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", *QUICK, "--out", str(tmp_path), "--parts", *IN_GROUPS]
    assert gpu.main(words) == 0
    require_ok(tmp_path, capsys.readouterr().out, set(IN_GROUPS))


@pytest.mark.integration
def test_command_stops_at_the_first_part_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: Any) -> Any:
        raise FailedError("3 graph breaks")

    monkeypatch.setitem(gpu.PARTS, "parity", fail)
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path), "--parts"]
    assert gpu.main([*words, "machine", "parity", "resume"]) == 1
    assert results(tmp_path).keys() == {"machine", "parity"}
    assert "FAILED: 3 graph breaks |" in capsys.readouterr().out


def test_no_part_starts_after_the_time_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--quick", "--minutes", "0", "--parts", "parity", "mini"]
    assert gpu.main([*words, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("not run: out of time |") == 2


REHEARSED = ["--device", "cpu", "--quick", "--without-transformers"]


@pytest.mark.integration
def test_a_failed_part_keeps_its_results_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(setup: Setup) -> Any:
        setup.facts["one"] = "a | b"
        with setup.attempt("two"):
            raise ValueError("no kernel image\nis available")
        with setup.attempt("three"):
            setup.facts["three"] = 3
        return {"four": 4}

    def leave(_: Setup) -> Any:
        raise SystemExit("the library left")

    monkeypatch.setitem(gpu.PARTS, "parity", fail)
    monkeypatch.setitem(gpu.PARTS, "resume", leave)
    words = [*REHEARSED, "--keep-going", "--out", str(tmp_path), "--parts"]
    assert gpu.main([*words, "parity", "resume", "machine"]) == 1
    found = results(tmp_path)
    assert found["parity"]["status"] == "FAILED: two: ValueError: no kernel image"
    failed = "FAILED: ValueError: no kernel image"
    assert found["parity"]["facts"] == {"one": "a | b", "two": failed, "three": 3, "four": 4}
    assert found["resume"]["status"] == "FAILED: SystemExit: the library left"
    assert found["machine"]["status"] == "ok"
    assert "| parity | one | a / b |" in capsys.readouterr().out


@pytest.mark.integration
def test_parts_out_of_time_or_interrupted_are_reported_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang(setup: Setup) -> Any:
        setup.facts["one"] = 1
        with setup.attempt("two"):
            try:
                while True:
                    time.sleep(0.01)
            except Exception as error:
                raise RuntimeError("the compiler failed") from error

    def interrupt(_: Setup) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu.PARTS, "parity", hang)
    monkeypatch.setitem(gpu.PARTS, "resume", interrupt)
    monkeypatch.setattr(gpu, "GRACE_MINUTES", -0.99)  # time runs out after parity has started
    words = [*REHEARSED, "--minutes", "1", "--out", str(tmp_path), "--parts"]
    assert gpu.main([*words, "parity", "resume", "machine"]) == 130
    assert results(tmp_path)["parity"]["facts"] == {"one": 1, "two": "not finished: out of time"}
    printed = capsys.readouterr().out
    assert "| not finished: out of time |" in printed
    assert "machine" not in printed


@pytest.mark.integration
def test_a_failed_compilation_does_not_stop_the_other_measurements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConfigError("compiling for CUDA needs the header nv/target.")

    monkeypatch.setattr(compiled, "load_step", fail)
    words = [*REHEARSED, "--keep-going", "--out", str(tmp_path), "--parts", "waiting", "decoding"]
    assert gpu.main(words) == 1
    for found in results(tmp_path).values():
        for what, value in found["facts"].items():
            assert ("header nv/target" in value) == ("minigpt" in what and "compiled" in what) or (
                what == "decoding and sampling, compiled"
            )


@pytest.mark.integration
def test_the_time_to_a_loss_is_measured_only_on_tinyshakespeare(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--device", "cpu", "--data", str(tmp_path / "none.txt"), "--out", str(tmp_path)]
    assert gpu.main([*words, "--parts", "mini"]) == 0
    assert "| skipped: needs tinyshakespeare.txt: --data FILE |" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the message without a GPU")
def test_without_a_gpu_the_benchmark_exits_with_a_one_line_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu.main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.count("\n") == 1


@pytest.mark.slow
def test_rehearsal_with_the_compiler_is_one_command(tmp_path: Path) -> None:
    script = Path(gpu.__file__)
    words = [sys.executable, str(script), "--device", "cpu", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(
        words, env=child_environment(1), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    require_ok(tmp_path, done.stdout, set(gpu.PARTS))
