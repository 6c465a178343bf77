"""Model folders: what is written is read back to the bit; what is damaged is named."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.model_folder import read_config, read_model, write_model
from minigpt.errors import CheckpointError, ResourceError
from minigpt.model.gpt import GPT
from minigpt.text.tokenizer import bytes_tokenizer, train_bpe

TOKENS = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [9, 9, 8, 1, 0, 2, 2]])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_model_and_tokenizer_survive_the_round_trip_bit_for_bit(model: GPT, tmp_path: Path) -> None:
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


def test_model_is_read_in_the_dtype_asked_for_or_stored(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model.to(torch.bfloat16), None)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for dtype in (None, torch.float32):
        loaded = read_model(tmp_path, dtype=dtype)
        assert loaded.tokenizer is None
        for name, tensor in loaded.model.state_dict().items():
            assert tensor.dtype == (dtype or torch.bfloat16)
            assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))


def test_training_a_read_model_leaves_its_file_as_it_is(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model, None)
    before = (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for parameter in read_model(tmp_path).model.parameters():
            parameter.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_sharded_folder_is_read(model: GPT, tmp_path: Path) -> None:
    write_model(tmp_path, model, None)
    tensors = weights(tmp_path)
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(read_model(tmp_path).model(TOKENS), model(TOKENS))
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="does not map tensors to files of its folder"):
        read_model(tmp_path)


def test_published_gpt2_layout_is_read(shared: Path) -> None:
    folder = shared / "weights" / "gpt-nano-sort"
    model = read_model(folder).model
    # What the model is for: after six letters, it writes them sorted.
    tokens = torch.tensor([[2, 0, 1, 2, 1, 0]])
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        assert model(tokens)[0, 5:].argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]


def test_published_llama_layout_is_read(shared: Path) -> None:
    folder = shared / "weights" / "stories260K"
    model = read_model(folder).model
    assert sum(parameter.numel() for parameter in model.parameters()) == 260_032
    vocab = json.loads((folder / "sp_vocab.json").read_text())["tokens"]
    tokens = torch.tensor([[1]])  # the beginning of a text
    with torch.no_grad():
        for _ in range(30):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
    text = "".join(vocab[token] for token in tokens[0, 1:])
    assert text.startswith(" Once upon a time, there was a little girl named Lily.")


@pytest.fixture
def folder(make: Callable[[int, str], GPT], tmp_path: Path) -> Path:
    write_model(tmp_path, make(257, "gpt2-untied"), bytes_tokenizer())
    return tmp_path


def test_embedding_that_is_stored_twice_must_be_one(
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


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (99,)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def drop_tensor(folder: Path) -> None:
    tensors = weights(folder)
    del tensors["transformer.h.1.ln_1.bias"]
    save(folder, tensors)


def change_shape(folder: Path) -> None:
    tensors = weights(folder)
    tensors["transformer.h.1.ln_1.bias"] = torch.zeros(15)
    save(folder, tensors)


def write_false_shape(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    header = json.dumps({"\x1b[31m\n": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    r"config\.json is missing in .*`minigpt train`": lambda f: (f / "config.json").unlink(),
    r"config\.json' is not JSON": lambda f: (f / "config.json").write_text("{"),
    r"config\.json' must hold a JSON object": lambda f: (f / "config.json").write_text("[]"),
    r"config\.json' is not JSON: ": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    r"config\.json' is not JSON: \w": lambda f: (f / "config.json").write_text("[" * 10**5),
    r"model\.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    r"no whole safetensors file .*incomplete": truncate,
    r"no whole safetensors file": lambda f: (f / "model.safetensors").write_bytes(
        pickle.dumps(Bomb())
    ),
    r"safetensors' is no whole": lambda f: (f / "model.safetensors").write_bytes(b""),
    r"in 'pytorch_model\.bin', a pickle": pickle_weights,
    r"'transformer\.h\.1\.ln_1\.bias' is missing \(1 of 29": drop_tensor,
    r"'transformer\.extra' has no place": lambda f: save(f, weights(f) | {"extra": torch.zeros(1)}),
    r"'transformer\.h\.1\.ln_1\.bias' has shape \[15\], not \[16\]": change_shape,
    r"transformer\.wte\.weight' is there twice": lambda f: save(
        f, weights(f) | {"wte.weight": torch.zeros(1)}
    ),
    r"no whole safetensors file .*invalid shape": write_false_shape,
    r"is stored as I32": lambda f: save(f, {n: t.int() for n, t in weights(f).items()}),
    r"'transformer\.wpe\.weight' has shape \[32, 16\], not \[64, 16\]": lambda f: change_config(
        f, n_positions=64
    ),
    r"number of layers of 1000000000": lambda f: change_config(f, n_layer=10**9),
    r"vocabulary of 1000000000000": lambda f: change_config(f, vocab_size=10**12),
    r"context of 1000000000000": lambda f: change_config(f, n_positions=10**12),
    r"tokenizer\.json has the decoder": lambda f: (f / "tokenizer.json").write_text(
        '{"decoder": {"type": "WordPiece"}}'
    ),
    r"tokenizer\.json' is not JSON": lambda f: (f / "tokenizer.json").write_text(""),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_folder_is_refused_in_one_line(folder: Path, says: str) -> None:
    DAMAGES[says](folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_model(folder)
    assert caught.value.exit_code == 4
    assert str(caught.value).isprintable()


def test_tokenizer_that_outgrows_the_model_is_refused(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(256, "llama-tied"), bytes_tokenizer())
    with pytest.raises(CheckpointError, match="has 257 tokens, and the model only 256"):
        read_model(tmp_path)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="needs the limits of a POSIX system")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("n_bytes", [100, 20_000])  # stops config.json, then the weights
def test_write_that_the_system_refuses_is_a_resource_error(
    make: Callable[[int, str], GPT], tmp_path: Path, n_bytes: int
) -> None:
    with (
        pytest.raises(ResourceError, match=r"File too large\. Choose a disk") as caught,
        file_size_limit(n_bytes),
    ):
        write_model(tmp_path, make(257, "gpt2-untied"), None)
    assert caught.value.exit_code == 6
