"""A new Hugging Face family defined in one file can be loaded, sampled, trained and traced."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import randomized, small_config

from minigpt.checkpoint import families
from minigpt.checkpoint.model_folder import LoadedModel, read_model, write_model
from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError, ConfigError
from minigpt.generation.decoder import Decoder
from minigpt.model.layers import ACTIVATIONS
from minigpt.tracing.recorder import RowRecorder

FAMILY_FILE = '''
"""Toy: Llama with scaled embeddings and the squared sigmoid as activation."""

from dataclasses import replace

from minigpt.checkpoint.families import llama
from minigpt.model.gpt import GPT
from minigpt.model.layers import ACTIVATIONS

ACTIVATIONS["sigmoid2"] = lambda x: x.sigmoid().square()


class ToyGPT(GPT):
    """GPT whose embeddings are scaled by the square root of their width."""

    def embed(self, tokens):
        return self.embedding(tokens) * self.config.d_model**0.5


FAMILY = replace(
    llama.FAMILY,
    architecture="ToyForCausalLM",
    activations={"sigmoid_squared": "sigmoid2"},
    constants={"family": "llama"},
    model=ToyGPT,
)
'''
CONTEXT = 24


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, LoadedModel]]:
    """Return a model saved by transformers, opened by transformers and by minigpt."""
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")

    class ToyConfig(transformers.LlamaConfig):  # type: ignore[misc,name-defined]
        model_type = "toy"

    class ScaledEmbedding(torch.nn.Embedding):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return super().forward(tokens) * math.sqrt(self.embedding_dim)

    class SigmoidSquared(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.sigmoid(x) ** 2

    monkeypatch.setitem(transformers.activations.ACT2FN, "sigmoid_squared", SigmoidSquared)

    class ToyForCausalLM(transformers.LlamaForCausalLM):  # type: ignore[misc,name-defined]
        config_class = ToyConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
            self.post_init()

    config = ToyConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        hidden_act="sigmoid_squared",
        attn_implementation="eager",
    )
    theirs = ToyForCausalLM(config).eval()
    randomized(theirs)
    theirs.save_pretrained(tmp_path / "model")
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "toy.py").write_text(FAMILY_FILE)
    # As if the file were in the package.
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path / "families")])
    yield theirs, read_model(tmp_path / "model")
    del sys.modules[f"{families.__name__}.toy"], families.toy, ACTIVATIONS["sigmoid2"]


@pytest.fixture
def prompt() -> list[int]:
    return torch.randint(61, (9,), generator=torch.Generator().manual_seed(3)).tolist()


def test_a_family_defined_in_one_file_has_the_logits_of_transformers(
    toy: tuple[Any, LoadedModel],
) -> None:
    theirs, ours = toy
    tokens = torch.randint(61, (2, CONTEXT), generator=torch.Generator().manual_seed(3))
    assert type(ours.model).__name__ == "ToyGPT"
    with torch.inference_mode():
        # float32 products in another order
        torch.testing.assert_close(ours.model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_family_defined_in_one_file_generates_and_attends_as_in_transformers(
    toy: tuple[Any, LoadedModel], prompt: list[int]
) -> None:
    theirs, ours = toy
    recorder = RowRecorder(ours.model)
    decoder = Decoder(ours.model, prompt, recorder=recorder)
    assert type(decoder.forward).__name__ == "PlainForward"
    sequence = list(prompt)
    for step in decoder.generate(SamplingConfig(temperature=0.0, max_new_tokens=8), seed=0):
        reference = theirs(torch.tensor([sequence]), output_attentions=True)
        assert step.token == int(reference.logits[0, -1].argmax())
        rows = torch.stack([layer[0, :, -1] for layer in reference.attentions])
        torch.testing.assert_close(recorder.weights_LHS, rows, rtol=0, atol=1e-5)
        sequence.append(step.token)
    assert len(sequence) == len(prompt) + 8


def test_a_family_defined_in_one_file_is_trained_and_saved(
    toy: tuple[Any, LoadedModel], prompt: list[int], tmp_path: Path
) -> None:
    _, ours = toy
    optimizer = torch.optim.SGD(ours.model.parameters(), lr=0.1)
    tokens = torch.tensor([prompt])

    def loss() -> torch.Tensor:
        return F.cross_entropy(ours.model(tokens)[0, :-1], tokens[0, 1:])

    before = loss()
    before.backward()
    optimizer.step()
    assert loss() < before
    write_model(tmp_path / "again", ours.model, None)
    again = read_model(tmp_path / "again").model
    assert again.config == ours.model.config
    assert torch.equal(again(tokens), ours.model(tokens))


def test_a_family_without_its_own_file_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"unsupported model_type 'toy'.*llama, mistral"):
        families.family_of("toy")
    with pytest.raises(ConfigError, match="unknown model_type 'toy'"):
        small_config(model_type="toy")
