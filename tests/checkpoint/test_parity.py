"""Tiny random models saved by transformers compute the same in minigpt."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_models import CONTEXT, TOKENS, Pair, has_long_rope

from minigpt.checkpoint.model_folder import read_model
from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.model.cache import KVCache
from minigpt.tracing.recorder import RowRecorder

NEW = 64


@torch.no_grad()
def test_logits_equal_those_of_transformers_at_every_position(pair: Pair) -> None:
    expected = pair.theirs(TOKENS).logits
    assert expected.std() > 0.3  # otherwise any model would agree
    torch.testing.assert_close(pair.ours.model(TOKENS), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def assert_greedy_tokens_agree(pair: Pair, prompt: list[int], n_new: int = NEW) -> None:
    """Check that each of our greedy tokens is the most probable one in transformers."""
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=n_new)
    steps = Decoder(pair.ours.model, prompt).generate(sampling, seed=0)
    tokens = prompt + [step.token for step in steps]
    assert len(tokens) == len(prompt) + n_new
    if has_long_rope(pair):  # the length of the text determines the frequencies
        prefixes = (torch.tensor([tokens[:n]]) for n in range(len(prompt), len(tokens)))
        best = [int(pair.theirs(prefix).logits[0, -1].argmax()) for prefix in prefixes]
    else:
        best = pair.theirs(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
        best = best[len(prompt) - 1 : -1]
    assert tokens[len(prompt) :] == best


@pytest.mark.integration
def test_greedy_tokens_equal_those_of_transformers(pair: Pair) -> None:
    n_new = NEW if has_long_rope(pair) else 24  # past the longest short window
    assert_greedy_tokens_agree(pair, TOKENS[0, :1].tolist(), n_new)
    assert_greedy_tokens_agree(pair, TOKENS[0, : CONTEXT - NEW].tolist())  # to the last position


@pytest.mark.slow
def test_greedy_tokens_equal_those_of_transformers_from_every_length(pair: Pair) -> None:
    for length in range(1, CONTEXT - NEW + 1):
        assert_greedy_tokens_agree(pair, TOKENS[1, :length].tolist())
    if has_long_rope(pair) and pair.ours.model.config.model_type != "phi3":
        return  # transformers keeps cached keys that were rotated with the other frequencies
    generated = pair.theirs.generate(
        TOKENS[:1, :3], do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
    )
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=NEW)
    steps = Decoder(pair.ours.model, TOKENS[0, :3].tolist()).generate(sampling, seed=0)
    assert [step.token for step in steps] == generated[0, 3:].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["llama-long", "gemma3-long", "phi3-long"])
def test_longrope_logits_with_a_cache_equal_a_full_forward(
    open_both: Callable[[str], Pair], kind: str
) -> None:
    pair = open_both(kind)
    model, original = pair.ours.model, pair.ours.model.original_context
    cache = KVCache(model.config, batch_size=2)
    lengths = [original - 3, original, original + 1, original + 4, original, original + 2]
    for start, end in itertools.pairwise([0, *lengths]):
        cache.truncate(min(start, end - 2))  # at least two tokens are fed
        cached = model(TOKENS[:, cache.length : end], cache)
        expected = pair.theirs(TOKENS[:, :end]).logits[:, -cached.shape[1] :]
        torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)
        cache.select([1, 0])
        cache.select([1, 0])


@torch.inference_mode()
def test_traced_rows_equal_the_attention_of_transformers(pair: Pair) -> None:
    tokens = TOKENS[:1, :20]
    layers = pair.theirs(tokens, output_attentions=True).attentions
    recorder = RowRecorder(pair.ours.model)
    for n in (1, 2, 13, 20):
        pair.ours.model(tokens[:, :n], recorder=recorder)
        expected = torch.stack([layer[0, :, n - 1, :n] for layer in layers])
        torch.testing.assert_close(recorder.weights_LHS, expected, rtol=0, atol=1e-5)


WINDOW = {"sliding_window": 7}
OTHER_FIELDS = [
    ("neox", {"num_key_value_heads": 2, "training": {"data": ["a"]}}),
    # As transformers 4.46 to 4.57 saves a Pythia model.
    ("neox", {"rotary_emb_base": 10000, "rope_theta": 10000, "partial_rotary_factor": 0.25}),
    ("olmo2", {"rotary_dims": None, "n_ctx": 5, "tags": ["a"], "head_count": 3}),
    ("llama-2", WINDOW),
    ("llama-2", WINDOW | {"use_sliding_window": True, "max_window_layers": 1}),
    ("olmo2", WINDOW | {"use_sliding_window": True, "max_window_layers": 0}),
    ("mistral-short-window", {"use_sliding_window": False, "max_window_layers": 2}),
    ("mistral-short-window", {"use_sliding_window": True, "max_window_layers": 1}),
    ("phi3-window", {"use_sliding_window": False, "max_window_layers": 2}),
    ("qwen2-short-window", {"use_sliding_window": False}),
    ("gemma3-yarn", {"original_max_position_embeddings": 5}),
    ("gemma3-long", {"original_max_position_embeddings": 5}),
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "change"), OTHER_FIELDS)
def test_a_field_is_read_where_transformers_reads_it_and_ignored_elsewhere(
    kind: str, change: dict[str, Any], open_both: Callable[[str], Pair], tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(open_both(kind).folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | change))
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(
        read_model(folder).model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=1e-4
    )
