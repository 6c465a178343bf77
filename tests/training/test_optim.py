"""The optimizers equal torch's own, step by step."""

from typing import Any

import pytest
import torch
from small_models import LAYOUTS, random_tokens, small_config, small_model
from torch import Tensor, nn

from minigpt.config import TrainingConfig
from minigpt.training.muon import Muon, orthogonalize
from minigpt.training.optim import is_muon_parameter, make_optimizers

SHAPES = [(32, 32), (96, 32), (32, 96), (7, 13), (13, 7), (32, 32), (1, 5)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    for i, parameter in enumerate(parameters):
        generator = torch.Generator().manual_seed(1000 * step + i)
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.5, "weight_decay": 0.0},
        {"momentum": 0.95, "weight_decay": 0.3, "ns_steps": 3},
        {"momentum": 0.0, "weight_decay": 0.1},
    ],
)
def test_muon_equals_the_optimizer_of_torch_step_by_step(options: dict[str, Any]) -> None:
    theirs, ours = matrices(), matrices()
    options = {"lr": 0.05, "adjust_lr_fn": "match_rms_adamw", **options}
    reference = torch.optim.Muon(theirs, **options)
    muon = Muon(ours, product_dtype=torch.bfloat16, **options)
    for step in range(8):
        for parameters, optimizer in ((theirs, reference), (ours, muon)):
            set_gradients(parameters, step)
            optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
            optimizer.step()
        for their, our in zip(theirs, ours, strict=True):
            # Entries of an update are about 0.2 lr = 0.01. bfloat16 sums in another order change
            # them by about 1%; the momentum is float32.
            torch.testing.assert_close(our, their, rtol=0, atol=5e-4)
            torch.testing.assert_close(
                muon.state[our]["momentum_buffer"],
                reference.state[their]["momentum_buffer"],
                rtol=1e-6,
                atol=1e-6,
            )


def test_the_update_of_a_matrix_does_not_depend_on_others_of_its_shape() -> None:
    together, alone = matrices(), matrices()
    options = {"lr": 0.05, "product_dtype": torch.float32, "adjust_lr_fn": "match_rms_adamw"}
    muon = Muon(together, **options)
    singles = [Muon([parameter], **options) for parameter in alone]
    for step in range(3):
        set_gradients(together, step)
        set_gradients(alone, step)
        for optimizer in (muon, *singles):
            optimizer.step()
    for one, other in zip(together, alone, strict=True):
        # Batched and single products may sum in another order.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_parameter_without_a_gradient_is_unchanged() -> None:
    parameters = matrices()
    before = [parameter.detach().clone() for parameter in parameters]
    muon = Muon(parameters, lr=0.1, weight_decay=0.5, product_dtype=torch.float32)
    set_gradients(parameters, 0)
    parameters[0].grad = None
    muon.step()
    assert torch.equal(parameters[0], before[0])
    assert not torch.equal(parameters[5], before[5])  # of the same shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 96, 32), (2, 32, 96), (1, 64, 5)])
def test_orthogonalize_brings_every_singular_value_near_one(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = orthogonalize(x, steps=5, coefficients=COEFFICIENTS, dtype=dtype)
    assert result.dtype == dtype
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    # A step scales singular values by at most 3.4445, so those below 1/300 of the norm do not reach
    # one in five steps, and a square random matrix has some.
    is_large = s / s.norm(dim=-1, keepdim=True) > 0.01
    assert is_large.float().mean() > 0.9
    left = u.mT @ result.double() @ vh.mT  # diagonal, because singular vectors do not change
    new = left.diagonal(dim1=-2, dim2=-1)
    assert ((new > 0.6) & (new < 1.3))[is_large].all()
    off_diagonal = left - torch.diag_embed(new)
    assert off_diagonal.abs().max() < (1e-4 if dtype == torch.float32 else 0.06)


def test_orthogonalize_ignores_scale_and_accepts_zero() -> None:
    x = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(1))

    def result(x: Tensor) -> Tensor:
        return orthogonalize(x, steps=5, coefficients=COEFFICIENTS, dtype=torch.float32)

    torch.testing.assert_close(result(x * 1e-3), result(x * 1e3), rtol=1e-4, atol=1e-5)
    assert (result(torch.zeros(1, 6, 9)) == 0).all()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_parameter_is_in_exactly_one_optimizer(layout: str, optimizer: str) -> None:
    model = small_model(layout)
    config = TrainingConfig(
        max_steps=1, optimizer=optimizer, lr=0.02, embedding_lr=0.005, weight_decay=0.1
    )
    optimizers = make_optimizers(model, config, torch.float32)
    assert [type(o).__name__ for o in optimizers] == (["Muon"] if optimizer == "muon" else []) + [
        "AdamW"
    ]
    held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for o in optimizers:
        for group in o.param_groups:
            matrices = {names[id(p)] for p in group["params"] if p.ndim == 2}
            is_of_blocks = {name.startswith("blocks.") for name in matrices}
            assert len(is_of_blocks) <= 1  # an optimizer has only block matrices or none
            of_blocks = is_of_blocks == {True}
            assert group["lr"] == group["peak_lr"] == (0.02 if of_blocks else 0.005)
            assert group["weight_decay"] == (0.1 if of_blocks else 0.0)


def test_muon_updates_only_the_matrices_of_the_blocks() -> None:
    served = {n for n, p in small_model("gpt2").named_parameters() if is_muon_parameter(n, p)}
    parts = ["attention.query", "attention.key", "attention.value", "attention.output"]
    parts += ["mlp.up", "mlp.down"]
    assert served == {f"blocks.{i}.{part}.weight" for i in range(2) for part in parts}


def test_optimizer_options_of_the_config_are_applied() -> None:
    config = TrainingConfig(
        max_steps=1, momentum=0.8, newton_schulz_steps=3, beta1=0.7, beta2=0.9, weight_decay=0.2
    )
    muon, adamw = make_optimizers(small_model(), config, torch.float32)
    assert muon.param_groups[0]["momentum"] == 0.8
    assert muon.param_groups[0]["ns_steps"] == 3
    assert muon.param_groups[0]["weight_decay"] == 0.2
    assert adamw.param_groups[0]["betas"] == (0.7, 0.9)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_step_lowers_the_loss_of_its_own_batch(optimizer: str) -> None:
    model = small_model("qwen3")
    tokens = random_tokens(4, 24, vocab_size=small_config().vocab_size)
    config = TrainingConfig(max_steps=1, optimizer=optimizer, lr=1e-3, embedding_lr=1e-3)
    optimizers = make_optimizers(model, config, torch.float32)

    def loss() -> Tensor:
        logits = model(tokens[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    before = loss()
    before.backward()
    for o in optimizers:
        o.step()
    assert loss() < before
