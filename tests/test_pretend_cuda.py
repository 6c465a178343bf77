"""The CUDA paths on a machine without a GPU: no devices are mixed, and the host rarely waits."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from knocking_out import knock_out
from pretend_cuda import CUDA, PretendCuda
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import DataConfig, ModelConfig, RunConfig, SamplingConfig, TrainingConfig
from minigpt.errors import ConfigError, MinigptWarning
from minigpt.evaluation import evaluate
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import compiled
from minigpt.generation.fast.graph import GraphStep
from minigpt.generation.fast.quantize import quantize_int8, to_int8
from minigpt.intervention_config import InterventionConfig
from minigpt.model.cost import peak_flops
from minigpt.model.device import autocast, resolve_dtype
from minigpt.model.gpt import GPT
from minigpt.model.language_model import model_class
from minigpt.text.tokens import prepare
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.analysis.sink import SinkFinder
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.interventions import intervene
from minigpt.tracing.recorder import RowRecorder
from minigpt.tracing.tracer import trace
from minigpt.training.optim import make_optimizers
from minigpt.training.reports.memory import machine_bytes
from minigpt.training.trainer import Trainer

BASE: dict[str, Any] = {"n_layer": 2, "d_model": 32, "vocab_size": 97, "context_length": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"n_head": 4, "n_kv_head": 2, "qk_norm": True},
    "gpt2": {"family": "gpt2", "n_head": 4},
    "general": {"attention": "general", "n_head": 4},
    "additive": {"attention": "additive", "n_head": 4},
    "lstm": {"arch": "lstm", "n_head": 1},
    "lstm-attention": {"arch": "lstm-attention", "n_head": 1},
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model without any weight of zero, so that every weight matters."""
    config = ModelConfig(**BASE, **SHAPES[name])
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    return model_class(config).from_tensors(config, tensors)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_training_step_never_waits_for_the_device(name: str, recompute: bool) -> None:
    tokens = torch.randint(97, (2, 4, 33), generator=torch.Generator().manual_seed(0))
    losses = {}
    for device in ("cpu", "cuda"):
        with PretendCuda() as seen:
            model = make(name).to(device)
            optimizers = make_optimizers(model, TrainingConfig(max_steps=2), torch.float32)
            seen.clear()
            for step in tokens.to(device):
                logits = model(step[:, :-1], recompute=recompute)
                F.cross_entropy(logits.flatten(0, 1), step[:, 1:].flatten()).backward()
                torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            assert not seen.syncs
            with autocast(torch.device(device), torch.bfloat16):
                assert model(tokens[0].to(device)).dtype == torch.bfloat16
            result = evaluate(model, [(tokens[0, :, :-1], tokens[0, :, 1:])], np.ones(97, int))
            losses[device] = result.nats
            assert sum(seen.syncs.values()) == (device == "cuda")
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-4)


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
    """Return the first row's tokens, and the waits and copies of a token in the middle."""
    found, marks = [], []
    for row, step in decoder.batch(config, seeds=range(n_rows), end_of_text=[3]):
        if row == 0:
            found.append(step.token)
            marks.append((Counter(seen.syncs), Counter(seen.copies), Counter(seen.launches)))
    return found, *(later - before for before, later in zip(marks[-3], marks[-2], strict=True))


@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("options", SAMPLING)
@pytest.mark.parametrize("name", [*SHAPES, "int8"])
def test_token_waits_for_the_device_once(name: str, options: str, n_rows: int) -> None:
    found = {}
    config = SamplingConfig(max_new_tokens=6, **SAMPLING[options])
    for device in ("cpu", "cuda"):
        with PretendCuda() as seen:
            model = make("llama" if name == "int8" else name).to(device).eval()
            model.requires_grad_(False)
            if name == "int8":
                quantize_int8(model)
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=6, n_rows=n_rows)
            found[device], syncs, copies, _ = decode(decoder, config, seen, n_rows)
    assert found["cuda"] == found["cpu"]
    assert sum(syncs.values()) == 1, syncs
    assert not copies


LAUNCHES = {
    # For each layer, and for embedding, final norm, unembedding, sampling and reading.
    "gpt2": (19, 12),
    "llama": (36, 12),
    "int8": (36, 13),
    "general": (36, 12),
    "additive": (40, 12),
}
"""Most kernels that a greedy token may launch without a compiled graph."""


@pytest.mark.parametrize("name", LAUNCHES)
def test_token_launches_few_kernels(name: str) -> None:
    per_layer, others = LAUNCHES[name]
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        model = make("llama" if name == "int8" else name).to("cuda").eval().requires_grad_(False)
        if name == "int8":
            quantize_int8(model)
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9)
        *_, launches = decode(decoder, config, seen)
    assert sum(launches.values()) <= 2 * per_layer + others, launches


def test_int8_weight_is_not_widened_for_each_token() -> None:
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        model = make("llama").to("cuda").eval().requires_grad_(False)
        quantize_int8(model)
        decoder = Decoder(model, [5, 6, 7], max_new_tokens=9)
        *_, launches = decode(decoder, config, seen)
    products = {what: n for what, n in launches.items() if "fast/quantize.py" in what}
    assert sum(n for what, n in products.items() if what.startswith("_weight_int8pack_mm")) == 15
    # The embedding of the token, a row.
    assert sum(n for what, n in products.items() if what.startswith("_to_copy")) == 1


def test_int8_products_of_rows_that_are_not_adjacent() -> None:
    """CUDA's kernel would read others without an error."""
    x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    with PretendCuda():
        results = []
        for device in ("cpu", "cuda"):
            linear = to_int8(x[0].repeat(2, 1).to(device), None)
            results.append(linear(x.to(device)[:, -1:]).cpu())
    torch.testing.assert_close(*results)


STEP_LAUNCHES = {"gpt2": 270, "llama": 480, "additive": 510, "lstm": 110}
"""Most kernels that a training step of two layers may launch: forward, backward, update."""


@pytest.mark.parametrize("name", STEP_LAUNCHES)
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_step_launches_few_kernels(name: str, optimizer: str) -> None:
    tokens = torch.randint(97, (3, 4, 33), generator=torch.Generator().manual_seed(0))
    with PretendCuda() as seen:
        model = make(name).to("cuda")
        training = TrainingConfig(max_steps=2, optimizer=optimizer)  # type: ignore[arg-type]
        optimizers = make_optimizers(model, training, torch.float32)
        for step in tokens.to("cuda"):
            seen.clear()
            logits = model(step[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), step[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(list(model.parameters()), 1.0)
            for one in optimizers:
                one.step()
                one.zero_grad(set_to_none=True)
        assert sum(seen.launches.values()) <= STEP_LAUNCHES[name], seen.launches


def run_eagerly(step: Any, **_: Any) -> Any:
    """Stands in for the compiler: the graph step as it is."""
    n = step.model.config.n_layer
    return lambda x: list(step(*x[:3], x[3 : 3 + n], x[3 + n :]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_step_is_captured_once_per_number_of_positions(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "load_step", run_eagerly)
    config = SamplingConfig(max_new_tokens=9, temperature=0.0)
    with PretendCuda() as seen:
        alone = make(name).eval().requires_grad_(False)
        steps = Decoder(alone, [5, 6, 7], max_new_tokens=9).generate(config, seed=0)
        wanted = [step.token for step in steps]
        model = make(name).to("cuda").eval().requires_grad_(False)
        decoder = Decoder(model, [5, 6, 7], RowRecorder(model), max_new_tokens=9, compiles=True)
        tokens, syncs, copies, _ = decode(decoder, config, seen)
        assert tokens == wanted
        assert sum(syncs.values()) == 1
        assert not copies
        assert sum(seen.captures.values()) == 1


class Sums(TorchDispatchMode):
    """Notes the number of outputs of each product of the graph step, a sum over (O, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sum.dim_IntList and args[0].ndim == 3:
            self.sizes.append(len(args[0]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("n_head", [4, 8, 16])
@pytest.mark.parametrize("way", ["float32", "int8"])
def test_queries_keys_and_values_are_products_of_one_size(n_head: int, way: str) -> None:
    """On CUDA, the compiler makes one kernel of products with equally many outputs."""
    config = ModelConfig(**BASE | {"n_head": n_head, "n_kv_head": 4, "d_head": 8})
    with PretendCuda():
        logits = []
        for device in ("cpu", "cuda"):
            model = GPT(config)
            model.init_weights(torch.Generator().manual_seed(0))
            model = model.to(device).eval().requires_grad_(False)
            if way == "int8":
                quantize_int8(model)
            caches = [torch.zeros(1, 4, 32, 8, device=device) for _ in range(4)]
            tokens = torch.full((1,), 5, device=device)
            position, view = torch.zeros_like(tokens), torch.empty(16, device=device)
            with Sums() as seen:
                step = GraphStep(model, "attention")
                logits.append(step(tokens, position, view, caches[:2], caches[2:])[0].cpu())
        # 32 keys, 32 values, and as many queries as there are in each part.
        n_parts = n_head // 4 + 2
        assert seen.sizes[:n_parts] == [32] * n_parts
        assert seen.sizes[n_parts] == BASE["d_model"]
        torch.testing.assert_close(*logits)


class Letters:
    """A tokenizer whose tokens are single letters."""

    end_of_text_ids = ()

    def token_bytes(self, token: int) -> bytes:
        """Return a letter."""
        return bytes([65 + token % 26])


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
def test_a_traced_token_is_copied_to_the_device_once_at_most(
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


def test_rollout_copies_nothing_to_the_device() -> None:
    with PretendCuda() as seen:
        model = make("llama").to("cuda").eval().requires_grad_(False)
        recorder = MeasureRecorder(model, watchers=[Rollout(select_heads(2, 4), 32)])
        decoder = Decoder(model, [5, 6, 7], recorder, max_new_tokens=9)
        config = SamplingConfig(max_new_tokens=9, temperature=0.0)
        _, _, copies, _ = decode(decoder, config, seen)
        assert not copies


@pytest.mark.parametrize("name", ["llama", "gpt2", "additive", "lstm-attention"])
def test_recording_attention_adds_no_wait(name: str) -> None:
    with PretendCuda() as seen:
        model = make(name).to("cuda").eval().requires_grad_(False)
        recorder = MeasureRecorder(model, measures=("weight", "norm"), watchers=[SinkFinder(3)])
        decoder = Decoder(model, [5, 6, 7], recorder, max_new_tokens=9)
        config = SamplingConfig(max_new_tokens=9, temperature=0.0)
        _, syncs, copies, _ = decode(decoder, config, seen)
        assert recorder.rows_LHS("norm").device == CUDA
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
        model.rotary_cos = model.rotary_cos.to("cpu")  # a table that was forgotten
        with pytest.raises(RuntimeError, match="same device"):
            model(torch.ones(1, 4, dtype=torch.int64, device="cuda"))


def test_failed_default_compilation_decodes_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise ConfigError("compiling for CUDA failed: CUDA_HOME is not set.")

    monkeypatch.setattr(compiled, "load_step", fail)
    config = SamplingConfig(max_new_tokens=5, temperature=0.0)
    with PretendCuda():
        model = make("llama").to("cuda").eval().requires_grad_(False)
        with pytest.warns(MinigptWarning, match="without a compiled graph: .* CUDA_HOME"):
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=5, compiles=None)
        assert not decoder.forward.is_compiled
        assert len(list(decoder.generate(config, seed=0))) == 5
        with pytest.raises(ConfigError, match="CUDA_HOME"):
            Decoder(model, [5, 6, 7], compiles=True)


def test_rows_that_end_cost_few_cuda_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load_step", run_eagerly)
    config = SamplingConfig(max_new_tokens=12)
    tokens: dict[str, dict[int, list[int]]] = {}
    for device in ("cpu", "cuda"):
        with PretendCuda() as seen:
            model = make("llama").to(device).eval().requires_grad_(False)
            decoder = Decoder(model, [5, 6, 7], max_new_tokens=12, n_rows=8, compiles=True)
            rows: dict[int, list[int]] = {row: [] for row in range(8)}
            stopped: set[int] = set()
            for row, step in decoder.batch(config, seeds=range(8), stopped=stopped):
                rows[row].append(step.token)
                if step.index >= row + 1:  # the rows end one after the other
                    stopped.add(row)
            tokens[device] = rows
            assert sum(seen.captures.values()) <= 3  # for 8, 4 and 2 rows
    assert tokens["cuda"] == tokens["cpu"]
    assert [len(row) for row in tokens["cuda"].values()] == [2, 3, 4, 5, 6, 7, 8, 9]


def test_decode_step_needs_no_fused_attention() -> None:
    """cuDNN's kernel, which torch prefers on Hopper, plans anew for every number of keys."""
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


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12)]
)
def test_peak_is_of_the_device_with_the_whole_name(name: str, peak: float) -> None:
    with PretendCuda(name=name):
        assert peak_flops(CUDA, torch.bfloat16) == peak


def test_memory_that_other_processes_hold_is_not_available() -> None:
    with PretendCuda(free_memory=3 * 2**30):
        assert machine_bytes(CUDA) == 3 * 2**30


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "adamw"},
        {"dtype": "bfloat16"},
        {"average": 0.9},
        {"micro_batch_size": 2},
        {"on_nan": "skip"},
        {"recompute": True},
    ],
    ids=str,
)
def test_a_trained_step_and_an_evaluated_batch_are_one_copy_that_is_not_waited_for(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    shape = BASE | SHAPES["llama"] | {"vocab_size": 257, "context_length": 32}
    run: dict[str, Any] = {"max_steps": 9, "batch_size": 4, "log_every": 100, "device": "cuda"}
    training = TrainingConfig(**run | changes)
    (tmp_path / "text.txt").write_text("to be, or not to be\n" * 200)
    with PretendCuda() as seen:
        trainer = Trainer(
            RunConfig(model=ModelConfig(**shape), training=training),
            prepare(DataConfig(paths=(str(tmp_path / "text.txt"),)), cache_dir=tmp_path / "cache"),
            RunFolder(tmp_path / "run"),
            device=CUDA,
            dtype=resolve_dtype(training.dtype, CUDA),
        )
        trainer.take_step()  # is logged
        seen.clear()
        for _ in range(3):
            trainer.take_step()
        # Whether a step is skipped has to be known before the next one.
        assert sum(seen.syncs.values()) == 3 * (changes == {"on_nan": "skip"})
        assert not seen.copies
        assert sum(seen.async_copies.values()) == 3
        seen.clear()
        tokens = torch.zeros(4, 32, dtype=torch.int64)
        evaluate(trainer.model, [(tokens, tokens)] * 3, np.ones(257, int))
        assert not seen.copies
        assert sum(seen.async_copies.values()) == 3
        assert sum(seen.syncs.values()) == 1
