"""When a run evaluates, saves and ends, and the contents of its checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_runs import bits, config_of, differing, run_until, trainer_of

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model
from minigpt.config import SamplingConfig
from minigpt.evaluation import evaluate
from minigpt.generation.decoder import Decoder
from minigpt.text.batches import validation_windows
from minigpt.text.tokens import PreparedData
from minigpt.training import trainer as trainer_module
from minigpt.training.events import EvalEvent, SampleEvent, SaveEvent, StepEvent
from minigpt.training.world import World


def test_fine_tuning_evaluates_the_base_model_first_and_updates_it(
    data: PreparedData, tmp_path: Path
) -> None:
    config = replace(config_of("gpt2", dropout=0.1, max_steps=3), from_="somewhere")
    model = small_model("gpt2", vocab_size=257, context_length=16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = trainer_of(config, data, tmp_path, start_from=model)
    assert differing(dict(trainer.model.state_dict()), before) == []
    events = list(trainer.run())
    windows = validation_windows(trainer.val_tokens, 16, config.training.eval_tokens, 1)
    model = small_model("gpt2", vocab_size=257, context_length=16)
    expected = evaluate(model, windows, data.tokenizer.token_byte_lengths)
    first = events[0]
    assert isinstance(first, EvalEvent)
    assert (first.step, first.n_tokens) == (0, expected.n_tokens)
    assert first.val_loss == pytest.approx(expected.nats_per_token, rel=1e-5)
    assert "blocks.0.mlp.up.weight" in differing(dict(trainer.model.state_dict()), before)


def test_fine_tuning_without_a_validation_text_is_never_evaluated(
    data: PreparedData, tmp_path: Path
) -> None:
    config = replace(config_of("gpt2", max_steps=2, eval_every=1), from_="somewhere")
    config = replace(config, data=replace(config.data, val_fraction=0.0))
    model = small_model("gpt2", vocab_size=257, context_length=16)
    events = list(trainer_of(config, data, tmp_path, start_from=model).run())
    assert [type(event) for event in events] == [StepEvent, StepEvent, SaveEvent]


@pytest.mark.integration
def test_evaluations_checkpoints_and_samples_do_not_change_training(
    data: PreparedData, tmp_path: Path
) -> None:
    plain = trainer_of(config_of("qwen3", dropout=0.2, max_steps=6), data, tmp_path / "plain")
    cadence = {"eval_every": 1, "save_every": 2, "sample_every": 2, "log_every": 5}
    watched = trainer_of(
        config_of("qwen3", dropout=0.2, max_steps=6, **cadence), data, tmp_path / "watched"
    )
    list(plain.run())
    n_evaluations = 0
    for event in watched.run():
        n_evaluations += isinstance(event, EvalEvent)
        if isinstance(event, SampleEvent):
            watched.model.eval()
            assert list(Decoder(watched.model, [256]).generate(SamplingConfig(), seed=event.step))
            watched.model.train()
    assert n_evaluations == 6
    assert differing(bits(plain), bits(watched)) == []


def test_events_occur_at_their_configured_steps(data: PreparedData, tmp_path: Path) -> None:
    config = config_of(max_steps=10, log_every=4, eval_every=3, save_every=5, sample_every=6)
    seen = [(type(e).__name__[:-5], e.step) for e in trainer_of(config, data, tmp_path).run()]
    assert seen == [
        ("Eval", 3),
        ("Step", 4),
        ("Eval", 5),  # every checkpoint is evaluated
        ("Save", 5),
        ("Eval", 6),
        ("Sample", 6),
        ("Step", 8),
        ("Eval", 9),
        ("Step", 10),
        ("Sample", 10),
        ("Eval", 10),
        ("Save", 10),
    ]


def test_a_run_without_intervals_evaluates_and_saves_at_its_end(
    data: PreparedData, tmp_path: Path
) -> None:
    events = list(trainer_of(config_of(max_steps=2, log_every=50), data, tmp_path).run())
    assert [(type(e), e.step) for e in events] == [
        (StepEvent, 2),
        (EvalEvent, 2),
        (SaveEvent, 2),
    ]
    assert not any(isinstance(event, SampleEvent) for event in events)


def test_a_stopped_run_saves_its_last_step(data: PreparedData, tmp_path: Path) -> None:
    trainer = trainer_of(config_of(log_every=1), data, tmp_path)
    events = run_until(trainer, 3)
    assert [(type(e), e.step) for e in events[-2:]] == [(EvalEvent, 3), (SaveEvent, 3)]
    assert trainer.was_stopped
    latest = RunFolder(tmp_path).latest()
    assert latest is not None
    assert differing(read_model(latest.folder).model.state_dict(), trainer.model.state_dict()) == []
    assert latest.facts["val_loss"] == events[-1].val_loss


def test_a_stop_request_during_synchronization_of_ranks_is_not_lost(
    data: PreparedData, tmp_path: Path
) -> None:
    """A rank that is not computing mostly waits there for the others."""
    trainer = trainer_of(config_of(max_steps=5), data, tmp_path)

    class Interrupted(World):
        def max(self, number: int) -> int:
            trainer.request_stop()
            return number

    trainer.world = Interrupted()
    assert [event.step for event in trainer.run() if isinstance(event, StepEvent)] == [1]


def test_a_run_stopped_before_its_first_step_saves_a_checkpoint(
    data: PreparedData, tmp_path: Path
) -> None:
    trainer = trainer_of(config_of(), data, tmp_path)
    trainer.request_stop()
    assert [(type(e), e.step) for e in trainer.run()] == [(EvalEvent, 0), (SaveEvent, 0)]
    resumed = trainer_of(config_of(max_steps=3), data, tmp_path, resume=True)
    fresh = trainer_of(config_of(max_steps=3), data, tmp_path / "fresh")
    list(resumed.run())
    list(fresh.run())
    assert differing(bits(resumed), bits(fresh)) == []


def test_the_validation_loss_equals_the_checkpoints_loss_on_the_last_tenth(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("gpt2", max_steps=4, save_every=2, eval_tokens=10**9)
    events = list(trainer_of(config, data, tmp_path).run())
    n_val = len(data.tokens) - int(len(data.tokens) * 0.9)
    for save in (event for event in events if isinstance(event, SaveEvent)):
        model = read_model(save.folder).model
        _, val = data.tokens.split(0.1)
        result = evaluate(
            model, validation_windows(val, 16, 10**9, 1), data.tokenizer.token_byte_lengths
        )
        assert save.val_loss == pytest.approx(result.nats_per_token, rel=1e-5)
    evaluations = [event for event in events if isinstance(event, EvalEvent)]
    assert [event.n_tokens for event in evaluations] == [n_val - 1] * 2


@pytest.mark.integration
def test_best_is_the_checkpoint_with_the_lowest_validation_loss(
    data: PreparedData, tmp_path: Path
) -> None:
    config = config_of("llama", max_steps=10, save_every=2, keep=1)
    trainer = trainer_of(config, data, tmp_path)
    saves = []
    for event in trainer.run():
        if isinstance(event, SaveEvent):
            saves.append(event)
            if event.step == 4:  # reset the weights, so that later checkpoints are worse
                with torch.no_grad():
                    trainer.model.unembedding.weight.normal_(std=3.0)
    losses = [event.val_loss for event in saves]
    assert losses.index(min(losses)) == 1
    assert [event.is_best for event in saves] == [True, True, False, False, False]
    run = RunFolder(tmp_path)
    best, latest = run.best(), run.latest()
    assert best is not None
    assert latest is not None
    assert (best.step, best.facts["val_loss"]) == (4, losses[1])
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 4
    assert (latest.step, latest.facts["val_loss"]) == (10, losses[4])
    assert run.steps() == [4, 8, 10]  # best, one kept, latest

    again = trainer_of(config_of("llama", max_steps=11, keep=1), data, tmp_path, resume=True)
    assert [event.is_best for event in again.run() if isinstance(event, SaveEvent)] == [False]
    best = run.best()
    assert best is not None
    assert best.step == 4


def test_a_time_limit_counts_training_but_not_evaluation(
    data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read of the clock adds a second, so steps and evaluations take one second each."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: float(next(ticks)))
    config = config_of(max_steps=0, max_minutes=10 / 60, eval_every=2, warmup_fraction=0.0)
    events = list(trainer_of(config, data, tmp_path).run())
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.elapsed_s for event in steps] == list(range(1, 11))
    assert [event.remaining_s for event in steps] == pytest.approx(list(range(9, -1, -1)))
    assert {event.tokens_per_s for event in steps} == {6 * 16}
    assert [event.progress for event in steps] == pytest.approx([i / 10 for i in range(1, 11)])
    # The learning rate falls over the last 0.6 of the time.
    expected = [0.01 * min(1, (1 - i / 10) / 0.6) for i in range(10)]
    assert [event.lr for event in steps] == pytest.approx(expected)
    assert {event.eval_s for event in events if isinstance(event, EvalEvent)} == {1}
