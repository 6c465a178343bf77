"""The caller's threads, global RNG, default dtype, device and autocast: untouched and ignored."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from api_calls import TINY
from small_models import small_model

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.text.tokenizer import BytesTokenizer


def test_train_works_in_a_thread(text: Path) -> None:
    runs: list[Path] = []
    worker = threading.Thread(target=lambda: runs.append(minigpt.train(text, name="a", **TINY)))
    worker.start()
    worker.join()
    assert runs == [Path("checkpoints/a")]


def test_importing_minigpt_and_its_version_import_no_torch() -> None:
    code = "import sys, minigpt; minigpt.__version__; print('torch' in sys.modules, dir(minigpt))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("False")
    for name in minigpt.__all__:
        assert getattr(minigpt, name)


@pytest.mark.parametrize(
    "options",
    [
        {"measure": "gradient"},
        {"n_verified": "all", "verify_heads": "1.0"},
        {"ablate": "0.1"},
        {"patch_from": "the"},
    ],
    ids=str,
)
def test_a_trace_adds_no_hook_to_a_model_that_other_threads_may_use(
    options: dict[str, Any],
) -> None:
    model = small_model("gpt2", vocab_size=257)
    counts: list[int] = []

    def count(*_: object) -> None:
        hooks = [(m._forward_pre_hooks, m._forward_hooks) for m in model.modules()]
        counts.append(sum(len(kind) for pair in hooks for kind in pair))

    changes = {"patch": "1.0"} if "patch_from" in options else {}
    with model.final_norm.register_forward_hook(count):
        minigpt.trace(
            model, "abc", tokenizer=BytesTokenizer(), max_new_tokens=2, **options, **changes
        )
    assert set(counts) == {1}


@pytest.mark.integration
@pytest.mark.parametrize("options", [{}, {"quantize": "int8"}], ids=str)
def test_threads_that_share_a_model_laid_out_for_decoding_get_their_own_text(
    options: dict[str, Any],
) -> None:
    loaded = minigpt.load("storyteller", for_decoding=True, **options)
    prompts = ["The king was", "Once upon a time there was a", "A fox"]

    def text(prompt: str) -> str:
        return minigpt.trace(loaded, prompt, temperature=0, max_new_tokens=12).text

    expected = [text(prompt) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        assert list(pool.map(text, prompts)) == expected


@pytest.mark.integration
def test_train_and_evaluate_ignore_and_restore_the_callers_torch_state(text: Path) -> None:
    def losses(name: str) -> tuple[float, float]:
        run = minigpt.train(text, name=name, dropout=0.1, dropout_start=0.0, **TINY)
        found = minigpt.evaluate(run, threads=1)["nats_per_token"]
        return found, minigpt.evaluate(run, threads=1)["nats_per_token"]

    torch.manual_seed(7)
    state, n_threads = torch.get_rng_state(), torch.get_num_threads()
    expected = losses("plain")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == n_threads
    autocast = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.inference_mode(), torch.device("meta"), autocast:
        torch.set_default_dtype(torch.float64)
        try:
            assert losses("other") == expected
            assert torch.get_default_dtype() == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_threads_train_the_same_model_as_one_call(text: Path) -> None:
    def weights(name: str) -> dict[str, torch.Tensor]:
        run = minigpt.train(text, name=name, dropout=0.5, dropout_start=0.0, **TINY)
        return read_model(RunFolder(run).step_folder(4)).model.state_dict()

    with ThreadPoolExecutor(2) as pool:
        ours = list(pool.map(weights, ["a", "b"]))
    expected = weights("c")
    assert all(torch.equal(own[name], expected[name]) for own in ours for name in expected)


def test_the_callers_autocast_changes_no_trace() -> None:
    def trace() -> str:
        return str(minigpt.trace("storyteller", "The fox", max_new_tokens=2, seed=1, n_verified=1))

    expected = trace()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trace() == expected


@pytest.mark.parametrize("options", [{}, {"num_samples": 2, "ablate": "4.1"}], ids=str)
def test_a_default_device_and_autocast_change_no_text(options: dict[str, Any]) -> None:
    def text() -> list[str]:
        loaded = minigpt.load("storyteller", for_decoding=True)
        steps = minigpt.generate(loaded, "The fox", max_new_tokens=4, seed=1, **options)
        return [step.text for step in steps]

    expected = text()
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert text() == expected
        steps = minigpt.generate("storyteller", "The fox", max_new_tokens=2)
        next(steps)
        assert torch.empty(0).device.type == "meta"  # the caller's, between steps
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.integration
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_a_default_dtype_of_torch_changes_no_text_or_trace(dtype: torch.dtype) -> None:
    loaded = minigpt.load("storyteller")
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "seed": 1}
    analyses: list[dict[str, Any]] = [
        {"n_verified": 2, "roles": True, "lens": True},
        {"measure": "both", "ablate": "4.1"},
        {"measure": "gradient"},
        {"measure": "norm", "patch_from": [400, 401], "patch": "2"},
    ]

    def results() -> tuple[list[str], list[float]]:
        texts = [s.text for s in minigpt.generate(loaded, "The fox", num_samples=2, **options)]
        traces = [minigpt.trace(loaded, "The fox", **options, **more) for more in analyses]
        steps = [step for trace in traces for step in trace.steps]
        weights = [source.weight for step in steps for row in step.rows for source in row.sources]
        return texts, weights + [effect.change for step in steps for effect in step.effects]

    texts, numbers = results()
    torch.set_default_dtype(dtype)
    try:
        ours = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert ours[0] == texts
    # Queries are knocked out together while a burst lasts, so the last digits vary.
    assert ours[1] == pytest.approx(numbers, abs=1e-4)
