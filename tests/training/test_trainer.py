"""The training loop equals a plain loop; its seeds, sequence lengths and checkpoints."""

import math
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import small_config
from small_runs import bits, config_of, data_of, differing, run_until, text, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError
from minigpt.model.gpt import GPT
from minigpt.text.batches import batch, validation_windows
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.events import EvalEvent, SaveEvent, StepEvent
from minigpt.training.schedule import lr_scale


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_training_equals_a_plain_loop(clip: float, data: PreparedData, tmp_path: Path) -> None:
    config = config_of(
        "gpt2", optimizer="adamw", max_steps=6, lr=0.01, embedding_lr=0.01, grad_clip=clip, seed=5
    )
    trainer = trainer_of(config, data, tmp_path)
    events = [event for event in trainer.run() if isinstance(event, StepEvent)]

    model = GPT(config.model)
    model.init_weights(torch.Generator().manual_seed(5))
    adamw = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), eps=1e-10, weight_decay=0, fused=True
    )
    train, _ = data.tokens.split(0.1)
    for step, event in enumerate(events):
        scale = lr_scale(config.training, step / 6)
        inputs, targets = batch(train, 16, 6, seed=5, step=step)
        loss = F.cross_entropy(model(inputs).transpose(1, 2), targets)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm().item()
        for parameter in model.parameters():
            parameter.grad *= min(1, (clip or math.inf) / norm)
        adamw.param_groups[0]["lr"] = 0.01 * scale
        adamw.step()
        adamw.zero_grad()
        # float32 sums in another order
        assert event.train_loss == pytest.approx(loss.item(), rel=1e-4)
        assert event.grad_norm == pytest.approx(norm, rel=1e-3)
        assert event.lr == pytest.approx(0.01 * scale)
        assert event.step == step + 1
        assert event.progress == pytest.approx((step + 1) / 6)
    for (name, ours), theirs in zip(
        trainer.model.named_parameters(), model.parameters(), strict=True
    ):
        if name.endswith("key.bias"):
            continue  # it does not change the softmax: its gradient is noise, which AdamW amplifies
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3, msg=name)


def test_momentum_follows_its_schedule(data: PreparedData, tmp_path: Path) -> None:
    config = config_of("llama", max_steps=4, momentum=0.9, momentum_warmup_steps=2)
    trainer = trainer_of(config, data, tmp_path)
    muon = trainer.optimizers[0]
    used = []
    muon.register_step_pre_hook(lambda *_: used.append(muon.param_groups[0]["momentum"]))
    list(trainer.run())
    assert used == pytest.approx([0.7, 0.8, 0.9, 0.9])


def test_training_on_shorter_sequences_equals_a_model_of_that_context(
    data: PreparedData, tmp_path: Path
) -> None:
    """The llama layout has no position weights, so the longer context is unused."""
    base = config_of("llama", max_steps=6, eval_every=2, context_warmup_length=4)
    short = replace(base, model=replace(base.model, context_length=8))
    long = replace(base, training=replace(base.training, sequence_length=8))
    trainers = [
        trainer_of(config, data, tmp_path / name)
        for name, config in {"short": short, "long": long}.items()
    ]
    facts = [
        [
            (event.val_loss, event.n_tokens) if isinstance(event, EvalEvent) else event.train_loss
            for event in trainer.run()
            if isinstance(event, EvalEvent | StepEvent)
        ]
        for trainer in trainers
    ]
    assert facts[0] == facts[1]
    assert differing(bits(trainers[0]), bits(trainers[1])) == []
    written = read_model(RunFolder(tmp_path / "long").step_folder(6)).model.config
    assert written.context_length == 16


@pytest.mark.parametrize(("vocab_size", "batch_size"), [(257, 64), (2**19, 16), (2**28, 1)])
def test_evaluation_batches_bound_the_memory_of_logits(
    vocab_size: int,
    batch_size: int,
    data: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def stop_at(span: Any, length: int, max_tokens: int, batch_size: int) -> Any:
        seen.append(batch_size)
        raise DataError("far enough")

    trainer = trainer_of(config_of("llama"), data, tmp_path)
    monkeypatch.setattr("minigpt.training.checkpoints.validation_windows", stop_at)
    trainer.config = replace(
        trainer.config, model=replace(trainer.config.model, vocab_size=vocab_size)
    )
    trainer.request_stop()
    with pytest.raises(DataError):
        list(trainer.run())
    assert seen == [batch_size]


@pytest.mark.integration
def test_accumulated_micro_batches_equal_the_full_batch(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "minigpt.training.run.has_fast_bfloat16", lambda device: False
    )  # on any CPU
    runs = {}
    for size in (6, 3, 2, 1):
        config = config_of("llama", max_steps=4, micro_batch_size=size)
        trainer = trainer_of(config, data, tmp_path / str(size))
        events = [event for event in trainer.run() if isinstance(event, StepEvent)]
        runs[size] = [[event.train_loss, event.grad_norm] for event in events], bits(trainer)
    facts, tensors = runs[6]
    for size in (3, 2, 1):
        # float32 sums in another order
        torch.testing.assert_close(
            torch.tensor(runs[size][0]), torch.tensor(facts), rtol=1e-3, atol=0
        )
        for name in ("blocks.0.mlp.up.weight/momentum_buffer", "blocks.1.attention.output.weight"):
            torch.testing.assert_close(runs[size][1][name], tensors[name], rtol=1e-2, atol=1e-4)


@pytest.mark.integration
def test_the_loss_falls_to_the_entropy_of_a_repetitive_text(tmp_path: Path) -> None:
    data = data_of("abcdefgh " * 400, tmp_path / "corpus")
    config = config_of("llama", max_steps=80, lr=0.02, embedding_lr=0.02, log_every=80)
    final = [
        e for e in trainer_of(config, data, tmp_path / "run").run() if isinstance(e, EvalEvent)
    ]
    # Every letter determines the next one: the entropy is zero.
    assert final[-1].val_loss < 0.02
    assert final[-1].bits_per_byte == pytest.approx(final[-1].val_loss / math.log(2))


def test_runs_with_the_same_seed_are_equal_and_others_differ(
    data: PreparedData, tmp_path: Path
) -> None:
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        trainer = trainer_of(
            config_of(dropout=0.1, max_steps=3, seed=seed), data, tmp_path / str(number)
        )
        list(trainer.run())
        runs.append(bits(trainer))
    assert differing(runs[0], runs[1]) == []
    assert "embedding.weight" in differing(runs[0], runs[2])


def test_dropout_masks_differ_between_steps_and_between_seeds(
    data: PreparedData, tmp_path: Path
) -> None:
    masks: list[torch.Tensor] = []
    for seed in (3, 4):
        trainer = trainer_of(
            config_of(dropout=0.25, max_steps=3, seed=seed, micro_batch_size=3),
            data,
            tmp_path / str(seed),
        )
        trainer.model.dropout.register_forward_hook(
            lambda module, inputs, output: masks.append(output == 0) if module.training else None
        )
        list(trainer.run())
    assert len(masks) == 2 * 3 * 2  # seeds, steps, micro-batches
    n = masks[0].numel()
    for i, mask in enumerate(masks):
        assert abs(mask.sum().item() - n / 4) < 4 * math.sqrt(n * 3 / 16)
        for other in masks[:i]:  # independent masks are both zero at 1/16 of the positions
            assert abs((mask & other).sum().item() - n / 16) < 5 * math.sqrt(n * 15 / 256)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_the_smallest_and_largest_seeds_work(seed: int, data: PreparedData, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(dropout=0.1, max_steps=2, seed=seed), data, tmp_path)
    assert isinstance(list(trainer.run())[-1], SaveEvent)


@pytest.mark.parametrize(
    ("n_words", "val_fraction", "part"),
    [(2, 0.9, "training"), (2, 0.0, "training"), (2, 0.1, "validation"), (30, 0.1, "validation")],
)
def test_too_little_text_is_refused_before_the_first_step(
    n_words: int, val_fraction: float, part: str, tmp_path: Path
) -> None:
    data = data_of(text(n_words), tmp_path / "corpus")
    config = replace(config_of(), data=DataConfig(val_fraction=val_fraction))
    with pytest.raises(DataError, match=f"too little text: the {part} part has"):
        trainer_of(config, data, tmp_path / "run")


@pytest.mark.parametrize("n_words", [20, 25, 30])
def test_the_context_length_suggested_for_too_little_text_works(
    n_words: int, tmp_path: Path
) -> None:
    data = data_of(text(n_words), tmp_path / "corpus")
    with pytest.raises(DataError) as caught:
        trainer_of(config_of(), data, tmp_path / "run")
    found = re.search(r"at most (\d+)", str(caught.value))
    assert found
    config = config_of(sequence_length=int(found[1]), max_steps=1)
    assert list(trainer_of(config, data, tmp_path / "run").run())


def test_a_trained_tokenizer_is_saved_in_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(text(800))
    data = prepare(DataConfig(paths=(str(path),), tokenizer="bpe:300"), cache_dir=tmp_path / "c")
    shape: dict[str, Any] = {"vocab_size": data.tokenizer.vocab_size, "context_length": 16}
    config = config_of(max_steps=2)
    object.__setattr__(config, "model", small_config(**shape))
    events = list(trainer_of(config, data, tmp_path / "run").run())
    loaded = read_model(events[-1].folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint == data.tokenizer.fingerprint
    evaluation = next(event for event in events if isinstance(event, EvalEvent))
    nats_per_byte = evaluation.bits_per_byte * math.log(2)
    _, val = data.tokens.split(0.1)
    windows = list(validation_windows(val, 16, 160, 10**6))
    tokens = torch.cat([targets.flatten() for _, targets in windows]).tolist()
    n_bytes = len(data.tokenizer.decode_bytes(tokens))
    assert nats_per_byte == pytest.approx(evaluation.val_loss * len(tokens) / n_bytes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gpt2", "qwen3"])
def test_a_compiled_run_equals_an_eager_one(
    layout: str, data: PreparedData, tmp_path: Path
) -> None:
    losses = []
    for is_compiled in (False, True):
        config = config_of(layout, optimizer="adamw", max_steps=4, lr=1e-3, compile=is_compiled)
        trainer = trainer_of(config, data, tmp_path / str(is_compiled))
        losses.append([e.train_loss for e in trainer.run() if isinstance(e, StepEvent)])
    # Fused kernels round at other points.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_context_warmup_keeps_the_tokens_per_step(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(max_steps=8, context_warmup_length=4, context_warmup_fraction=0.5)
    trainer = trainer_of(config, data, tmp_path / "run")
    shapes = []
    trainer.model.register_forward_pre_hook(
        lambda module, arguments: (
            shapes.append(tuple(arguments[0].shape)) if module.training else None
        )
    )
    run_until(trainer, 8)
    assert shapes == [(24, 4)] * 4 + [(6, 16)] * 4


def test_the_warm_up_length_must_divide_the_context() -> None:
    with pytest.raises(ConfigError, match=r"3 does not divide 16"):
        config_of(context_warmup_length=3)


_FAULTS = """
import resource
import sys
from pathlib import Path

from small_runs import config_of, data_of, text, trainer_of

folder = Path(sys.argv[1])
trainer = trainer_of(config_of("qwen3", batch_size=512), data_of(text(600), folder), folder / "run")
n_faults = []
for _ in range(8):
    trainer.take_step()
    n_faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print((n_faults[-1] - n_faults[2]) * resource.getpagesize())
"""


@pytest.mark.integration
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's allocator")
def test_a_step_reuses_the_memory_of_the_previous_one(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    faulted = subprocess.check_output(
        [sys.executable, "-c", _FAULTS, str(tmp_path)], text=True, env=environment
    )
    assert int(faulted) < 2**22  # over 2**26 if each step returns its memory
