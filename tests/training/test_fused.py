"""The fused training loss equals that of the model's modules, forward and backward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import random_tokens, small_model
from small_runs import bits, config_of, differing, trainer_of
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt.config import ModelConfig
from minigpt.errors import MinigptWarning
from minigpt.model import gpt
from minigpt.model.attention import Attention
from minigpt.model.gpt import GPT, Block
from minigpt.model.layers import GatedMLP, RMSNorm
from minigpt.model.scores import Score
from minigpt.text.batches import NO_TARGET
from minigpt.text.tokens import PreparedData
from minigpt.training import fused
from minigpt.training.events import StepEvent
from minigpt.training.trainer import TrainingLoss

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-tied": ("gpt2-tied", {}),
    "llama": ("llama", {"activation": "silu"}),
    "llama-relu2": ("llama", {}),
    "llama-grouped": ("llama-grouped", {"activation": "silu"}),
    "llama-biases": ("llama", {"attention_bias": "all", "mlp_bias": True}),
    "qwen2": ("llama-grouped", {"attention_bias": "qkv", "activation": "gelu"}),
    "qwen3": ("qwen3", {"activation": "silu"}),
    "one-layer": ("qwen3", {"n_layer": 1}),
    "dropout": ("qwen3", {"dropout": 0.3}),
    "yarn": ("llama", {"rope_scaling": "yarn", "rope_scaling_factor": 4.0}),
}


def loss_and_gradients(
    loss_of: Any, model: GPT, dtype: torch.dtype, *, is_sum: bool
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the loss of a batch with ignored targets, and the gradient of every parameter."""
    tokens, targets = random_tokens(3, 17), random_tokens(3, 17, seed=4)
    targets[1, 9:] = NO_TARGET
    torch.manual_seed(5)  # seed of dropout
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = loss_of(tokens, targets, is_sum=is_sum)
    (loss * 0.5).backward()  # scaled as for one of two micro-batches
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


@pytest.mark.parametrize("is_sum", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_loss_and_gradients_equal_those_of_the_modules(
    shape: str, is_sum: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "BLOCK", 1)  # blocks of 32 rows, the last one shorter
    layout, changes = SHAPES[shape]
    model = small_model(layout, **changes).train()
    plain = TrainingLoss(model)
    expected = loss_and_gradients(plain, model, torch.float32, is_sum=is_sum)
    own = fused.FusedLoss(model, torch.float32, plain)
    monkeypatch.setattr(plain, "forward", None)
    actual = loss_and_gradients(own, model, torch.float32, is_sum=is_sum)
    # float32 rounding. GPT-2's key biases have no effect, so their gradient is only rounding.
    noise = 1e-6 * torch.cat([gradient.flatten() for gradient in expected[1]]).norm()
    torch.testing.assert_close(actual[0], expected[0])
    for mine, right in zip(actual[1], expected[1], strict=True):
        assert (mine - right).norm() <= 1e-5 * right.norm() + noise


@pytest.mark.parametrize("shape", SHAPES)
def test_fused_bfloat16_gradients_are_as_accurate_as_those_of_the_modules(shape: str) -> None:
    layout, changes = SHAPES[shape]
    model = small_model(layout, **changes | {"dropout": 0.0}).train()
    plain = TrainingLoss(model)
    own = fused.FusedLoss(model, torch.bfloat16, plain)
    right = loss_and_gradients(plain, model, torch.float32, is_sum=False)
    theirs = loss_and_gradients(plain, model, torch.bfloat16, is_sum=False)
    ours = loss_and_gradients(own, model, torch.bfloat16, is_sum=False)
    joined = [
        torch.cat([x.flatten() for x in (loss, *grads)]) for loss, grads in (right, theirs, ours)
    ]
    assert joined[2].dtype == torch.float32
    assert (joined[2] - joined[0]).norm() < 1.5 * (joined[1] - joined[0]).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_finite_for_large_logits_and_nan_for_nan(dtype: torch.dtype) -> None:
    logits = torch.tensor([[500.0, -500.0, 0.0], [-3e4, 3e4, 3e4]], dtype=dtype)
    targets = torch.tensor([1, 0])
    expected = torch.nn.functional.cross_entropy(logits.float(), targets)
    torch.testing.assert_close(fused._CrossEntropy.apply(logits, targets, False), expected)
    logits[0, 0] = torch.nan
    assert fused._CrossEntropy.apply(logits, targets, False).isnan()


class LargeTensors(TorchDispatchMode):
    """Keeps every large result alive, so that each has its own address."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept += [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        return out

    def count(self) -> int:
        storages = [x.untyped_storage() for x in self.kept]
        return len({x.data_ptr() for x in storages if x.nbytes() >= self.size})


def test_cross_entropy_reuses_one_buffer_for_all_blocks() -> None:
    """One buffer per block would need as much memory as the logits."""
    logits = torch.zeros(320, 5000)
    with LargeTensors(32 * 5000 * 4) as large:
        fused._CrossEntropy.apply(logits, torch.zeros(320).long(), False)
    large.kept = [x for x in large.kept if x.untyped_storage().data_ptr() != logits.data_ptr()]
    assert large.count() == 2  # including the gradient


@pytest.mark.integration
def test_a_run_with_the_fused_loss_has_the_losses_of_the_modules(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str) -> list[float]:
        trainer = trainer_of(config_of("qwen3", max_steps=12), data, tmp_path / name)
        assert isinstance(trainer._loss_of, fused.FusedLoss) == (name == "fused")
        return [event.train_loss for event in trainer.run() if isinstance(event, StepEvent)]

    ours = losses("fused")
    monkeypatch.setattr(fused, "fused_loss", lambda *run: None)
    torch.testing.assert_close(ours, losses("modules"), rtol=1e-4, atol=1e-5)


def test_hooks_of_modules_are_called_despite_the_fused_loss(
    data: PreparedData, tmp_path: Path
) -> None:
    called = []
    trainers = [trainer_of(config_of("llama", max_steps=2), data, tmp_path / n) for n in "ab"]
    trainers[0].model.blocks[1].mlp.down.register_forward_hook(lambda *call: called.append("down"))
    trainers[0].model.register_forward_hook(lambda *call: called.append("model"))
    trainers[0].take_step()
    assert called == ["down", "model"]
    trainers[1].model.register_forward_hook(lambda *call: called.append("model"))
    trainers[1].take_step()
    assert called == ["down", "model", "model"]
    assert "forward" not in vars(trainers[1].model)


def test_other_scores_and_activation_checkpointing_disable_the_fused_loss(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("llama", max_steps=1)
    general = replace(config, model=replace(config.model, attention="general", model_type=""))
    for name, other in (("score", general), ("recompute", config_of("llama", recompute=True))):
        trainer = trainer_of(other, data, tmp_path / name)
        assert isinstance(trainer._loss_of, TrainingLoss)
        trainer.take_step()


def is_fused(layout: str, data: PreparedData, folder: Path) -> bool:
    return isinstance(trainer_of(config_of(layout), data, folder)._loss_of, fused.FusedLoss)


BLOCK, ATTENTION, NORM = Block.forward, Attention.forward, RMSNorm.forward
EDITS: dict[str, tuple[Any, str, Any]] = {
    "block": (Block, "forward", lambda self, x, *args: BLOCK(self, x * 0.5, *args)),
    "attention": (Attention, "forward", lambda self, x, *args: ATTENTION(self, x, *args) * 0.5),
    "rotary": (Attention, "rotate", lambda self, x, rotary: x),
    "queries": (Score, "fold", lambda self, q: q * 1.01),
    "mlp": (GatedMLP, "forward", lambda self, x: self.down(self.gate(x).sigmoid() * self.up(x))),
    "norm": (RMSNorm, "forward", lambda self, x: NORM(self, x) + 0.01),
    "dropout": (Block, "forward", lambda self, x, *args: BLOCK(self, F.dropout(x, 0.1), *args)),
    "embedding": (GPT, "embed", lambda self, tokens: self.embedding(tokens) * 5),
    "loss": (
        TrainingLoss,
        "forward",
        lambda self, inputs, targets, **options: F.cross_entropy(
            self.model(inputs).flatten(0, 1), targets.flatten(), label_smoothing=0.01
        ),
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_model_with_changed_code_is_not_fused(
    edit: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Needs random weights: with Llama's initial weights, the outputs of branches are zero."""
    monkeypatch.setattr(*EDITS[edit])
    with pytest.warns(MinigptWarning, match="the code of the model computes another loss"):
        assert not is_fused("llama", data, tmp_path)


class Renamed(GatedMLP):
    """An MLP with other parameter names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.w_1, self.w_2, self.w_3 = self.gate, self.up, self.down
        del self.gate, self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.w_3(self.activation(self.w_1(x)) * self.w_2(x))
        return output


def test_a_model_with_other_modules_is_not_fused(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt, "GatedMLP", Renamed)
    with pytest.warns(MinigptWarning, match="the code of the model computes another loss"):
        assert not is_fused("llama", data, tmp_path)


@pytest.mark.parametrize("layout", ["gpt2-tied", "qwen3"])
def test_frozen_weights_do_not_change(
    layout: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(self: Block, *args: Any) -> None:
        build(self, *args)
        self.mlp_norm.requires_grad_(False)
        self.attention.key.weight.requires_grad_(False)

    build = Block.__init__
    monkeypatch.setattr(Block, "__init__", frozen)
    trainer = trainer_of(config_of(layout, dropout=0.1), data, tmp_path)
    assert isinstance(trainer._loss_of, fused.FusedLoss)
    before = bits(trainer)
    for _ in range(3):  # after three steps, gradients reach all weights
        trainer.take_step()
    same = [name for name, value in trainer.model.named_parameters() if value.equal(before[name])]
    assert same == [name for name in same if "mlp_norm" in name or "attention.key.weight" in name]
    assert len(same) >= 4


@pytest.mark.parametrize("layout", ["llama", "gpt2"])
def test_checking_for_fusion_changes_no_weight_and_uses_no_random_number(
    layout: str, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    before, state = bits(trainer_of(config_of(layout), data, tmp_path / "a")), torch.get_rng_state()
    monkeypatch.setattr(fused, "fused_loss", lambda *run: None)
    torch.manual_seed(3)
    after = bits(trainer_of(config_of(layout), data, tmp_path / "b"))
    assert not differing(before, after)
    assert state.equal(torch.get_rng_state())
