"""The CUDA paths on a pretend GPU: tensors stay on one device, and the host rarely waits."""

from collections import Counter
from typing import Any

import pytest
import torch
from knocking_out import knock_out
from laid_out import in_int8
from pretend_cuda import CUDA, PretendCuda
from pretend_cuda_models import BASE, SHAPES, make
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import ConfigError, MinigptWarning
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import compiled
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.fast.quantize import to_int8
from minigpt.intervention_config import InterventionConfig
from minigpt.model.gpt import GPT
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.interventions import intervene
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "all": {
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "ignore_eos": True,
        "logprobs": 3,
    },
}


def decode(decoder: Decoder, config: SamplingConfig, seen: PretendCuda, n_rows: int = 1) -> Any:
    """Return the first row's tokens, and the waits, copies and launches of one token."""
    found, marks = [], []
    for row, step in decoder.batch(config, seeds=range(n_rows), end_of_text=[3]):
        if row == 0:
            found.append(step.token)
            marks.append((Counter(seen.syncs), Counter(seen.copies), Counter(seen.launches)))
    return found, *(later - before for before, later in zip(marks[-3], marks[-2], strict=True))


@pytest.mark.integration
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("name", [*SHAPES, "int8"])
def test_a_decoded_token_waits_for_the_device_once(name: str, options: str, n_rows: int) -> None:
    found = {}
    config = SamplingConfig(max_new_tokens=6, **SAMPLING[options])
    for device in ("cpu", "cuda"):
        with PretendCuda() as seen:
            model = make("llama" if name == "int8" else name).to(device).eval()
            model.requires_grad_(False)
            if name == "int8":
                model = in_int8(model)
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=6, n_rows=n_rows)
            found[device], syncs, copies, _ = decode(decoder, config, seen, n_rows)
    assert found["cuda"] == found["cpu"]
    assert sum(syncs.values()) == 1, syncs
    assert not copies


LAUNCHES = {
    # Per layer, and for embedding, final norm, unembedding, sampling and the copy to the host.
    "gpt2": (19, 12),
    "llama": (36, 12),
    "int8": (36, 13),
    "general": (36, 12),
    "additive": (40, 12),
}
"""Maximum kernel launches of a greedy token without a compiled graph."""


@pytest.mark.integration
@pytest.mark.parametrize("name", LAUNCHES)
def test_a_decoded_token_launches_few_kernels(name: str) -> None:
    per_layer, others = LAUNCHES[name]
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        model = make("llama" if name == "int8" else name).to("cuda").eval().requires_grad_(False)
        if name == "int8":
            model = in_int8(model)
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9)
        *_, launches = decode(decoder, config, seen)
    assert sum(launches.values()) <= 2 * per_layer + others, launches


@pytest.mark.integration
def test_int8_weights_are_not_dequantized_for_each_token() -> None:
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        model = make("llama").to("cuda").eval().requires_grad_(False)
        model = in_int8(model)
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9)
        *_, launches = decode(decoder, config, seen)
    products = {what: n for what, n in launches.items() if "fast/quantize.py" in what}
    assert sum(n for what, n in products.items() if what.startswith("_weight_int8pack_mm")) == 15
    # The token's row of the embedding.
    assert sum(n for what, n in products.items() if what.startswith("_to_copy")) == 1


def test_int8_products_accept_noncontiguous_rows() -> None:
    """CUDA's kernel would silently read the wrong rows."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with PretendCuda():
        results = []
        for device in ("cpu", "cuda"):
            weight = x[0].repeat(2, 1).to(device)
            linear = to_int8(weight, device=weight.device, dtype=weight.dtype)
            results.append(linear(x.to(device)[:, -1:]).cpu())
    torch.testing.assert_close(*results)


def run_eagerly(step: Any, **_: Any) -> Any:
    """Replace compilation: run the graph step as it is."""
    n = step.model.config.n_layer
    return lambda x: list(step(*x[:3], x[3 : 3 + n], x[3 + n :]))


@pytest.mark.integration
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compiled_step_is_captured_once_per_cache_length_bucket(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "load_step", run_eagerly)
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        alone = make(name).eval().requires_grad_(False)
        steps = Decoder(alone, [5, 6, 7], max_new_tokens=9).generate(config, seed=0)
        wanted = [step.token for step in steps]
        model = make(name).to("cuda").eval().requires_grad_(False)
        decoder = Decoder(model, [5, 6, 7], RowRecorder(model), max_new_tokens=9, compile=True)
        tokens, syncs, copies, _ = decode(decoder, config, seen)
        assert tokens == wanted
        assert sum(syncs.values()) == 1
        assert not copies
        assert sum(seen.captures.values()) == 1


class ProductSizes(TorchDispatchMode):
    """Records the number of outputs of each product of the graph step, a sum over (O, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sum.dim_IntList and args[0].ndim == 3:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_head", [4, 8, 16])
@pytest.mark.parametrize("way", ["float32", "int8"])
def test_the_query_key_and_value_products_have_equal_sizes(n_head: int, way: str) -> None:
    """On CUDA, the compiler fuses products with equal numbers of outputs into one kernel."""
    config = ModelConfig(**BASE | {"n_head": n_head, "n_kv_head": 4, "d_head": 8})
    with PretendCuda():
        logits = []
        for device in ("cpu", "cuda"):
            model = GPT(config)
            model.init_weights(torch.Generator().manual_seed(0))
            model = model.to(device).eval().requires_grad_(False)
            if way == "int8":
                model = in_int8(model)
            caches = [torch.zeros(1, 4, 32, 8, device=device) for _ in range(4)]
            tokens = torch.full((1,), 5, device=device)
            position, view = torch.zeros_like(tokens), torch.empty(16, device=device)
            with ProductSizes() as seen:
                step = GraphStep(model, "attention")
                logits.append(step(tokens, position, view, caches[:2], caches[2:])[0].cpu())
        # 32 keys, 32 values, and the queries in parts of the same size.
        n_parts = n_head // 4 + 2
        assert seen.sizes[:n_parts] == [32] * n_parts
        assert seen.sizes[n_parts] == BASE["d_model"]
        torch.testing.assert_close(*logits)


class Letters:
    """A tokenizer whose tokens are single letters."""

    end_of_text_ids = ()

    def token_bytes(self, token: int) -> bytes:
        """Return the letter of a token."""
        return bytes([65 + token % 26])


@pytest.mark.integration
@pytest.mark.parametrize(
    ("options", "changes", "n_copies"),
    [
        ({"measure": "logit"}, {}, 0),
        ({"measure": "norm", "lens": True}, {}, 0),
        ({"measure": "gradient"}, {}, 1),
        ({"measure": "integrated", "n_steps": 3}, {}, 1),
        ({"n_verified": "all", "verify_heads": "1.1"}, {}, 1),
        ({}, {"ablate": "0.*,1.1"}, 0),
        ({"measure": "logit"}, {"ablate": "1.1,0.2", "ablate_mean": True}, 0),
        ({"measure": "logit"}, {"patch_from": "", "patch": "0,1.1", "patch_position": 2}, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "additive"])
def test_a_traced_token_needs_at_most_one_copy_to_the_device(
    name: str, options: dict[str, Any], changes: dict[str, Any], n_copies: int
) -> None:
    with PretendCuda() as seen:
        model = make(name).to("cuda").eval().requires_grad_(False)
        if changes:
            config = InterventionConfig(**changes)
            model, _ = intervene(model, config, [5, 6, 7], lambda text: [8, 9, 10])
        sampling = SamplingConfig(max_new_tokens=6, temperature=0.0)
        tokenizer: Any = Letters()
        analysis = AnalysisConfig(**options)
        events = trace(model, tokenizer, [5, 6, 7], sampling, analysis, seed=1)
        for _ in range(3):  # the header and two tokens
            next(events)
        seen.clear()
        for _ in range(3):
            next(events)
        assert sum(seen.copies.values()) == 3 * n_copies, seen.copies


@pytest.mark.integration
def test_rollout_copies_nothing_to_the_device() -> None:
    with PretendCuda() as seen:
        model = make("llama").to("cuda").eval().requires_grad_(False)
        recorder = MeasureRecorder(model, accumulators=[Rollout(select_heads(2, 4), 32)])
        decoder = Decoder(model, [5, 6, 7], recorder, max_new_tokens=9)
        config = SamplingConfig(max_new_tokens=9, temperature=0.0)
        _, _, copies, _ = decode(decoder, config, seen)
        assert not copies


@pytest.mark.integration
@pytest.mark.parametrize("name", ["llama", "gpt2", "additive", "lstm-attention"])
def test_recording_attention_adds_no_wait(name: str) -> None:
    with PretendCuda() as seen:
        model = make(name).to("cuda").eval().requires_grad_(False)
        recorder = MeasureRecorder(model, measures=("weight", "norm"), accumulators=[SinkFinder(3)])
        decoder = Decoder(model, [5, 6, 7], recorder, max_new_tokens=9)
        config = SamplingConfig(max_new_tokens=9, temperature=0.0)
        _, syncs, copies, _ = decode(decoder, config, seen)
        assert recorder.measured("norm").rows.device == CUDA
        assert sum(syncs.values()) == 1
        kinds = ["key"] if name.startswith("lstm") else ["key", "value"]
        for kind in kinds:
            knock_out(model, decoder.cache, 5, 6, [0, 1], kind)  # type: ignore[arg-type]
        assert not copies, copies


def test_pretend_device_refuses_what_cuda_refuses() -> None:
    with PretendCuda() as seen:
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([x, torch.ones(3)])
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        graph = torch.cuda.graph(torch.cuda.CUDAGraph())
        with pytest.raises(RuntimeError, match="capturing"), graph:
            x.sum().item()
        seen.clear()
        bool(x.any()), x.tolist(), x[x > 0], x.nonzero()
        assert sum(seen.syncs.values()) >= 4
        model = make("llama").to("cuda")
        model.rotary_cos = model.rotary_cos.to("cpu")  # a table that was not moved
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.ones(1, 4, dtype=torch.int64, device="cuda"))


def test_a_failed_default_compilation_falls_back_to_the_eager_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConfigError("compiling for CUDA failed: CUDA_HOME is not set.")

    monkeypatch.setattr(compiled, "load_step", fail)
    config = SamplingConfig(max_new_tokens=5, temperature=0.0)
    with PretendCuda():
        model = make("llama").to("cuda").eval().requires_grad_(False)
        with pytest.warns(MinigptWarning, match="without a compiled graph: .* CUDA_HOME"):
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=5, compile=None)
        assert not decoder.forward.is_compiled
        assert len(list(decoder.generate(config, seed=0))) == 5
        with pytest.raises(ConfigError, match="CUDA_HOME"):
            Decoder(model, [5, 6, 7], compile=True)


@pytest.mark.integration
def test_rows_that_finish_cause_few_new_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load_step", run_eagerly)
    config = SamplingConfig(max_new_tokens=12)
    tokens: dict[str, dict[int, list[int]]] = {}
    for device in ("cpu", "cuda"):
        with PretendCuda() as seen:
            model = make("llama").to(device).eval().requires_grad_(False)
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=12, n_rows=8, compile=True)
            rows: dict[int, list[int]] = {row: [] for row in range(8)}
            stopped: set[int] = set()
            for row, step in decoder.batch(config, seeds=range(8), stopped=stopped):
                rows[row].append(step.token)
                if step.index >= row + 1:  # one row finishes after the other
                    stopped.add(row)
            tokens[device] = rows
            assert sum(seen.captures.values()) <= 3  # for 8, 4 and 2 rows
    assert tokens["cuda"] == tokens["cpu"]
    assert [len(row) for row in tokens["cuda"].values()] == [2, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.integration
def test_the_decode_step_does_not_call_fused_attention() -> None:
    """cuDNN's kernel, torch's choice on Hopper, creates a new plan for every number of keys."""
    with PretendCuda() as seen:
        model = make("llama").to("cuda").eval().requires_grad_(False)
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9)
        seen.clear()
        decode(decoder, SamplingConfig(max_new_tokens=9, temperature=0.0), seen)
        assert not seen.sdpa


def test_chosen_heads_are_copied_to_the_device_once() -> None:
    selection = select_heads(2, 4, heads="0.1,1.2")
    with PretendCuda() as seen:
        rows = torch.ones(2, 4, 9, device="cuda")
        reduce_rows(rows, selection)
        seen.clear()
        reduce_rows(rows, selection)
        assert not seen.copies
