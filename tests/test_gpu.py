"""Generation, traces, graphs, int8, bfloat16, training and resuming on a real CUDA device."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from laid_out import in_int8
from pretend_cuda_models import SHAPES, make
from test_pretend_cuda import SAMPLING

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.intervention_config import InterventionConfig
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.tracing.api import trace
from minigpt.tracing.interventions import intervene

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import gpu
import gpu_setup

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPT = [5, 6, 7]


def model_on(device: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    return make(name, dtype).to(device).eval().requires_grad_(False)


def tokens_of(model: Any, options: dict[str, Any], **decoder: Any) -> list[int]:
    config = SamplingConfig(max_new_tokens=20, **options)
    steps = Decoder(model, PROMPT, max_new_tokens=20, **decoder).generate(config, seed=3)
    return [step.token for step in steps]


@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("name", SHAPES)
def test_generated_tokens_equal_those_of_the_cpu(name: str, options: str) -> None:
    expected = tokens_of(model_on("cpu", name), SAMPLING[options])
    assert tokens_of(model_on("cuda", name), SAMPLING[options]) == expected


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("way", ["float32", "int8"])
def test_tokens_of_the_compiled_graph_equal_those_of_the_cpu(name: str, way: str) -> None:
    models = [model_on(device, name) for device in ("cpu", "cuda")]
    if way == "int8":
        models = [in_int8(model) for model in models]
    expected = tokens_of(models[0], {"temperature": 0.0})
    assert tokens_of(models[1], {"temperature": 0.0}) == expected
    assert tokens_of(models[1], {"temperature": 0.0}, compile=True) == expected


def test_bfloat16_logits_are_close_to_float32() -> None:
    expected = Decoder(model_on("cpu", "llama"), PROMPT).prompt_logits
    found = Decoder(model_on("cuda", "llama", torch.bfloat16), PROMPT).prompt_logits.cpu()
    # an 8-bit mantissa, through two layers
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"measure": "norm"},
        {"measure": "logit"},
        {"measure": "gradient"},
        {"measure": "integrated"},
        {"reduce": "rollout"},
        {"lens": True},
        {"n_verified": "all"},
        {"n_verified": 2, "knockout": "value"},
    ],
)
@pytest.mark.parametrize("compiles", [False, True])
def test_traced_rows_equal_those_of_the_cpu(options: dict[str, Any], compiles: bool) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model = wide_model(device)
        way = {"compile": compiles and device == "cuda"}
        common = {"temperature": 0.0, "max_new_tokens": 6, "seed": 0}
        one = trace(model, "Once", tokenizer=BytesTokenizer(), **way, **common, **options)
        found.append(one)
    assert [s.token.id for s in found[0].steps] == [s.token.id for s in found[1].steps]
    for here, there in zip(found[0].steps, found[1].steps, strict=True):
        rows = [torch.from_numpy(step.row.weights_S.copy()) for step in (here, there)]
        torch.testing.assert_close(*rows, rtol=1e-3, atol=1e-4)  # float32 sums in another order


def wide_model(device: str) -> Any:
    """Return a model with a byte vocabulary."""
    return gpu_setup.model_of(gpu_setup.LLAMA, torch.device(device))


def test_ablated_and_patched_models_generate_the_tokens_of_the_cpu() -> None:
    for config in (
        InterventionConfig(ablate="1.1"),
        InterventionConfig(ablate="1.1", ablate_mean=True),
        InterventionConfig(patch="1.1", patch_from=""),
    ):
        tokens = []
        for device in ("cpu", "cuda"):
            changed, _ = intervene(wide_model(device), config, PROMPT, lambda _: [8, 9, 10])
            tokens.append(tokens_of(changed, {"temperature": 0.0}))
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part != "machine"])
def test_each_part_of_the_benchmark_passes(part: str, tmp_path: Path) -> None:
    """Resume, dropout, waiting, out of memory, FSDP, two GPUs, graph breaks, and other parts."""
    words = ["--quick", "--out", str(tmp_path), "--parts", part]
    assert gpu.main(words) == 0
