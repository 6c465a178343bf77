"""Model families with their own class: training, traces, knockouts, quantization and cost."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_configs import CONFIGS
from knocking_out import knock_out
from laid_out import in_int8
from small_models import randomized

from minigpt.checkpoint.families import model_config_from_hf
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.config import ModelConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast import supports
from minigpt.model.attention import AttentionPass
from minigpt.model.cache import KVCache
from minigpt.model.cost import parameter_count, training_flops_per_token
from minigpt.model.language_model import LanguageModel, model_class
from minigpt.tracing.analysis.recorder import MeasureRecorder
from minigpt.tracing.analysis.rollout import Rollout
from minigpt.tracing.head_lists import select_heads

TOKENS = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return model_config_from_hf(CONFIGS[request.param])


@pytest.fixture
def model(config: ModelConfig) -> LanguageModel:
    model = model_class(config)(config)
    return randomized(model)


def test_other_families_decode_with_their_own_forward(
    model: LanguageModel,
) -> None:
    assert not supports(model)
    assert not supports(model, compile=True)
    assert type(Decoder(model, TOKENS[0].tolist()).forward).__name__ == "PlainForward"


@pytest.mark.integration
def test_a_new_model_of_each_family_is_trained_saved_and_loaded(
    config: ModelConfig, tmp_path: Path
) -> None:
    model = model_class(config)(config)
    model.init_weights(torch.Generator().manual_seed(1))
    assert all(p.isfinite().all() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(TOKENS)[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())

    before = loss().item()
    for _ in range(40):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before / 2
    assert all(parameter.grad is not None for parameter in model.parameters())
    write_model(tmp_path, model, None)
    again = read_model(tmp_path).model
    assert type(again) is type(model)
    assert torch.equal(again(TOKENS), model.eval()(TOKENS))


def test_activation_checkpointing_gives_the_same_gradients(model: LanguageModel) -> None:
    def gradients(**options: bool) -> list[torch.Tensor]:
        model.zero_grad()
        model(TOKENS, **options).square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, recomputed in zip(gradients(), gradients(recompute=True), strict=True):
        torch.testing.assert_close(recomputed, plain)


class Keeper:
    """Stores the attention passes that a recorder receives."""

    needs_queries = True
    needs_residual = True

    def record(self, attention: AttentionPass) -> None:
        self.attention = attention


@torch.no_grad()
def test_recorded_rows_times_values_equal_the_head_outputs(model: LanguageModel) -> None:
    keeper = Keeper()
    model(TOKENS[:1], recorder=keeper)
    seen = keeper.attention
    assert seen.queries is not None
    assert seen.keys is not None
    for layer, attention in enumerate(model.attentions):
        weights = attention.score.weights(seen.queries[layer], seen.keys[layer])[0]  # (H, T, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        torch.testing.assert_close(weights[:, -1], seen.weights_LBHS[layer, 0])
        values = seen.values_LBGSD[layer, 0]
        values = values.repeat_interleave(len(weights) // len(values), dim=0)
        torch.testing.assert_close(weights[:, -1:] @ values, seen.context_LBHD[layer, 0][:, None])
        if window := attention.score.window:
            place = torch.arange(20)
            hidden = place[None] <= place[:, None] - window
            assert (weights[:, hidden] == 0).all()
            assert (weights[:, ~hidden & (place[None] <= place[:, None])] > 0).all()


@torch.no_grad()
def test_the_recorded_residual_stream_equals_the_inputs_of_the_blocks(model: LanguageModel) -> None:
    states = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
        block.register_forward_hook(lambda *call: states.append(call[-1]))
    model(TOKENS, recorder=(keeper := Keeper()))
    residual_NBC = keeper.attention.residual_NBC
    assert residual_NBC is not None
    assert torch.equal(residual_NBC[0::2], torch.stack([states[0], *states[1::2]])[:, :, -1])
    for layer, attention in enumerate(model.attentions):
        branch = attention.output(keeper.attention.context_LBHD[layer].flatten(1))
        branch = model.blocks[layer].attention_post_norm(branch)
        added = residual_NBC[2 * layer + 1] - residual_NBC[2 * layer]
        torch.testing.assert_close(added, branch, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_recording_changes_no_logits_and_rollout_is_the_product_of_rows(
    model: LanguageModel,
) -> None:
    n_layer, n_head = model.config.n_layer, model.config.n_head
    rollout = Rollout(select_heads(n_layer=n_layer, n_head=n_head), 20)
    recorder = MeasureRecorder(model, measures=("weight", "norm"), accumulators=[rollout])
    keeper = Keeper()
    cache = KVCache(model.config)
    parts = [model(TOKENS[:1, :15], cache, recorder)]
    parts += [model(TOKENS[:1, i : i + 1], cache, recorder) for i in range(15, 20)]
    plain = model(TOKENS[:1], recorder=keeper)
    torch.testing.assert_close(torch.cat(parts, dim=1), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain, model(TOKENS[:1]))
    product = torch.eye(20)
    assert keeper.attention.queries is not None
    assert keeper.attention.keys is not None
    for attention, q, k in zip(
        model.attentions, keeper.attention.queries, keeper.attention.keys, strict=True
    ):
        product = (0.5 * attention.score.weights(q, k)[0].mean(0) + 0.5 * torch.eye(20)) @ product
    torch.testing.assert_close(rollout.row(), product[-1], rtol=1e-4, atol=1e-5)
    assert recorder.product_error is not None
    assert recorder.product_error < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["key", "value"])
def test_a_knockout_equals_a_forward_pass_without_the_source(
    model: LanguageModel, kind: Any
) -> None:
    cache = KVCache(model.config)
    full = model(TOKENS[:1], cache)[0, -1].log_softmax(-1)
    sources = [2, 17]
    changes = knock_out(model, cache, int(TOKENS[0, -1]), 7, sources, kind)
    for source, change in zip(sources, changes, strict=True):
        without = KVCache(model.config)
        model(TOKENS[:1, :-1], without)
        visible = None
        if kind == "key":
            visible = torch.ones(1, 20, dtype=torch.bool)
            visible[0, source] = False
        else:
            without.values_LBGSD[:, :, :, source] = 0
        logits = model(TOKENS[:1, -1:], without, visible_BS=visible)[0, -1]
        expected = (logits.log_softmax(-1) - full)[7].item()
        assert change == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_int8_weights_give_nearly_the_same_logits(model: LanguageModel) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.3)
    before = model(TOKENS)
    model = in_int8(model)
    after = model(TOKENS)
    assert 0 < (after - before).abs().max() < 0.1 * before.abs().max()


def test_counted_parameters_and_flops_equal_those_of_the_model(
    config: ModelConfig, model: LanguageModel
) -> None:
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    multiplied = sum(p.numel() for n, p in model.named_parameters() if n != "positions.weight")
    multiplied -= 0 if config.tie_embeddings else model.embedding.weight.numel()
    # Six per parameter; twelve per attention weight and dimension, averaged over visible positions.
    flops = 6 * multiplied
    for attention in model.attentions:
        window = attention.score.window or 40
        n_seen = sum(min(i + 1, window) for i in range(40)) / 40
        flops += 12 * config.n_head * config.d_head * n_seen
    assert training_flops_per_token(config) == pytest.approx(flops, rel=0.02)
