"""Models are found by path, by name, or by default."""

import os
from pathlib import Path

import pytest
import torch
from run_steps import assert_complete, write_step
from safetensors.torch import save_file

from minigpt.checkpoint import resolve
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.resolve import models_in, resolve_model
from minigpt.errors import CheckpointError


def test_a_model_is_found_by_path_step_and_name(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run.path.parent
    with run.lock():
        write_step(run, 3, val_loss=1.8)  # newer, but worse than step 2
    plain = tmp_path / "gpt2"
    plain.mkdir()
    (plain / "config.json").write_text("{}")
    assert resolve_model(str(run.path), root) == run.step_folder(2)
    assert resolve_model("tales", root) == run.step_folder(2)
    assert resolve_model(str(run.step_folder(1)), root) == run.step_folder(1)
    assert resolve_model(str(plain), root) == plain
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tales").mkdir()  # a folder of texts is not a model, so it hides no run
    assert resolve_model("tales", root) == run.step_folder(2)
    assert resolve_model("gpt2", root) == Path("gpt2")


def test_the_default_model_is_the_newest_run_or_the_bundled_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve_model(None, tmp_path / "nowhere") == resolve.shipped_model()
    monkeypatch.setattr(resolve, "shipped_model", lambda: None)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere.*`minigpt train`"):
        resolve_model(None, tmp_path / "nowhere")
    shipped = tmp_path / "a-shipped"
    shipped.mkdir()
    (shipped / "config.json").write_text("{}")
    (tmp_path / "z-empty-run").mkdir()
    assert resolve_model(None, tmp_path) == shipped
    for age, name in enumerate(["newest", "older"]):
        run = RunFolder(tmp_path / name)
        with run.lock():
            write_step(run, 5)
        os.utime(run.step_folder(5) / "manifest.json", ns=(0, 10**18 - age * 10**9))
    assert resolve_model(None, tmp_path) == tmp_path / "newest" / "step-000005"


def test_an_unknown_name_gets_a_local_folder_and_the_bundled_model_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("letters").mkdir()
    Path("letters/config.json").write_text("{}")
    for spec, meant in {"lettres": "letters", "storyteler": "storyteller"}.items():
        with pytest.raises(CheckpointError, match=rf"Did you mean {meant}\?"):
            resolve_model(spec, tmp_path / "nowhere")


def test_an_unknown_name_gets_the_nearest_run_suggested(run: RunFolder, tmp_path: Path) -> None:
    root = run.path.parent
    (root / "empty").mkdir()
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text("{}")
    (root / "\x1b[31mtails").mkdir()
    (root / "\x1b[31mtails" / "config.json").write_text("{}")
    for spec, says in {
        "tails": "there is no model 'tails' in .*Did you mean tales",
        str(tmp_path / "tals"): "there is no model .*Did you mean tales",
        "empty": "contains no checkpoint.*Choose from tales",
        "lora": "lora' is an adapter .LoRA. of another model. .* merge_and_unload",
        "\x1b[31m" + "x" * 5000: r"there is no model '\\x1b\[31mxx",
        "nul\0": r"there is no model 'nul\\x00'",
    }.items():
        with pytest.raises(CheckpointError, match=says) as caught:
            resolve_model(spec, root)
        assert caught.value.exit_code == 4
        assert len(str(caught.value)) < 400
    with pytest.raises(CheckpointError, match=r"there is no model 'x' .*`minigpt train`"):
        resolve_model("x", tmp_path / "nowhere")


def test_a_model_file_of_another_format_is_refused_with_a_remedy(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "alone.safetensors")
    files = {
        "m.gguf": b"GGUF\3\0\0\0",
        "blob": b"GGUF",
        "tf_model.h5": b"\x89HDF",
        "a.txt": b"hello",
    }
    (tmp_path / "folder").mkdir()
    for name, data in (files | {"folder/m.gguf": b"GGUF"}).items():
        (tmp_path / name).write_bytes(data)
    for name, says in {
        "m.gguf": "m.gguf' is a GGUF file, .* gguf_file=",
        "blob": "blob' is a GGUF file",
        "folder": "folder/m.gguf' is a GGUF file",
        "alone.safetensors": "alone.safetensors' contains only weights. .*config.json",
        "tf_model.h5": "tf_model.h5' has weights for another framework",
        "a.txt": "a.txt' is not a folder",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            resolve_model(str(tmp_path / name), tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="Name the model's folder"):
        resolve_model(str(tmp_path / "alone.safetensors"), tmp_path / "nowhere")


def make_files(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{"model_type": "llama"}')


def test_a_folder_of_another_program_is_refused_with_a_remedy(tmp_path: Path) -> None:
    state = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
    names = ["adapter_config.json", "adapter_model.safetensors", *state]
    make_files(tmp_path, *(f"peft/checkpoint-500/{name}" for name in names))
    steps = (500, 1000, 1500, 2000)
    make_files(tmp_path, *(f"trainer/checkpoint-{step}/config.json" for step in steps))
    make_files(tmp_path, "trainer/training_args.bin", "hub/models--a--b/snapshots/0a1/config.json")
    make_files(
        tmp_path, "page/node/package.json", "words/tokenizer.json", "alone/model.safetensors"
    )
    make_files(tmp_path, "fsdp/pytorch_model_fsdp_0/.metadata", "fsdp/optimizer.bin")
    (tmp_path / "page" / "node" / "config.json").write_text("{}")
    for spec, says in {
        "peft/checkpoint-500": "peft/checkpoint-500' is an adapter .LoRA",
        "peft": "peft/checkpoint-500' is an adapter .LoRA",
        "peft/checkpoint-500/adapter_model.safetensors": "checkpoint-500' is an adapter .LoRA",
        "peft/checkpoint-500/optimizer.pt": "optimizer.pt' is a training state, not weights",
        "trainer": r"folders: \S+checkpoint-2000, \S+checkpoint-1500, \S+checkpoint-1000, \.\.\.",
        "hub": r"folders: \S+/hub/models--a--b/snapshots/0a1\.$",
        "hub/models--a--b": r"folders: \S+/hub/models--a--b/snapshots/0a1\.$",
        "page": "contains no checkpoint",
        "words": "words' has a tokenizer but no model",
        "alone": "alone' has weights but no config.json",
        "fsdp": r"accelerate merge-weights \S+/fsdp/pytorch_model_fsdp_0 \S+/fsdp`",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            resolve_model(str(tmp_path / spec), tmp_path / "nowhere")


def test_an_unfinished_model_is_not_listed(run: RunFolder) -> None:
    half = run.path.with_name(".writing-tales-mean")
    half.mkdir()
    (half / "config.json").write_text("{}")
    assert models_in(run.path.parent) == [run.path]


def test_an_unfinished_step_is_refused(run: RunFolder) -> None:
    half = run.path / ".writing-step-000003"
    half.mkdir()
    (half / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="was not finished"):
        resolve_model(str(half))
    with run.lock():
        assert_complete(run, 2)
