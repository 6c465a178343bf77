"""Damaged model folders and failing writes give errors that name the cause."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from folder_files import change_config, save, shard, weights, write_index
from safetensors.torch import save_file

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.errors import CheckpointError, MinigptWarning, ResourceError
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe


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


def delete_shard(folder: Path) -> None:
    shard(folder, lambda name: "one.safetensors" if "wte" in name else "two.safetensors")
    (folder / "two.safetensors").unlink()


def pickle_shard(folder: Path) -> None:
    delete_shard(folder)
    (folder / "two.safetensors").write_bytes(pickle.dumps(Bomb()))


def claim_huge_tensors(folder: Path) -> None:
    """Write a header that claims a petabyte in a file of a few bytes."""
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


def write_lfs_pointer(name: str) -> Callable[[Path], Any]:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 1234\n"
    return lambda folder: (folder / name).write_text(pointer)


def rename_weights(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name)


def leave_only(*names: str) -> Callable[[Path], Any]:
    """Replace the weights by empty files, or by a folder if the name ends with a slash."""

    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        for name in names:
            (folder / name).mkdir() if name.endswith("/") else (folder / name).touch()

    return damage


def become(architecture: str, name: str) -> Callable[[Path], Any]:
    """Add a tensor that only models with another head have."""

    def damage(folder: Path) -> None:
        change_config(folder, architectures=[architecture])
        save(folder, weights(folder) | {name: torch.zeros(3, 16)})

    return damage


def take_for_a_model(folder: Path) -> None:
    """Rename an adapter's weights as if they were a model's."""
    (folder / "adapter_config.json").touch()
    save(folder, {"base_model.model.transformer.h.0.attn.c_attn.lora_A.weight": torch.zeros(1)})


STATE = ("optimizer.pt", "rng_state_0.pth", "scaler.pt", "scheduler.pt", "training_args.bin")
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
    r"do not fit config\.json: 'extra' is not in the model \(1 of 30 are not": lambda f: save(
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
    r"is an adapter .LoRA. of another model": leave_only(
        "adapter_config.json", "adapter_model.safetensors", *STATE
    ),
    r"is an adapter .LoRA. of another model\. Merge": take_for_a_model,
    r"^model\.safetensors is missing in '[^']*'\. Write": leave_only(*STATE),
    r"accelerate merge-weights \S+/pytorch_model_fsdp_0 ": leave_only(
        "pytorch_model_fsdp_0/", *STATE
    ),
    r"python \S+/zero_to_fp32\.py \S+ \S+ --safe_serialization`": leave_only(
        "global_step500/", "zero_to_fp32.py", *STATE
    ),
    r"in 'pytorch_model\.bin', .* import \S+ NEW_FOLDER": leave_only("pytorch_model.bin", *STATE),
    r"in 'my\.bin', .* import \S+/my\.bin NEW_FOLDER": leave_only("my.bin", *STATE),
    r"is missing.* and so is pytorch_model\.bin\.index\.json": leave_only(
        "pytorch_model-00001-of-00002.bin"
    ),
    r"is a GPT2ForX, but minigpt needs a GPT2LMHeadModel: 'score\.weight' is not": become(
        "GPT2ForX", "score.weight"
    ),
    r"config\.json': the weights are stored quantized \(gptq\)\. Use the model from": lambda f: (
        change_config(f, quantization_config={"bits": 4, "quant_method": "gptq"})
    ),
    r"model\.safetensors' is not a .* Git LFS pointer: run `git lfs pull`": write_lfs_pointer(
        "model.safetensors"
    ),
    r"tokenizer\.json' cannot be read: it is a Git LFS": write_lfs_pointer("tokenizer.json"),
    r"its weights are in 'model\.fp16\.safetensors'\. Rename that": rename_weights(
        "model.fp16.safetensors"
    ),
    r"shards such as 'model-00001-of-00002\.safetensors'\. Write or download": rename_weights(
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
    r"two\.safetensors' is not a complete safetensors file .*No such file": delete_shard,
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
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if os.path.exists("/proc") else 0
    if not pages:
        pytest.skip("needs /proc to read memory use")
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + 2**28, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_model_folder_is_a_one_line_error(folder: Path, says: str) -> None:
    DAMAGES[says](folder)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_model(folder)
    assert caught.value.exit_code == 4
    assert str(caught.value).isprintable()


def test_an_adapter_beside_a_complete_model_is_not_applied_with_a_warning(folder: Path) -> None:
    alone = read_model(folder).model
    (folder / "adapter_config.json").write_text("{}")
    with pytest.warns(MinigptWarning, match="adapter .LoRA. in .* is not applied") as caught:
        beside = read_model(folder).model
    assert len(caught) == 1
    assert all(map(torch.equal, alone.parameters(), beside.parameters()))


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mamba"},
        {"model_type": None},
        {"hidden_size": None},
        {"hidden_size": "wide"},
        {"hidden_size": 2**40},
        {"hidden_act": "relu6"},
        {"rope_scaling": {"rope_type": "linear"}},
        {"norm_scale": 2},
    ],
)
def test_an_error_about_config_json_names_its_folder(
    change: dict[str, Any], make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(50, "llama-grouped"), None)
    change_config(tmp_path, **change)
    with pytest.raises(CheckpointError) as caught:
        read_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.usefixtures("little_memory")
def test_a_config_with_wrong_sizes_allocates_little_memory(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(50, "llama-grouped"), None)
    change_config(tmp_path, head_dim=2**20, max_position_embeddings=2**20)
    with pytest.raises(CheckpointError, match=r"has shape \[8, 16\], not \[2097152, 16\]"):
        read_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(
    make: Callable[[int, str], GPT], tmp_path: Path
) -> None:
    write_model(tmp_path, make(256, "llama-tied"), train_bpe(["the owl and the nest " * 9], 262))
    with pytest.raises(CheckpointError, match="and the model only 256"):
        read_model(tmp_path)


@contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    resource = pytest.importorskip("resource", reason="needs POSIX resource limits")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("n_bytes", [100, 20_000])  # stops config.json, then the weights
def test_a_failed_write_is_a_resource_error(
    make: Callable[[int, str], GPT], tmp_path: Path, n_bytes: int
) -> None:
    with (
        pytest.raises(ResourceError, match=r"File too large\. Raise the limit") as caught,
        file_size_limit(n_bytes),
    ):
        write_model(tmp_path, make(257, "gpt2-untied"), None)
    assert caught.value.exit_code == 6
