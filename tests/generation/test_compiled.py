"""The compiled decode graph equals GPT.forward, whatever was done with the cache before.

By default the graph's operations run one by one, because compiling them is slow.
"""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
import torch
from laid_out import in_bfloat16, in_int8
from small_models import LAYOUTS, random_tokens, small_model
from torch import Tensor

from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import compiled
from minigpt.generation.fast.compiled import CompiledForward
from minigpt.generation.fast.decode_step import Shown
from minigpt.generation.fast.graph import GraphStep
from minigpt.model.gpt import GPT
from minigpt.places import CACHE_VARIABLE
from minigpt.tracing.analysis.recorder import MeasureRecorder

# float32 sums in another order. In bfloat16, GPT.forward rounds every activation and the graph
# only some; the logits are about 10.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.3}


def uncompiled(step: GraphStep, **_: Any) -> compiled.CompiledStep:
    n_layer = step.model.config.n_layer
    return lambda tensors: list(step(*tensors[:3], tensors[3:-n_layer], tensors[-n_layer:]))


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(
    params=[
        "uncompiled",
        pytest.param("compiled", marks=pytest.mark.slow),  # half a minute per graph
    ]
)
def graph_mode(
    request: pytest.FixtureRequest, packages: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Run each test with the uncompiled operations and with the compiled graph."""
    if request.param == "uncompiled":
        monkeypatch.setattr(compiled, "load_step", uncompiled)
    elif not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("needs a C++ compiler")
    monkeypatch.setenv(CACHE_VARIABLE, str(packages))
    return request.param


def fed(model: GPT, tokens: Tensor) -> Tensor:
    """The oracle: the logits after all these tokens, without a cache."""
    with torch.no_grad():
        return model(tokens)[:, -1].float()


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_a_full_float32_forward_at_every_position(
    layout: str, dtype: torch.dtype
) -> None:
    model = small_model(layout).to(dtype)
    tokens = random_tokens(1, 24)
    forward = CompiledForward(model, capacity=24)
    plain = small_model(layout).to(dtype).float()
    for n_prompt in (1, 7):
        forward.cache.truncate(0)
        assert_close(forward.feed(tokens[:, :n_prompt]), fed(plain, tokens[:, :n_prompt]), dtype)
        for end in range(n_prompt + 1, 25):
            logits = forward.feed(tokens[:, end - 1 : end])
            assert logits.dtype == torch.float32
            assert_close(logits, fed(plain, tokens[:, :end]), dtype)
    assert forward.cache.length == 24


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("kind", ["int8", "bfloat16"])
@pytest.mark.parametrize("layout", ["gpt2", "llama-grouped"])
def test_the_graph_uses_the_quantized_weights_of_a_model(layout: str, kind: str) -> None:
    quantized = {"int8": in_int8, "bfloat16": in_bfloat16}[kind]
    model = quantized(small_model(layout))
    tokens = random_tokens(1, 12)
    forward = CompiledForward(model, capacity=24)
    forward.feed(tokens[:, :3])
    for end in range(4, 13):
        assert_close(forward.feed(tokens[:, end - 1 : end]), fed(model, tokens[:, :end]))


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("layout", ["gpt2", "llama-grouped"])
def test_cache_rows_can_be_repeated_selected_and_truncated(layout: str) -> None:
    model = small_model(layout)
    forward = CompiledForward(model, capacity=24, n_rows=3)
    tokens = random_tokens(3, 24)
    tokens[:, :5] = tokens[0, :5]
    forward.feed(tokens[:1, :4])
    assert_close(forward.feed(tokens[:1, 4:5]), fed(model, tokens[:1, :5]))
    forward.keep([0] * 3)
    rows = [0, 1, 2]
    for end, kept in ((6, None), (7, [2, 0]), (8, None), (9, [1]), (10, None)):
        logits = forward.feed(tokens[rows, end - 1 : end])
        assert_close(logits, fed(model, tokens[rows, :end]))
        if kept:
            forward.keep(kept)
            rows = [rows[i] for i in kept]
    assert rows == [0]
    forward.cache.truncate(5)
    forward.keep([0] * 3)  # three rows again, after fewer
    again = random_tokens(3, 4, seed=8)
    logits = [forward.feed(part) for part in again.split([1, 2, 1], dim=1)][-1]
    assert_close(logits, fed(model, torch.cat((tokens[:, :5], again), dim=1)))


@pytest.mark.usefixtures("graph_mode")
def test_attention_rows_of_the_graph_equal_recomputed_rows_and_change_no_token() -> None:
    model = small_model("llama-grouped")
    inside, beside = (MeasureRecorder(model, measures=("norm",)) for _ in range(2))
    forward = CompiledForward(model, capacity=24, recorder=inside)
    plain = CompiledForward(model, capacity=24)
    tokens = random_tokens(1, 24)
    for part in tokens.split([4, *[1] * 20], dim=1):
        assert_close(forward.feed(part), plain.feed(part))
        with torch.no_grad():
            model(tokens[:, : forward.cache.length], recorder=beside)
        assert inside.weights_LHS.shape == (2, 4, forward.cache.length)
        torch.testing.assert_close(inside.weights_LHS, beside.weights_LHS, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            inside.measured("norm").rows, beside.measured("norm").rows, rtol=1e-4, atol=1e-5
        )


@pytest.mark.usefixtures("graph_mode")
def test_context_and_capacity_limits_raise() -> None:
    model = small_model()
    for capacity, message in ((24, "the model sees 24"), (16, "the cache holds 16")):
        forward = CompiledForward(model, capacity=capacity)
        forward.feed(random_tokens(1, capacity))
        with pytest.raises(ValueError, match=message):
            forward.feed(random_tokens(1, 1))
        assert forward.cache.length == capacity


def test_different_graphs_have_different_keys() -> None:
    def key(
        layout: str = "llama", n_rows: int = 1, *, shown: Shown = "residual", **changes: Any
    ) -> str:
        model = small_model(layout, **changes)
        return compiled._key(GraphStep(model, shown), is_batch=n_rows > 1)

    assert key() == key(seed=8)  # the values of the weights are not part of the key
    keys = [
        key(),
        key("qwen3"),
        key(n_rows=2),
        key(n_layer=1),
        key(norm_eps=1e-6),
        key(shown="attention"),
        key(shown="nothing"),
    ]
    assert len(set(keys)) == len(keys)


def test_a_missing_compiler_is_reported_in_one_line_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    import torch._inductor.config

    message = r"working C\+\+ compiler.*--no-compile\.$"
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with no_compiler, pytest.raises(ConfigError, match=message) as caught:
        CompiledForward(small_model(), capacity=24)
    assert "\n" not in str(caught.value)


@pytest.mark.integration
def test_a_failing_compiler_is_reported_in_one_line_with_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor.exc import CppCompileError, InductorError

    said = "x.cpp:1:1: note: here\nx.cpp:3:10: fatal error: omp.h: No such file or directory\n"

    def fail(*_: Any, **__: Any) -> None:
        raise InductorError(CppCompileError(["g++", "x.cpp"], said), None)  # type: ignore[arg-type]

    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr("torch._inductor.aoti_compile_and_package", fail)
    message = r"working C\+\+ compiler: x.cpp:3:10: fatal error: omp.h: No such.*--no-compile\.$"
    with pytest.raises(ConfigError, match=message):
        CompiledForward(small_model(), capacity=24)


@pytest.mark.parametrize("version", ["13.0", "12.8"])
def test_cuda_headers_from_pip_wheels_are_used_only_if_complete(
    version: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The wheels of torch bring only some of the headers that cuda_runtime.h includes."""
    from torch.utils import cpp_extension

    folder = tmp_path / f"nvidia/cu{version[:2]}"
    (folder / "include").mkdir(parents=True)
    (folder / "include/cuda_runtime.h").touch()
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch/__init__.py"))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CUDA_HOME", "")
    with pytest.raises(
        ConfigError, match=r"crt/host_defines\.h.* or use --no-compile\.$"
    ) as caught:
        compiled._find_cuda_headers()
    assert ("cuda-toolkit[crt,cccl]==13.0.*" in str(caught.value)) == (version == "13.0")
    for name in ("crt/host_defines.h", "nv/target"):
        (folder / "include" / name).parent.mkdir()
        (folder / "include" / name).touch()
    compiled._find_cuda_headers()
    assert str(folder) == os.environ["CUDA_HOME"] == cpp_extension.CUDA_HOME


@pytest.mark.integration  # imports the compiler and lowers the graph
def test_the_cache_writes_of_a_layer_are_fused_into_one_loop(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Count the loops in the compiler's scheduler; nothing is compiled."""
    from torch._inductor.scheduler import Scheduler

    writers: list[str] = []

    class Stopped(BaseException):
        pass

    def stop(scheduler: Any, *_: Any) -> None:
        caches = set(scheduler.mutation_real_name.values())
        for node in scheduler.nodes:
            written = {scheduler.mutation_real_name.get(b, b) for b in node.get_buffer_names()}
            writers.extend([node.get_name()] if written & caches else [])
        raise Stopped

    method = "_codegen" if hasattr(Scheduler, "_codegen") else "codegen"
    monkeypatch.setattr(Scheduler, method, stop)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    with pytest.raises(Stopped):
        CompiledForward(small_model("llama-grouped", n_layer=1), capacity=24)
    assert len(writers) == 1


@pytest.mark.integration  # imports the compiler and lowers graphs
@pytest.mark.parametrize("layout", LAYOUTS)
def test_identical_layers_share_kernels_without_size_checks_or_aliases(
    layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Count the kernels in the generated C++ code; nothing is compiled."""
    from torch._inductor.codecache import AotCodeCompiler

    class Stopped(BaseException):
        pass

    def stop(graph: Any, wrapper: str, kernels: str, *_: Any, **__: Any) -> None:
        assert "unmatched dtype" not in wrapper
        assert "assert_size_stride(" not in wrapper
        assert "Part buf" in wrapper
        assert "// alias" not in wrapper
        n_kernels.append(kernels.count('extern "C"'))
        raise Stopped

    n_kernels: list[int] = []
    monkeypatch.setattr(AotCodeCompiler, "compile", stop)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    for n_layer in (4, 8):
        with pytest.raises(Stopped):
            CompiledForward(small_model(layout, n_layer=n_layer), capacity=24)
    # More layers need no more kernels; those of the last layer may be fused differently.
    assert n_kernels[1] <= n_kernels[0] + 2


@pytest.mark.integration  # imports the compiler and lowers the graph
@pytest.mark.parametrize("layout", ["gpt2", "qwen3"])
def test_no_weights_become_numbers_in_the_code_which_other_checkpoints_use_too(
    layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The compiler would inline vectors of up to 8 numbers; nothing is compiled."""
    from torch._inductor.codecache import AotCodeCompiler

    class Stopped(BaseException):
        pass

    def stop(graph: Any, *_: Any, **__: Any) -> None:
        in_package.extend(graph.constants.values())
        raise Stopped

    in_package: list[Tensor] = []
    monkeypatch.setattr(AotCodeCompiler, "compile", stop)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    shape = {"n_layer": 1, "d_model": 8, "n_head": 2, "d_head": 4, "d_mlp": 8}
    model = small_model(layout, **shape)
    with pytest.raises(Stopped):
        CompiledForward(model, capacity=24)
    stored = {tensor.data_ptr() for tensor in in_package}
    weights = {name: w for name, w in model.named_parameters() if w.data_ptr() not in stored}
    assert weights == {}


@pytest.mark.integration  # imports the exporter
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_linear_layer_is_one_node_of_the_exported_graph(layout: str) -> None:
    model = small_model(layout, n_layer=2)
    with torch.no_grad():
        program = compiled._export(GraphStep(model), is_batch=False)
    products = torch.ops.minigpt.sum_of_products.default
    n_products = sum(node.target is products for node in program.graph.nodes)
    n_linear = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert n_products == n_linear + (model.unembedding is None)


@pytest.mark.slow  # compiles: half a minute
@pytest.mark.parametrize("graph_mode", ["compiled"], indirect=True)
def test_greedy_tokens_equal_gpt_forward_and_the_graph_is_compiled_once(
    graph_mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model("qwen3").requires_grad_(False)
    prompt = random_tokens(5).tolist()
    greedy = SamplingConfig(temperature=0, max_new_tokens=19)

    def tokens() -> list[int]:
        decoder = Decoder(model, prompt, compile=True)
        return [step.token for step in decoder.generate(greedy, seed=0)]

    context = list(prompt)
    for token in tokens():
        assert token == fed(model, torch.tensor([context])).argmax().item()
        context.append(token)
    assert len(context) == 24
    monkeypatch.delattr(compiled, "_compile")
    assert tokens() == context[5:]


@pytest.mark.slow  # compiles: half a minute
@pytest.mark.parametrize("graph_mode", ["compiled"], indirect=True)
def test_int8_is_loaded_into_registers_on_avx2(
    graph_mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cpu.get_capabilities().get("avx2"):
        pytest.skip("needs a CPU with AVX2")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")  # also on a CPU with AVX512
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    model, tokens = in_int8(small_model("llama-grouped")), random_tokens(1, 12)
    forward = CompiledForward(model, capacity=24)
    forward.feed(tokens[:, :3])
    for end in range(4, 13):
        assert_close(forward.feed(tokens[:, end - 1 : end]), fed(model, tokens[:, :end]))
    [package] = tmp_path.rglob("*.pt2")
    with ZipFile(package) as files:
        [kernels] = (files.read(name) for name in files.namelist() if name.endswith(".kernel.cpp"))
    assert b"_mm_loadl_epi64" in kernels
    assert not re.search(rb"Vectorized<int8_t>::loadu\(.*\(8\)\)", kernels)


class Loader:
    """A fake loaded package that returns the first of its weights."""

    n_made = 0

    def __init__(self, path: Path) -> None:
        Loader.n_made += 1

    def get_constant_fqns(self) -> list[str]:
        return ["model.final_norm.weight"]

    def load_constants(self, weights: dict[str, torch.Tensor], *options: bool) -> None:
        [self.weight] = weights.values()

    def run(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.weight]


def test_a_loaded_package_is_reused_with_the_weights_of_the_next_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compiled, "_loader", Loader)
    monkeypatch.setattr(compiled, "_package", lambda *step, **kind: tmp_path)
    models = [small_model(seed=seed) for seed in range(3)]

    def load(model: GPT) -> compiled.CompiledStep:
        return compiled.load_step(GraphStep(model), is_batch=False)

    first, second = load(models[0]), load(models[1])
    for run, model in zip((first, second), models, strict=False):
        assert run([])[0].equal(model.final_norm.weight), (
            "two decoders in use must not share a package"
        )
    del first
    third = load(models[2])
    assert Loader.n_made == 2
    assert third([])[0].equal(models[2].final_norm.weight)
    assert second([])[0].equal(models[1].final_norm.weight)
