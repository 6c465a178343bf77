"""minigpt.generate yields the steps of Decoder and stream_text, and rejects bad arguments early."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import small_model

import minigpt
from minigpt.checkpoint.model_folder import write_model
from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, MinigptError
from minigpt.generation import api, fast
from minigpt.generation.decoder import Decoder
from minigpt.generation.fast.prompts import PromptLinear
from minigpt.generation.samples import stream_samples
from minigpt.generation.stream import TextStep, stream_text
from minigpt.text.tokenizer import BytesTokenizer

BYTES = BytesTokenizer()
MODEL = small_model("gpt2", vocab_size=257, context_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    write_model(place, MODEL, BYTES)
    return place


def texts(items: list[TextStep]) -> list[str]:
    n = max(item.sample for item in items) + 1
    return ["".join(i.text for i in items if i.sample == sample) for sample in range(n)]


def test_generate_yields_the_steps_and_text_of_decoder_and_stream_text(folder: Path) -> None:
    config = SamplingConfig(max_new_tokens=20, temperature=1.2, stop=("a",), seed=4)
    steps = Decoder(MODEL, list(b"The king")).generate(config, seed=4, end_of_text=[256])
    expected = list(stream_text(steps, BYTES, ("a",)))
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.2, "stop": ["a"], "seed": 4}
    for model in (folder, str(folder)):
        assert list(minigpt.generate(model, "The king", **options)) == expected
    loaded = {"tokenizer": BYTES, **options}
    assert list(minigpt.generate(MODEL, "The king", **loaded)) == expected
    assert list(minigpt.generate(MODEL, list(b"The king"), **loaded)) == expected


def test_an_empty_prompt_starts_a_document() -> None:
    options: dict[str, Any] = {"tokenizer": BYTES, "max_new_tokens": 5, "seed": 1}
    assert list(minigpt.generate(MODEL, **options)) == list(
        minigpt.generate(MODEL, [256], **options)
    )


def test_each_of_several_samples_equals_a_single_sample_with_its_seed() -> None:
    options: dict[str, Any] = {"tokenizer": BYTES, "max_new_tokens": 30, "temperature": 9.0}
    stops = list("aeiou .")
    items = list(minigpt.generate(MODEL, "x", num_samples=6, seed=10, stop=stops, **options))
    for sample in range(6):
        single = list(minigpt.generate(MODEL, "x", seed=10 + sample, stop=stops, **options))
        mine = [item for item in items if item.sample == sample]
        assert texts([*mine])[sample] == texts(single)[0]
        assert [i.step.token for i in mine] == [i.step.token for i in single]
        assert mine[-1].step.finish == single[-1].step.finish
    finishes = {item.step.finish for item in items} - {None}
    assert "stop" in finishes
    assert len({max(i.step.index for i in items if i.sample == n) for n in range(6)}) > 2


def test_weights_are_laid_out_for_all_samples_together(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row would use the compiled graph in the cache; several use the eager step."""
    monkeypatch.setattr(fast, "is_default", lambda model: True)
    models = []
    monkeypatch.setattr(api, "make_decoder", lambda model, *_, **__: models.append(model))
    for num_samples in (1, 2):
        minigpt.generate(folder, "x", num_samples=num_samples, device="cpu")
    is_graph = [any(type(m) is PromptLinear for m in model.modules()) for model in models]
    assert is_graph == [True, False]


def test_more_samples_than_rows_are_decoded_in_several_batches() -> None:
    config = SamplingConfig(max_new_tokens=6, temperature=1.5, num_samples=5)
    whole = Decoder(MODEL, [3], max_new_tokens=6, n_rows=5)
    parts = Decoder(MODEL, [3], max_new_tokens=6, n_rows=2)
    expected = list(stream_samples(whole, BYTES, config, seed=1))
    items = list(stream_samples(parts, BYTES, config, seed=1))
    assert texts(items) == texts(expected)
    assert [item.sample for item in items] == [0, 1] * 6 + [2, 3] * 6 + [4] * 6


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (MODEL, {}, ConfigError, "Pass tokenizer as well."),
        (MODEL, {"tokenizer": BYTES, "tempurature": 1}, ConfigError, "Did you mean temperature?"),
        (MODEL, {"tokenizer": BYTES, "top_p": 2.0}, ConfigError, "top_p must be in (0, 1]"),
        (
            MODEL,
            {"tokenizer": BYTES, "prompt": "x" * 99},
            DataError,
            "99 tokens, but the model sees",
        ),
        (
            MODEL,
            {"tokenizer": BYTES, "prompt": ["x", "x" * 99]},
            DataError,
            "99 tokens, but the model sees",
        ),
        (MODEL, {"tokenizer": BYTES, "prompt": []}, DataError, "the prompt is empty"),
        (MODEL, {"tokenizer": BYTES, "prompt": [-1]}, DataError, "the token id -1"),
        (MODEL, {"tokenizer": BYTES, "prompt": [9999]}, DataError, "the token id 9999"),
        ("no/such/place", {}, CheckpointError, "no/such/place"),
        ("folder", {"quantize": "int3"}, ConfigError, "int3"),
        ("folder", {"device": "gpu"}, ConfigError, "gpu"),
    ],
)
def test_invalid_arguments_raise_immediately(
    folder: Path, model: Any, options: dict[str, Any], error: type[MinigptError], said: str
) -> None:
    with pytest.raises(error) as caught:
        minigpt.generate(folder if model == "folder" else model, **options)
    assert said in str(caught.value)


@pytest.mark.integration
def test_the_package_imports_no_torch_until_it_is_used() -> None:
    program = (
        "import sys, minigpt\n"
        "assert not {'torch', 'numpy', 'minigpt.generation'} & set(sys.modules)\n"
        "assert minigpt.generate.__module__ == 'minigpt.generation.api'\n"
        "assert 'torch' in sys.modules\n"
        "try:\n    minigpt.nothing\n"
        "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
        "else:\n    raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_global_random_state_is_unchanged() -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    list(minigpt.generate(MODEL, "x", tokenizer=BYTES, max_new_tokens=3))
    assert torch.equal(torch.random.get_rng_state(), state)
