"""Waits, copies and kernel launches of a training step on a pretend GPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import CUDA, PretendCuda
from pretend_cuda_models import BASE, SHAPES, make

from minigpt.checkpoint.folder import RunFolder
from minigpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from minigpt.evaluation import evaluate
from minigpt.model.cost import peak_flops
from minigpt.model.device import autocast, resolve_dtype
from minigpt.text.tokens import prepare
from minigpt.training.optim import make_optimizers
from minigpt.training.reports.memory import machine_bytes
from minigpt.training.trainer import Trainer


@pytest.mark.integration
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


STEP_LAUNCHES = {"gpt2": 270, "llama": 480, "additive": 510, "lstm": 110}
"""Maximum kernel launches of a training step of two layers: forward, backward and update."""


@pytest.mark.integration
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


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12)]
)
def test_peak_flops_are_found_by_the_full_device_name(name: str, peak: float) -> None:
    with PretendCuda(name=name):
        assert peak_flops(CUDA, torch.bfloat16) == peak


def test_memory_used_by_other_processes_is_not_available() -> None:
    with PretendCuda(free_memory=3 * 2**30):
        assert machine_bytes(CUDA) == 3 * 2**30


@pytest.mark.integration
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
def test_a_training_step_or_evaluated_batch_needs_one_asynchronous_copy(
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
        # Whether to skip a step must be known before the next one.
        assert sum(seen.syncs.values()) == 3 * (changes == {"on_nan": "skip"})
        assert not seen.copies
        assert sum(seen.async_copies.values()) == 3
        seen.clear()
        tokens = torch.zeros(4, 32, dtype=torch.int64)
        evaluate(trainer.model, [(tokens, tokens)] * 3, np.ones(257, int))
        assert not seen.copies
        assert sum(seen.async_copies.values()) == 3
        assert sum(seen.syncs.values()) == 1
