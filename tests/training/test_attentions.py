"""Training, resuming, loading, decoding and tracing of minigpt's own architectures."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_tokens, small_config, small_model
from small_runs import bits, config_of, differing, run_until, trainer_of
from test_memory import allocated

from minigpt.checkpoint.model_folder import read_config, read_model, write_model
from minigpt.config import ModelConfig, RunConfig, SamplingConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.generation.forward import make_forward
from minigpt.generation.sliding import SlidingDecoder
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.model_config import ATTENTIONS
from minigpt.settings import build, to_dict, to_toml
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.text.tokens import PreparedData
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.tracer import trace
from minigpt.training.optim import is_muon_parameter
from minigpt.training.reports.memory import estimate_memory, optimizer_values
from minigpt.training.reports.plan import parameters_by_part

SCORED: dict[str, dict[str, Any]] = {
    name: {"attention": name, "n_kv_head": 2} for name in ATTENTIONS if name != "scaled_dot"
}
LSTM = {"arch": "lstm", "n_head": 1}
LSTM_ATTENTION = {"arch": "lstm-attention", "n_head": 1, "n_layer": 1}
MODELS = SCORED | {"lstm": LSTM, "lstm-attention": LSTM_ATTENTION}


def other_model(name: str, **changes: Any) -> LanguageModel:
    """Return a model in evaluation mode whose weights are all random."""
    config = small_config(**(MODELS[name] | changes))
    model = model_class(config)(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def run_config(name: str, **training: Any) -> RunConfig:
    config = config_of("llama-grouped", max_steps=6, **training)
    shape = small_config(vocab_size=257, context_length=16, **MODELS[name])
    return replace(config, model=shape)


@pytest.mark.integration
@pytest.mark.parametrize("name", MODELS)
def test_every_architecture_trains_and_resumes_with_the_same_bits(
    name: str, data: PreparedData, tmp_path: Path
) -> None:
    config = run_config(name, lr=0.02)
    whole = trainer_of(config, data, tmp_path / "whole")
    before = whole.checkpoints.evaluate().val_loss
    run_until(whole, 0)
    run_until(trainer_of(config, data, tmp_path / "interrupted"), 3)
    resumed = trainer_of(config, data, tmp_path / "interrupted", resume=True)
    assert resumed.step == 3
    run_until(resumed, 0)
    assert differing(bits(whole), bits(resumed)) == []
    assert whole.checkpoints.evaluate().val_loss < before - 0.1
    read = read_model(resumed.folder.step_folder(6)).model
    assert read.config == config.model
    assert {n: t.tolist() for n, t in read.state_dict().items()} == {
        n: t.tolist() for n, t in resumed.model.state_dict().items()
    }


@pytest.mark.parametrize("reduce", ["mean", "rollout"])
@pytest.mark.parametrize("name", [name for name in MODELS if name != "lstm"])
def test_traced_rows_are_the_models_attention_and_tracing_changes_no_token(
    name: str, reduce: Any
) -> None:
    model = other_model(name, vocab_size=257)
    sampling = SamplingConfig(max_new_tokens=7, seed=3)
    prompt = list(b"to be or not")
    plain = [step.token for step in Decoder(model, prompt).generate(sampling, seed=3)]
    measure = "weight" if reduce == "rollout" else "both"
    config = AnalysisConfig(reduce=reduce, sink="auto", measure=measure)
    header, *steps, footer = trace(model, BytesTokenizer(), prompt, sampling, config, seed=3)
    assert [step.token.id for step in steps] == plain
    assert header.n_layer == model.config.n_attention_layer
    assert footer.worst_row_sum_error < 1e-5
    assert footer.worst_product_error < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_config_json_and_config_toml_record_the_architecture(name: str, tmp_path: Path) -> None:
    model = other_model(name)
    config = model.config
    write_model(tmp_path, model, None)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "minigpt"
    assert written["architectures"] == ["MinigptForCausalLM"]
    assert read_config(tmp_path) == config
    assert build(ModelConfig, to_dict(config)) == config
    run = RunConfig(model=config, training=config_of().training)
    assert f'arch = "{config.arch}"' in to_toml(run)
    assert f'attention = "{config.attention}"' in to_toml(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "scaled_dot"}, "model_type 'minigpt' does not fit"),
        ({"attention": "cosine"}, "unknown attention 'cosine'"),
        ({"attention": 3}, "attention must be of type str: it is 3"),
        ({"sliding_window": 4}, "unknown field 'sliding_window' with value 4"),
        ({"n_layer": None}, "n_layer must be of type int: it is None"),
        ({"n_layer": 3}, "do not fit config.json: 'blocks.2"),
        ({"attention": "general"}, r"'blocks.0.attention.score.w' is missing"),
    ],
)
def test_a_config_json_of_another_model_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_model(tmp_path, small_model(attention="additive"), None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        read_model(tmp_path)


def test_tracing_an_lstm_without_attention_is_refused() -> None:
    events = trace(
        other_model("lstm", vocab_size=257),
        BytesTokenizer(),
        list(b"to be"),
        SamplingConfig(),
        seed=1,
    )
    with pytest.raises(ConfigError, match="a model of arch lstm has no attention to show"):
        next(events)


@pytest.mark.parametrize("name", ["lstm", "lstm-attention"])
def test_batched_lstm_samples_equal_single_ones_and_the_window_slides(name: str) -> None:
    model = other_model(name)
    prompt = random_tokens(9).tolist()
    sampling = SamplingConfig(max_new_tokens=30, overflow="slide", temperature=1)
    decoder = SlidingDecoder(model, prompt, n_rows=2)
    together: dict[int, list[int]] = {0: [], 1: []}
    for row, step in decoder.batch(sampling, seeds=[5, 6]):
        together[row].append(step.token)
    for row, seed in enumerate((5, 6)):
        alone = [step.token for step in decoder.generate(sampling, seed=seed)]
        assert alone == together[row]
        assert len(alone) == 30


def test_published_layouts_reject_other_scores() -> None:
    with pytest.raises(ConfigError, match="model_type 'llama' does not fit"):
        small_config(attention="dot", model_type="llama")
    with pytest.raises(ConfigError, match="model_type 'minigpt' does not fit"):
        small_config(model_type="minigpt")


@pytest.mark.parametrize("name", MODELS)
def test_compiled_decoding_of_other_architectures_is_refused_in_one_line(name: str) -> None:
    model = other_model(name)
    with pytest.raises(ConfigError, match=r"--compile needs .*: this model is .* Use --no-compile"):
        make_forward(model, capacity=8, compile=True)


def test_muon_updates_the_matrices_of_an_lstm_and_adamw_the_rest() -> None:
    named = other_model("lstm-attention").named_parameters()
    muon_names = {name for name, parameter in named if is_muon_parameter(name, parameter)}
    attention = ("score.w_q", "score.w_k", "output.weight", "own.weight")
    assert muon_names == {f"blocks.0.lstm.weight_{kind}_l0" for kind in ("ih", "hh")} | {
        f"attention.{name}" for name in attention
    }


def test_muon_updates_the_matrices_of_a_score_and_adamw_its_vectors() -> None:
    muon_names = {
        (attention, name.rpartition(".")[2]): is_muon_parameter(name, parameter)
        for attention in ATTENTIONS
        for name, parameter in small_model(attention=attention).named_parameters()
        if ".score." in name
    }
    assert muon_names == {
        ("general", "w"): True,
        ("concat", "w"): True,
        ("concat", "v"): False,
        ("additive", "w_q"): True,
        ("additive", "w_k"): True,
        ("additive", "v"): False,
    }


@pytest.mark.parametrize("name", ["lstm", "lstm-attention"])
def test_the_plan_of_an_lstm_counts_its_parameters_and_optimizer_state(
    name: str, data: PreparedData, tmp_path: Path
) -> None:
    config = run_config(name)
    trainer = trainer_of(config, data, tmp_path)
    trainer.take_step()
    parts = parameters_by_part(config.model)
    assert set(parts) == {"output", "embedding", "LSTM", "norms"} | (
        {"attention"} if name == "lstm-attention" else set()
    )
    assert sum(parts.values()) == sum(p.numel() for p in trainer.model.parameters())
    moments = [
        tensor.numel()
        for optimizer in trainer.optimizers
        for state in optimizer.state.values()
        for key, tensor in state.items()
        if key != "step"
    ]
    assert optimizer_values(config) == sum(moments)


@pytest.mark.integration
@pytest.mark.parametrize("name", ["additive", "lstm", "lstm-attention"])
def test_estimated_memory_of_every_architecture_is_what_a_run_allocates(
    name: str, data: PreparedData, tmp_path: Path
) -> None:
    config = run_config(name, batch_size=64)
    made = []
    _, held = allocated(lambda: made.append(trainer_of(config, data, tmp_path)))
    _, moments = allocated(made[0].take_step)
    step, _ = allocated(made[0].take_step)
    estimate = estimate_memory(config, len(made[0].val_tokens), torch.float32)
    # The formula ignores temporary tensors of a score.
    assert estimate["total"] == pytest.approx(held + moments + step, rel=0.2)


def test_the_estimated_memory_of_a_tanh_score_is_bounded() -> None:
    shape = small_config(vocab_size=61, context_length=1024, n_layer=1, attention="additive")
    config = replace(config_of(batch_size=1), model=shape)
    hidden_bytes = 4 * 1024 * 1024 * 8 * 4
    assert estimate_memory(config, 1024, torch.float32)["activations"] < hidden_bytes / 2
    # A GPU computes all of them together, and the backward pass needs three copies.
    on_gpu = estimate_memory(config, 1024, torch.float32, device_type="cuda")
    assert on_gpu["activations"] > 3 * hidden_bytes
