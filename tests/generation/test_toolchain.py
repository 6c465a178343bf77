"""What is changed in torch's compiler: loads of int8 for AVX2, and compilations run in parallel.

Parallel compilations run the same commands and raise the same errors as sequential ones.
"""

import gc
import threading
from pathlib import Path

import pytest
from torch._inductor import cpp_builder, cpu_vec_isa
from torch._inductor.codegen.cpp import CppVecKernel

from minigpt.generation.fast.toolchain import gc_disabled, loads_in_registers, overlapped

WRAPPER, KERNEL = "g++ a.wrapper.cpp -c -o a.o", "g++ b.kernel.cpp -c -o b.o"
LINK = "g++ a.o b.o -shared -o c.so"
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the probed instruction sets; only the second one works."""
    probed: list[str] = []

    def valid() -> list[str]:
        probed.extend(cpu_vec_isa.supported_vec_isa_list)  # type: ignore[arg-type]
        return [isa for isa in cpu_vec_isa.supported_vec_isa_list if isa != "avx512"]  # type: ignore[comparison-overlap,misc]

    valid.__wrapped__ = valid  # type: ignore[attr-defined]
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", ["avx512", "avx2", "none"])
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", valid)
    return probed


def test_wrapper_and_kernels_compile_in_parallel_before_linking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    done: list[str] = []
    kernel_runs = threading.Event()

    def run(command: str, folder: str) -> None:
        if command == WRAPPER:
            assert kernel_runs.wait(PATIENCE_S)
            assert Path(folder).is_dir()
        if command == KERNEL:
            kernel_runs.set()
        done.append(command)

    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", run)
    with overlapped():
        for command in (WRAPPER, KERNEL, LINK):
            cpp_builder.run_compile_cmd(command, cwd=str(tmp_path / "removed"))
    assert sorted(done[:2]) == [WRAPPER, KERNEL]
    assert done[2:] == [LINK]
    assert cpp_builder._run_compile_cmd is run


def test_a_compilation_error_in_either_file_is_raised_before_linking(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(command: str, folder: str) -> None:
        assert command != LINK
        if command == WRAPPER:
            raise OSError("no space left")

    monkeypatch.setattr(cpp_builder, "_run_compile_cmd", run)
    with overlapped():
        cpp_builder.run_compile_cmd(WRAPPER, cwd=str(tmp_path))
        cpp_builder.run_compile_cmd(KERNEL, cwd=str(tmp_path))
        with pytest.raises(OSError, match="no space"):
            cpp_builder.run_compile_cmd(LINK, cwd=str(tmp_path))


def test_probing_stops_at_the_first_working_instruction_set(probes: list[str]) -> None:
    with overlapped():
        assert cpu_vec_isa.valid_vec_isa_list() == ["avx2"]
    assert probes == ["avx512", "avx2"]


def test_a_chosen_instruction_set_is_searched_among_all(
    probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    with overlapped():
        assert cpu_vec_isa.valid_vec_isa_list() == ["avx2", "none"]
    assert probes == ["avx512", "avx2", "none"]


def test_the_garbage_collector_runs_again_after_a_failure() -> None:
    def fail() -> None:
        assert not gc.isenabled()
        raise OSError("failed")

    assert gc.isenabled()
    with pytest.raises(OSError, match="failed"), gc_disabled():
        fail()
    assert gc.isenabled()


INT8, FLOAT = "at::vec::Vectorized<int8_t>", "at::vec::Vectorized<float>"


@pytest.mark.parametrize(
    ("isa", "line", "expected"),
    [
        (
            "avx2",
            f"{INT8}::loadu(in_ptr7 + static_cast<int64_t>(x1 + 768L*x0), static_cast<int64_t>(8))",
            f"{INT8}(_mm256_castsi128_si256(_mm_loadl_epi64(reinterpret_cast<const __m128i*>("
            "in_ptr7 + static_cast<int64_t>(x1 + 768L*x0)))))",
        ),
        ("avx2", f"{INT8}::loadu(in_ptr7, static_cast<int64_t>(3))", None),  # the last few values
        ("avx2", f"{FLOAT}::loadu(in_ptr7, static_cast<int64_t>(8))", None),
        ("avx512", f"{INT8}::loadu(in_ptr7, static_cast<int64_t>(16))", None),
        ("asimd", f"{INT8}::loadu(in_ptr7, static_cast<int64_t>(8))", None),
    ],
)
def test_only_loads_of_eight_int8_values_for_avx2_change(
    isa: str, line: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda: isa)
    monkeypatch.setattr(CppVecKernel, "_get_vec_load_line", lambda *_: line)
    with loads_in_registers():
        assert CppVecKernel._get_vec_load_line(object(), "in_ptr7", 0, None) == (expected or line)  # type: ignore[arg-type]
    assert CppVecKernel._get_vec_load_line(object(), "in_ptr7", 0, None) == line  # type: ignore[arg-type]
