"""Model folders: exact round trips, and published models."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_files import save, shard, weights

from minigpt.checkpoint.model_folder import read_config, read_model, write_model
from minigpt.checkpoint.rewriting import write_as
from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import CheckpointError
from minigpt.generation.decoder import Decoder
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 9, 8, 1, 0, 2, 2]])


def test_model_and_tokenizer_survive_saving_and_loading_bit_for_bit(
    model: GPT, tmp_path: Path
) -> None:
    tokenizer = train_bpe(["the cat and the hat"], 259)
    write_model(tmp_path, model, tokenizer)
    loaded = read_model(tmp_path)
    assert loaded.model.config == model.config == read_config(tmp_path)
    assert loaded.folder == tmp_path
    assert not loaded.model.training
    ours = model.state_dict()
    assert loaded.model.state_dict().keys() == ours.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, ours[name])
    assert all(parameter.requires_grad for parameter in loaded.model.parameters())
    assert torch.equal(loaded.model(TOKENS), model(TOKENS))
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.name == "bpe:259"
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint


def test_model_is_read_in_the_requested_or_stored_dtype(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model.to(torch.bfloat16), None)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (None, torch.float32):
        loaded = read_model(tmp_path, dtype=dtype)
        assert loaded.tokenizer is None
        for name, tensor in loaded.model.state_dict().items():
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))


def test_training_a_loaded_model_does_not_change_its_file(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model, None)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in read_model(tmp_path).model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_folder_with_sharded_weights_is_read(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model, None)
    shard(tmp_path, lambda name: f"model-0000{len(name) % 3 + 1}-of-00003.safetensors")
    assert torch.equal(read_model(tmp_path).model(TOKENS), model(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_dtype_are_converted(
    model: GPT, tmp_path: Path, dtype: torch.dtype
) -> None:
    write_model(tmp_path, model, None)
    save(tmp_path, {name: tensor.to(dtype) for name, tensor in weights(tmp_path).items()})
    for asked in (torch.float32, torch.bfloat16):
        for name, tensor in read_model(tmp_path, dtype=asked).model.state_dict().items():
            assert tensor.dtype == asked
            assert torch.equal(tensor, model.state_dict()[name].to(dtype).to(asked))


def test_a_published_model_in_the_gpt2_layout_is_read(shared: Path) -> None:
    folder = shared / "weights" / "gpt-nano-sort"
    model = read_model(folder).model
    # The model's task: after six letters, generate them sorted.
    tokens = torch.tensor([[2, 0, 1, 2, 1, 0]])
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        assert model(tokens)[0, 5:].argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]


def test_a_published_llama_model_generates_its_published_text(shared: Path) -> None:
    loaded = read_model(shared / "weights" / "stories260K")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 260_032
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    assert (tokenizer.end_of_text, tokenizer.end_of_text_ids) == (2, (2,))
    prompt = [*tokenizer.prefix, *tokenizer.encode("Once upon a time")]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=24)
    steps = Decoder(loaded.model, prompt).generate(sampling, seed=0)
    text = tokenizer.decode([step.token for step in steps])
    assert text.startswith(", there was a little girl named Lily.")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"config.json": 5, "generation_config.json": None}, (5,)),
        ({"config.json": 5, "generation_config.json": [6, 7]}, (6, 7)),
        ({"config.json": [256, 8], "generation_config.json": ...}, (256, 8)),
        ({"config.json": None, "generation_config.json": ...}, (256,)),
        ({"config.json": 5, "generation_config.json": [7, -1]}, (7,)),
    ],
)
def test_all_end_of_text_ids_are_read(
    folder: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    for name, ids in files.items():
        path = folder / name
        if ids is ...:
            path.unlink()
            continue
        settings = json.loads(path.read_text()) | {"eos_token_id": ids}
        path.write_text(json.dumps(settings))
    loaded = read_model(folder)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.end_of_text_ids == expected
    write_model(folder, loaded.model, loaded.tokenizer)
    for name in files:
        written = json.loads((folder / name).read_text())["eos_token_id"]
        assert written == (list(expected) if len(expected) > 1 else expected[0])
    again = read_model(folder).tokenizer
    assert again is not None
    assert again.end_of_text_ids == expected


PEAK = """
import sys
from pathlib import Path
import torch
from minigpt.checkpoint.model_folder import read_model

def kib(field):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))

dtype = getattr(torch, sys.argv[3])
read_model(Path(sys.argv[1]), dtype=dtype)
before = kib("VmRSS")
model = read_model(Path(sys.argv[2]), dtype=dtype).model
weights = sum(parameter.nbytes for parameter in model.parameters())
print((kib("VmHWM") - before) * 1024 / weights)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs /proc to read peak memory"
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_loading_needs_little_more_memory_than_the_weights(
    tmp_path: Path, family: str, stored: torch.dtype
) -> None:
    for name, width, vocab_size in (("small", 32, 64), ("large", 512, 16_000)):
        config = ModelConfig(
            vocab_size=vocab_size,
            context_length=256,
            n_layer=6,
            n_head=4,
            d_model=width,
            family=family,
        )
        write_model(tmp_path / name, GPT(config).to(stored), None)
    for dtype in ("float32", "bfloat16"):
        command = [sys.executable, "-c", PEAK, tmp_path / "small", tmp_path / "large", dtype]
        result = subprocess.run(command, capture_output=True, check=True, text=True)
        assert 0.9 < float(result.stdout) < 1.3


def test_tied_embeddings_that_are_stored_twice_must_be_equal(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    model = make(50, "gpt2-tied")
    write_model(tmp_path, model, None)
    tensors = weights(tmp_path)
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save(tmp_path, tensors)
    assert torch.equal(read_model(tmp_path).model(TOKENS), model(TOKENS))
    tensors["lm_head.weight"][3, 4] += 1
    save(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight"):
        read_model(tmp_path)


def test_weights_that_overflow_float16_are_saved_in_float32(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    model = make(50, "llama-tied")
    with torch.no_grad():
        model.final_norm.weight[0] = 70_000
    assert write_as(tmp_path, model, None, None, "float16")
    tensors = weights(tmp_path)
    assert tensors["model.norm.weight"].equal(model.final_norm.weight)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16
