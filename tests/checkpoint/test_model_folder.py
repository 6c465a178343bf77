"""Model folders: round trips are exact, and errors name what is damaged."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.model_folder import read_config, read_model, write_model
from minigpt.config import ModelConfig, SamplingConfig
from minigpt.errors import CheckpointError, ResourceError
from minigpt.generation.decoder import Decoder
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import BytesTokenizer

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


def shard(folder: Path, place: Callable[[str], str]) -> None:
    """Move each tensor of a folder to the file that ``place`` returns."""
    tensors = weights(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        shards.setdefault(place(name), {})[name] = tensor
    for shard, held in shards.items():
        save_file(held, folder / shard)
    (folder / "model.safetensors").unlink()
    write_index(folder, {name: place(name) for name in tensors})


def write_index(folder: Path, weight_map: Any) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded_folder_is_read(model: GPT, tmp_path: Path) -> None:
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


def test_published_gpt2_layout_is_read(shared: Path) -> None:
    folder = shared / "weights" / "gpt-nano-sort"
    model = read_model(folder).model
    # What the model is for: after six letters, it writes them sorted.
    tokens = torch.tensor([[2, 0, 1, 2, 1, 0]])
    with torch.no_grad():
        for _ in range(5):
            tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), dim=1)
        assert model(tokens)[0, 5:].argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]


def test_published_llama_model_continues_its_text(shared: Path) -> None:
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
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from /proc")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_reading_takes_little_more_memory_than_the_weights(
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


@pytest.fixture
def folder(make: Callable[[int, str], GPT], tmp_path: Path) -> Path:
    write_model(tmp_path, make(257, "gpt2-untied"), BytesTokenizer())
    return tmp_path


def test_tied_embedding_that_is_stored_twice_must_be_equal(
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
    assert write_model(tmp_path, model, None, dtype=torch.float16)
    tensors = weights(tmp_path)
    assert tensors["model.norm.weight"].equal(model.final_norm.weight)
    assert tensors["model.embed_tokens.weight"].dtype == torch.float16


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


def index_of(weight_map: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        write_index(folder, weight_map)

    return damage


def shard_twice(folder: Path) -> None:
    tensors = weights(folder)
    shard(folder, lambda name: "one.safetensors" if "wte" in name else "two.safetensors")
    save_file(tensors, folder / "two.safetensors")


def lose_shard(folder: Path) -> None:
    shard(folder, lambda name: "one.safetensors" if "wte" in name else "two.safetensors")
    (folder / "two.safetensors").unlink()


def pickle_shard(folder: Path) -> None:
    lose_shard(folder)
    (folder / "two.safetensors").write_bytes(pickle.dumps(Bomb()))


def claim_huge_tensors(folder: Path) -> None:
    """A header of a petabyte, in a file of a few bytes."""
    entry = {"dtype": "F32", "shape": [2**24, 2**24], "data_offsets": [0, 2**50]}
    header = json.dumps({"transformer.wte.weight": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)


def write_false_shape(folder: Path) -> None:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    header = json.dumps({"\x1b[31m\n": entry}).encode()
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def leave_pointer(name: str) -> Callable[[Path], Any]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n"
    return lambda folder: (folder / name).write_text(pointer)


def rename_weights(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    r"config\.json is missing in .*`minigpt train`": lambda f: (f / "config.json").unlink(),
    r"config\.json' is not JSON": lambda f: (f / "config.json").write_text("{"),
    r"config\.json' must hold a JSON object": lambda f: (f / "config.json").write_text("[]"),
    r"config\.json' is not JSON: ": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"),
    r"config\.json' is not JSON: \w": lambda f: (f / "config.json").write_text("[" * 10**5),
    r"model\.safetensors is missing": lambda f: (f / "model.safetensors").unlink(),
    r"not a complete safetensors file .*incomplete": truncate,
    r"not a complete safetensors file": lambda f: (f / "model.safetensors").write_bytes(
        pickle.dumps(Bomb())
    ),
    r"safetensors' is not a complete": lambda f: (f / "model.safetensors").write_bytes(b""),
    r"in 'pytorch_model\.bin', a pickle": pickle_weights,
    r"'transformer\.h\.1\.ln_1\.bias' is missing \(1 of 29": drop_tensor,
    r"'transformer\.extra' is not in the model": lambda f: save(
        f, weights(f) | {"extra": torch.zeros(1)}
    ),
    r"'transformer\.h\.1\.ln_1\.bias' has shape \[15\], not \[16\]": change_shape,
    r"transformer\.wte\.weight' occurs twice": lambda f: save(
        f, weights(f) | {"wte.weight": torch.zeros(1)}
    ),
    r"not a complete safetensors file .*invalid shape": write_false_shape,
    r"is stored as I32.* before it was quantized": lambda f: save(
        f, {n: t.int() for n, t in weights(f).items()}
    ),
    r"model\.safetensors' is not a .* Git LFS pointer: run `git lfs pull`": leave_pointer(
        "model.safetensors"
    ),
    r"tokenizer\.json' cannot be read: it is a Git LFS": leave_pointer("tokenizer.json"),
    r"its weights are in 'model\.fp16\.safetensors'\. Rename that": rename_weights(
        "model.fp16.safetensors"
    ),
    r"parts such as 'model-00001-of-00002\.safetensors'\. Write or download": rename_weights(
        "model-00001-of-00002.safetensors"
    ),
    r"'transformer\.wpe\.weight' has shape \[32, 16\], not \[64, 16\]": lambda f: change_config(
        f, n_positions=64
    ),
    r"tie_word_embeddings is true, but lm_head": lambda f: change_config(
        f, tie_word_embeddings=True
    ),
    r"unknown field 'logit_scale' with value 2": lambda f: change_config(f, logit_scale=2),
    r"has shape \[257, 16\], not \[257, 268435456\]": lambda f: change_config(f, n_embd=2**28),
    r"index\.json' does not map tensors": index_of({"a": "../outside.safetensors"}),
    r"index\.json' does not map tensors to": index_of({"a": "/etc/outside.safetensors"}),
    r"index\.json' does not map tensors to f": index_of({"a": "..\\outside.safetensors"}),
    r"index\.json' does not map tensors to fi": index_of({"a": 5}),
    r"index\.json' does not map tensors to fil": index_of([]),
    r"index\.json' does not map tensors to file": index_of({"a": ["outside.safetensors"]}),
    r"/\.\.' is not a complete safetensors file": index_of({"a": ".."}),
    r"transformer\.wpe\.weight' is in '.*one|two": shard_twice,
    r"two\.safetensors' is not a complete safetensors file .*No such file": lose_shard,
    r"two\.safetensors' is not a complete safetensors file": pickle_shard,
    r"not a complete safetensors file .*(incomplete|Invalid|offset)": claim_huge_tensors,
    r"the eos_token_id of .* is '\[True\]', and not an id": lambda f: (
        f / "generation_config.json"
    ).write_text('{"eos_token_id": [true]}'),
    r"n_layer must be in .* it is 1000000000": lambda f: change_config(f, n_layer=10**9),
    r"vocab_size must be in .* it is 1000000000000": lambda f: change_config(f, vocab_size=10**12),
    r"context_length must be in .* it is 1000000000000": lambda f: change_config(
        f, n_positions=10**12
    ),
    r"tokenizer\.json is damaged": lambda f: (f / "tokenizer.json").write_text(
        '{"decoder": {"type": "WordPiece"}}'
    ),
    r"tokenizer\.json' is not JSON": lambda f: (f / "tokenizer.json").write_text(""),
}


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Limit further allocations to 256 MiB."""
    resource = pytest.importorskip("resource", reason="needs the limits of a POSIX system")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    if not pages:
        pytest.skip("reads its memory from /proc")
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**28, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("says", DAMAGES)
def test_damaged_folder_is_a_one_line_error(folder: Path, says: str) -> None:
    DAMAGES[says](folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_model(folder)
    assert caught.value.exit_code == 4
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("little_memory")
def test_config_with_wrong_sizes_allocates_little_memory(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(50, "llama-grouped"), None)
    change_config(tmp_path, head_dim=2**20, max_position_embeddings=2**20)
    with pytest.raises(CheckpointError, match=r"has shape \[8, 16\], not \[2097152, 16\]"):
        read_model(tmp_path)


def test_tokenizer_larger_than_the_model_is_refused(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(256, "llama-tied"), train_bpe(["the owl and the nest " * 9], 262))
    with pytest.raises(CheckpointError, match="and the model only 256"):
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
def test_failed_write_is_a_resource_error(
    make: Callable[[int, str], GPT], tmp_path: Path, n_bytes: int
) -> None:
    with (
        pytest.raises(ResourceError, match=r"File too large\. Raise the limit") as caught,
        file_size_limit(n_bytes),
    ):
        write_model(tmp_path, make(257, "gpt2-untied"), None)
    assert caught.value.exit_code == 6
