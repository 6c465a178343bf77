"""Several ranks train like one: the same losses, checkpoints and stops."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_models import small_config, small_model
from small_runs import differing

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.config import TrainingConfig
from minigpt.errors import ConfigError
from minigpt.text.tokens import PreparedData
from minigpt.training.distributed import DistributedWorld
from minigpt.training.state import STATE_FOLDER
from minigpt.training.world import World

pytestmark = [
    pytest.mark.dist,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
N_STEPS = 6
# Matrices and vocabulary not divisible by the number of ranks; micro-batches; every step saved.
TRAINING = {
    "max_steps": N_STEPS,
    "batch_size": 12,
    "micro_batch_size": 3,
    "weight_decay": 0.1,
    "grad_clip": 0.5,
    "save_every": 3,
    "eval_tokens": 10**9,
    "keep": 9,
}
QWEN3 = {"layout": "qwen3", "training": TRAINING}
TIED = {"layout": "gpt2-tied", "training": TRAINING | {"optimizer": "adamw", "lr": 1e-3}}
WITH_DROPOUT = QWEN3 | {"dropout": 0.2}
SHARDED = {"shard": True}


def run_of(
    name: str,
    base: dict[str, Any],
    n_ranks: int,
    changes: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    training = base["training"] | (changes or {})
    return {"name": name, "folder": name, "n_ranks": n_ranks} | base | {"training": training} | more


def interrupted(
    name: str, base: dict[str, Any], before: int, after: int, **sharding: Any
) -> list[Any]:
    """Return a run stopped at step 2 by its last rank and resumed with other ranks."""
    stop = [before - 1, 2]
    return [
        run_of(f"{name} stopped", base, before, folder=name, stop=stop, changes=sharding),
        run_of(name, base, after, resume=True, changes=sharding),
    ]


RUNS = [
    run_of("qwen3, 1 rank", QWEN3, 1),
    run_of("qwen3, 2 ranks", QWEN3, 2),
    run_of("qwen3, 2 sharded ranks", QWEN3, 2, SHARDED),
    run_of("qwen3, 3 sharded ranks", QWEN3, 3, SHARDED),
    run_of("tied, 1 rank", TIED, 1),
    run_of("tied, 2 ranks", TIED, 2, {"recompute": True}),
    run_of("tied, 2 sharded ranks", TIED, 2, SHARDED | {"recompute": True}),
    run_of("dropout, 2 ranks", WITH_DROPOUT, 2),
    *interrupted("dropout, 2 ranks to 2", WITH_DROPOUT, 2, 2),
    run_of("dropout, 2 sharded ranks", WITH_DROPOUT, 2, SHARDED),
    *interrupted("dropout, 2 sharded ranks to 2", WITH_DROPOUT, 2, 2, **SHARDED),
    *interrupted("qwen3, 2 ranks to 1", QWEN3, 2, 1),
    *interrupted("qwen3, 2 sharded ranks to 1", QWEN3, 2, 1, **SHARDED),
    *interrupted("qwen3, 1 rank to 2", QWEN3, 1, 2),
    *interrupted("qwen3, 1 rank to 2 sharded", QWEN3, 1, 2, **SHARDED),
    run_of("skips, 2 ranks", QWEN3, 2, {"on_nan": "skip"}, nan_at=[1, 2, 5]),
    run_of("skips, 2 sharded ranks", QWEN3, 2, SHARDED | {"on_nan": "skip"}, nan_at=[1, 2, 5]),
    run_of("skips, 1 rank", QWEN3, 1, {"on_nan": "skip"}, nan_at=[0, 2, 5]),
    run_of("minutes", QWEN3, 2, {"max_steps": 0, "max_minutes": 0.1}, clock=[1.0, 2.5]),
]


class RankResults:
    """Results of all ranks of all runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def by(self, name: str, rank: int = 0) -> dict[str, Any]:
        seen: dict[str, Any] = json.loads((self.folder / f"{name}-{rank}.json").read_text())
        return seen

    def tensors(self, name: str, step: int = N_STEPS) -> dict[str, torch.Tensor]:
        folder = RunFolder(self.folder / name).step_folder(step)
        moments = load_file(folder / STATE_FOLDER / "optimizer.safetensors")
        return load_file(folder / "model.safetensors") | moments


@pytest.fixture(scope="module")
def seen(data: PreparedData, tmp_path_factory: pytest.TempPathFactory) -> RankResults:
    folder = tmp_path_factory.mktemp("ranks")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(Path(minigpt.__file__).parents[1])]
    subprocess.run(
        [sys.executable, str(here / "ranks.py"), str(data.folder), str(folder)],
        input=json.dumps(RUNS),
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
    )
    return RankResults(folder)


def assert_same_course(seen: RankResults, name: str, reference: str) -> None:
    """Compare the losses and gradient norms of all steps and the losses of all evaluations."""
    for kind in ("steps", "evaluations"):
        expected = torch.tensor(seen.by(reference)[kind], dtype=torch.float64)
        ours = torch.tensor(seen.by(name)[kind], dtype=torch.float64)
        # float32 sums in another order; the difference grows with the steps.
        torch.testing.assert_close(ours, expected[-len(ours) :], rtol=1e-3, atol=1e-6)


SEVERAL = [
    ("qwen3, 2 ranks", "qwen3, 1 rank"),
    ("qwen3, 2 sharded ranks", "qwen3, 1 rank"),
    ("qwen3, 3 sharded ranks", "qwen3, 1 rank"),
    ("tied, 2 ranks", "tied, 1 rank"),
    ("tied, 2 sharded ranks", "tied, 1 rank"),
]


@pytest.mark.parametrize(("name", "alone"), SEVERAL)
def test_losses_of_several_ranks_equal_those_of_one_rank(
    name: str, alone: str, seen: RankResults
) -> None:
    assert len(seen.by(name)["steps"]) == N_STEPS
    assert_same_course(seen, name, alone)
    losses = [loss for _, loss, _, _ in seen.by(name)["steps"]]
    assert len({round(loss, 2) for loss in losses}) == N_STEPS, (
        "all steps must have different losses"
    )


@pytest.mark.parametrize(("name", "alone"), SEVERAL)
def test_checkpoints_of_several_ranks_equal_those_of_one_rank(
    name: str, alone: str, seen: RankResults
) -> None:
    ours, expected = RunFolder(seen.folder / name), RunFolder(seen.folder / alone)
    assert ours.steps() == expected.steps() == [3, 6]
    files = [
        {path.relative_to(run.path).as_posix() for path in run.path.rglob("*") if path.is_file()}
        for run in (ours, expected)
    ]
    assert files[0] == files[1]
    one, other = seen.tensors(name, 3), seen.tensors(alone, 3)
    assert one.keys() == other.keys()
    for key in one:
        # A key bias does not change the softmax: its gradient is noise, which AdamW amplifies.
        if not key.endswith(("key.bias/exp_avg", "key.bias/exp_avg_sq", "c_attn.bias")):
            torch.testing.assert_close(one[key], other[key], rtol=1e-2, atol=1e-4, msg=key)
    assert read_model(ours.step_folder(6)).model.config.n_layer == 2


def test_every_rank_reports_the_same_losses_and_only_rank_0_saves(seen: RankResults) -> None:
    for name in ("qwen3, 2 ranks", "qwen3, 2 sharded ranks"):
        first, second = seen.by(name, 0), seen.by(name, 1)
        assert first["steps"] == second["steps"]
        assert first["evaluations"] == second["evaluations"]
        assert (first["saves"], second["saves"]) == ([3, 6], [])


def test_each_rank_stores_a_shard_of_the_optimizer_state(seen: RankResults) -> None:
    whole = seen.by("qwen3, 2 ranks")["n_held"]
    for n_ranks in (2, 3):
        name = f"qwen3, {n_ranks} sharded ranks"
        held = [seen.by(name, rank)["n_held"] for rank in range(n_ranks)]
        n_counters = 40  # AdamW's step counters, which every rank stores
        assert whole <= sum(held) <= whole + n_ranks * n_counters
        assert max(held) < 1.1 * whole / n_ranks + n_counters


@pytest.mark.parametrize("kind", ["2 ranks", "2 sharded ranks"])
def test_a_stopped_and_resumed_run_of_two_ranks_ends_with_the_same_bits(
    kind: str, seen: RankResults
) -> None:
    straight, resumed = f"dropout, {kind}", f"dropout, {kind.replace('ranks', 'ranks to 2')}"
    assert differing(seen.tensors(straight), seen.tensors(resumed)) == []
    assert seen.by(resumed)["steps"] == seen.by(straight)["steps"][2:]
    assert seen.by(resumed)["moved_from"] is None


@pytest.mark.parametrize(
    "name",
    [
        "qwen3, 2 ranks to 1",
        "qwen3, 2 sharded ranks to 1",
        "qwen3, 1 rank to 2",
        "qwen3, 1 rank to 2 sharded",
    ],
)
def test_a_run_resumes_with_more_or_fewer_ranks_and_reports_it(
    name: str, seen: RankResults
) -> None:
    stopped, resumed = seen.by(f"{name} stopped"), seen.by(name)
    assert stopped["was_stopped"]
    assert [step for step, *_ in stopped["steps"] + resumed["steps"]] == [1, 2, 3, 4, 5, 6]
    assert_same_course(seen, name, "qwen3, 1 rank")
    assert resumed["moved_from"] is not None
    assert ("2 ranks of cpu" in resumed["moved_from"]) == name.endswith("to 1")


def test_a_stop_request_to_one_rank_stops_all_at_the_same_step(seen: RankResults) -> None:
    for rank in (0, 1):  # the request was sent to rank 1
        report = seen.by("dropout, 2 ranks to 2 stopped", rank)
        assert report["was_stopped"]
        assert [step for step, *_ in report["steps"]] == [1, 2]


@pytest.mark.parametrize("kind", ["2 ranks", "2 sharded ranks"])
def test_a_nan_on_one_rank_is_skipped_by_all(kind: str, seen: RankResults) -> None:
    for rank in (0, 1):  # the NaN was on rank 1
        report = seen.by(f"skips, {kind}", rank)
        assert report["skips"] == [[2, 1], [5, 2]]
        assert [step for step, *_ in report["steps"]] == [1, 3, 4, 6]
    assert_same_course(seen, f"skips, {kind}", "skips, 1 rank")


def test_ranks_with_different_clocks_agree_on_the_last_step(seen: RankResults) -> None:
    first, second = seen.by("minutes", 0), seen.by("minutes", 1)
    assert first["steps"] == second["steps"]
    assert first["elapsed_s"] == second["elapsed_s"] == 6.0  # rank 0's clock: one second per step
    assert len(first["steps"]) == 6


def test_ranks_use_different_dropout_masks(seen: RankResults) -> None:
    first, second = (seen.by("dropout, 2 ranks", rank)["masks"] for rank in (0, 1))
    assert len(first) == len(second) == N_STEPS * 2  # two micro-batches of three
    masks = first + second
    for i, mask in enumerate(masks):
        for other in masks[:i]:
            n_both = sum(a == b == "1" for a, b in zip(mask, other, strict=True))
            # Independent masks drop the same position with probability 1/25.
            assert abs(n_both / len(mask) - 0.04) < 0.02


@pytest.mark.parametrize(
    ("batch_size", "wanted", "n_ranks", "size"),
    [(12, 3, 1, 3), (12, 3, 2, 3), (12, 12, 3, 4), (12, 3, 4, 3), (128, 16, 8, 16), (8, 4, 8, 1)],
)
def test_micro_batches_are_equal_and_at_most_the_requested_size(
    batch_size: int, wanted: int, n_ranks: int, size: int
) -> None:
    config = TrainingConfig(max_steps=1, batch_size=batch_size, micro_batch_size=wanted)
    assert World(size=n_ranks).micro_batch_size(config) == size


def test_a_batch_size_not_divisible_by_the_ranks_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"--batch-size 12 cannot be divided among 5 processes\."):
        DistributedWorld(size=5).micro_batch_size(TrainingConfig(max_steps=1, batch_size=12))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_gives_the_same_gradients(dropout: float) -> None:
    gradients = []
    for recompute in (False, True):
        model = small_model("qwen3", dropout=dropout).train()
        torch.manual_seed(5)
        model(torch.arange(40).view(2, 20), recompute=recompute).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert differing(*gradients) == []
    assert small_config().n_layer > 1
