"""A stopped and resumed run ends with the bits of an uninterrupted one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import bits, config_of, data_of, differing, run_until, text, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.errors import CheckpointError, DataError, ResourceError
from minigpt.text.tokens import PreparedData
from minigpt.training import trainer as trainer_module
from minigpt.training.events import EvalEvent, Event, SaveEvent, StepEvent
from minigpt.training.state import STATE_FOLDER, restore

HARD = {"micro_batch_size": 3, "weight_decay": 0.1, "momentum_warmup_steps": 20}


def facts(events: list[Event]) -> list[tuple[Any, ...]]:
    """Return the contents of events without their times."""
    result: list[tuple[Any, ...]] = []
    for event in events:
        match event:
            case StepEvent():
                result.append((event.step, event.train_loss, event.lr, event.grad_norm))
            case EvalEvent():
                result.append((event.step, event.val_loss, event.bits_per_byte, event.n_tokens))
            case SaveEvent():
                result.append((event.step, event.folder.name, event.val_loss, event.is_best))
    return result


@pytest.mark.integration
@pytest.mark.parametrize(
    ("layout", "optimizer", "dtype", "n_steps"),
    [
        ("qwen3", "muon", torch.float32, 30),
        ("gpt2", "muon", torch.float32, 8),
        ("llama-grouped", "adamw", torch.float32, 8),
        ("gpt2-tied", "adamw", torch.float32, 8),
        ("qwen3", "muon", torch.bfloat16, 8),
    ],
)
def test_a_stopped_and_resumed_run_ends_with_the_same_bits(
    layout: str,
    optimizer: str,
    dtype: torch.dtype,
    n_steps: int,
    data: PreparedData,
    tmp_path: Path,
) -> None:
    budget = {"max_steps": n_steps, "save_every": n_steps // 3, "eval_every": 3}
    config = config_of(layout, dropout=0.2, optimizer=optimizer, **budget, **HARD)
    straight = trainer_of(config, data, tmp_path / "straight", dtype=dtype)
    all_events = facts(list(straight.run()))

    torch.manual_seed(1)  # earlier random state of the process must not matter
    first = trainer_of(config, data, tmp_path / "interrupted", dtype=dtype)
    run_until(first, n_steps // 2)
    assert first.was_stopped
    assert first.step == n_steps // 2
    torch.manual_seed(2)
    second = trainer_of(config, data, tmp_path / "interrupted", dtype=dtype, resume=True)
    assert differing(bits(second), bits(first)) == []
    later_events = facts(list(second.run()))

    assert differing(bits(second), bits(straight)) == []
    # Stopping saved an extra checkpoint; everything after it is the same.
    assert later_events == [event for event in all_events if event[0] > n_steps // 2]
    last = [tmp_path / part / f"step-{n_steps:06d}" for part in ("straight", "interrupted")]
    one, other = (load_file(folder / "model.safetensors") for folder in last)
    assert differing(one, other) == []


@pytest.mark.integration
def test_the_bitwise_comparison_detects_different_runs(data: PreparedData, tmp_path: Path) -> None:
    """The test above would detect another seed, dropout mask or window."""
    base = trainer_of(config_of(dropout=0.2), data, tmp_path / "base")
    run_until(base, 3)
    for i, config in enumerate(
        [config_of(dropout=0.2, seed=7), config_of(dropout=0.1), config_of(batch_size=5)]
    ):
        other = trainer_of(config, data, tmp_path / f"{i}")
        run_until(other, 3)
        assert "blocks.0.mlp.up.weight" in differing(bits(base), bits(other))


def test_resuming_a_finished_run_does_nothing(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(max_steps=3)
    list(trainer_of(config, data, tmp_path).run())
    again = trainer_of(config, data, tmp_path, resume=True)
    assert list(again.run()) == []
    assert not again.was_stopped
    assert RunFolder(tmp_path).steps() == [3]


def test_a_larger_budget_continues_from_the_last_checkpoint(
    data: PreparedData, tmp_path: Path
) -> None:
    list(trainer_of(config_of(max_steps=3), data, tmp_path).run())
    longer = trainer_of(config_of(max_steps=5), data, tmp_path, resume=True)
    events = list(longer.run())
    assert [e.step for e in events if isinstance(e, StepEvent)] == [4, 5]
    assert RunFolder(tmp_path).steps() == [3, 5]


def test_resume_accepts_another_dropout_but_not_another_shape(
    data: PreparedData, tmp_path: Path
) -> None:
    run_until(trainer_of(config_of("llama"), data, tmp_path), 2)
    changed = trainer_of(config_of("llama", dropout=0.5), data, tmp_path, resume=True)
    assert {m.p for m in changed.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.5}
    same_sizes = config_of("llama").model.__class__(
        vocab_size=257,
        context_length=16,
        n_layer=2,
        n_head=2,
        d_model=32,
        activation="relu2",
    )
    for model in (same_sizes, config_of("gpt2").model, config_of("llama-grouped").model):
        config = config_of("llama")
        object.__setattr__(config, "model", model)
        with pytest.raises(
            CheckpointError, match=r"a model of another shape than the run's config"
        ):
            trainer_of(config, data, tmp_path, resume=True)


def test_another_corpus_is_a_data_error(data: PreparedData, tmp_path: Path) -> None:
    run_until(trainer_of(config_of(), data, tmp_path / "run"), 2)
    other = data_of(text(600, seed=1), tmp_path / "other")
    with pytest.raises(DataError, match=r"^the corpus is not the one that this run started with\."):
        trainer_of(config_of(), other, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("written", "read"), [("adamw", "muon"), ("muon", "adamw")])
def test_the_state_of_another_optimizer_is_a_checkpoint_error(
    written: str, read: str, data: PreparedData, tmp_path: Path
) -> None:
    run_until(trainer_of(config_of(optimizer=written), data, tmp_path), 2)
    with pytest.raises(CheckpointError, match=r"Resume with the run's own settings\."):
        trainer_of(config_of(optimizer=read), data, tmp_path, resume=True)


@pytest.mark.parametrize("layout", ["gpt2", "qwen3", "llama-grouped"])
def test_the_state_of_another_model_is_a_checkpoint_error(
    layout: str, data: PreparedData, tmp_path: Path
) -> None:
    run_until(trainer_of(config_of("llama"), data, tmp_path / "one"), 2)
    folder = RunFolder(tmp_path / "one").step_folder(2)
    other = trainer_of(config_of(layout), data, tmp_path / "two")
    with pytest.raises(CheckpointError):
        restore(other, folder)
    for optimizer in other.optimizers:
        for state in optimizer.state.values():
            assert all(tensor.isfinite().all() for tensor in state.values())


def break_state(kind: str, folder: Path) -> None:
    optimizer, progress = folder / "optimizer.safetensors", folder / "progress.json"
    values = json.loads(progress.read_text())
    tensors = load_file(optimizer)
    match kind:
        case "no folder":
            optimizer.unlink()
            progress.unlink()
            folder.rmdir()
        case "no tensors":
            optimizer.unlink()
        case "cut tensors":
            optimizer.write_bytes(optimizer.read_bytes()[:-5])
        case "no progress":
            progress.unlink()
        case "not text":
            progress.write_bytes(b"\xff\xfe")
        case "not JSON":
            progress.write_text("{")
        case "not an object":
            progress.write_text("[]")
        case "a float step":
            progress.write_text(json.dumps(values | {"step": 1.5}))
        case "an unknown key":
            progress.write_text(json.dumps(values | {"stepp": 1}))
        case "a missing tensor":
            tensors.pop(next(iter(tensors)))
            save_file(tensors, optimizer)
        case "an extra tensor":
            save_file(tensors | {"ghost/\x1b[31m": torch.zeros(1)}, optimizer)
        case "another shape":
            save_file(tensors | {"final_norm.weight/exp_avg": torch.zeros(31)}, optimizer)


@pytest.mark.parametrize(
    "kind",
    [
        "no folder",
        "no tensors",
        "cut tensors",
        "no progress",
        "not text",
        "not JSON",
        "not an object",
        "a float step",
        "an unknown key",
        "a missing tensor",
        "an extra tensor",
        "another shape",
    ],
)
def test_a_damaged_state_is_a_one_line_checkpoint_error(
    kind: str, data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of(), data, tmp_path)
    run_until(trainer, 1)
    folder = RunFolder(tmp_path).step_folder(1)
    restore(trainer, folder)
    break_state(kind, folder / STATE_FOLDER)
    with pytest.raises(CheckpointError) as caught:
        restore(trainer, folder)
    assert "\x1b" not in str(caught.value)


def test_a_full_disk_while_the_state_is_written_is_a_resource_error(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    import signal

    trainer = trainer_of(config_of("llama", save_every=2, optimizer="adamw"), data, tmp_path)
    events = trainer.run()
    while not isinstance(next(events), SaveEvent):
        pass
    before = sorted(path.name for path in tmp_path.iterdir())
    weights = RunFolder(tmp_path).step_folder(2) / "model.safetensors"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    # AdamW's state is twice as large as the weights, so only the state exceeds the limit.
    resource.setrlimit(resource.RLIMIT_FSIZE, (weights.stat().st_size + 1000, limits[1]))
    try:
        with pytest.raises(ResourceError, match=r"optimizer\.safetensors"):
            list(events)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    latest = RunFolder(tmp_path).latest()
    assert latest is not None
    assert latest.step == 2


@pytest.mark.integration
def test_the_state_stores_the_training_time(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: float(next(clock)))
    config = config_of(max_steps=0, max_minutes=0.2)  # 12 s; a step takes one tick of the clock
    first = trainer_of(config, data, tmp_path)
    run_until(first, 5)
    assert first.elapsed_s == 5
    second = trainer_of(config, data, tmp_path, resume=True)
    assert (second.step, second.elapsed_s) == (5, 5)
    list(second.run())
    assert (second.step, second.elapsed_s) == (12, 12)
