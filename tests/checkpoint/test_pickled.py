"""Models imported from pickles give the results of the programs that wrote them."""

import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layout_models import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.checkpoint.tools.pickled import import_pickled
from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.text.tokenizer import BytesTokenizer

TEXT = "Die Füße, a quiz\r\nwith 漢字.\n"
ARGS = {"n_layer": 2, "n_head": 3, "n_embd": 24, "block_size": 16, "dropout": 0.0}


def nanogpt_state(*, vocab_size: int, bias: bool, **args: Any) -> dict[str, Tensor]:
    """Return weights with the names and shapes of nanoGPT's GPT, with tied embeddings."""
    c, generator = args["n_embd"], torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocab_size, c), "wpe": (args["block_size"], c)}
    for i in range(args["n_layer"]):
        shapes |= {f"h.{i}.ln_1": (c,), f"h.{i}.attn.c_attn": (3 * c, c)}
        shapes |= {f"h.{i}.attn.c_proj": (c, c), f"h.{i}.ln_2": (c,)}
        shapes |= {f"h.{i}.mlp.c_fc": (4 * c, c), f"h.{i}.mlp.c_proj": (c, 4 * c)}
    shapes["ln_f"] = (c,)
    state = {}
    for name, shape in shapes.items():
        state[f"transformer.{name}.weight"] = torch.randn(shape, generator=generator) * 0.4
        if bias and name not in ("wte", "wpe"):
            state[f"transformer.{name}.bias"] = torch.randn(shape[:1], generator=generator) * 0.4
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nanogpt_logits(state: dict[str, Tensor], ids: Tensor, n_head: int, **gelu: str) -> Tensor:
    """Compute nanoGPT's forward pass from its weights, for one sequence, head by head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state.get(f"{name}.bias"))

    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][: len(ids)]
    for i in range(sum(".ln_1.weight" in name for name in state)):
        block = f"transformer.h.{i}"
        q, k, v = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", x)).chunk(3, dim=-1)
        heads = []
        for part in range(n_head):
            width = x.shape[-1] // n_head
            one = slice(part * width, (part + 1) * width)
            scores = q[:, one] @ k[:, one].t() / math.sqrt(width)
            mask = torch.ones_like(scores).tril() == 0
            heads.append(scores.masked_fill(mask, -torch.inf).softmax(-1) @ v[:, one])
        x = x + linear(f"{block}.attn.c_proj", torch.cat(heads, dim=-1))
        hidden = F.gelu(linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", x)), **gelu)
        x = x + linear(f"{block}.mlp.c_proj", hidden)
    return norm("transformer.ln_f", x) @ state["lm_head.weight"].t()


def save_nanogpt(path: Path, *, prefix: str = "", **args: Any) -> dict[str, Tensor]:
    """Write a ckpt.pt like nanoGPT's train.py, and return its weights."""
    args = ARGS | {"vocab_size": 50304, "bias": True} | args
    state = nanogpt_state(**args)
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in state.items()},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "model_args": args,
        "iter_num": 3,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "shakespeare_char", "compile": True},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return state


def our_logits(folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return read_model(folder).model(ids[None])[0]


@pytest.fixture(autouse=True)
def _ranks(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))


@pytest.mark.integration
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_an_imported_nanogpt_checkpoint_has_the_logits_of_nanogpt(
    bias: bool, prefix: str, tmp_path: Path
) -> None:
    state = save_nanogpt(tmp_path / "out" / "ckpt.pt", bias=bias, prefix=prefix)
    imported = import_pickled(tmp_path / "out", tmp_path / "model")
    assert imported.has_tokenizer
    ids = torch.randint(50304, (16,), generator=torch.Generator().manual_seed(2))
    expected = nanogpt_logits(state, ids, 3)
    torch.testing.assert_close(our_logits(tmp_path / "model", ids), expected, atol=1e-4, rtol=1e-4)
    loaded = read_model(resolve_model(str(tmp_path / "model")))
    assert loaded.model.config.tie_embeddings
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.name == "gpt2"
    assert loaded.tokenizer.encode("Hello world") == [15496, 995]


@pytest.mark.integration
def test_transformers_opens_an_imported_nanogpt_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")
    state = save_nanogpt(tmp_path / "ckpt.pt", bias=False)
    import_pickled(tmp_path / "ckpt.pt", tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(16)
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits, nanogpt_logits(state, ids, 3), atol=1e-4, rtol=1e-4)


@pytest.mark.integration
def test_an_old_nanogpt_checkpoint_with_masks_and_another_gelu_is_imported(tmp_path: Path) -> None:
    state = save_nanogpt(tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    del checkpoint["model_args"]["bias"]
    mask = torch.ones(1, 1, 16, 16).tril()
    checkpoint["model"] |= {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
    torch.save(checkpoint, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=False)
    import_pickled(tmp_path / "ckpt.pt", tmp_path / "model", activation="gelu_tanh")
    ids = torch.arange(16)
    expected = nanogpt_logits(state, ids, 3, approximate="tanh")
    torch.testing.assert_close(our_logits(tmp_path / "model", ids), expected, atol=1e-4, rtol=1e-4)


def test_characters_of_the_training_text_are_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "input.txt").write_bytes(TEXT.encode())
    characters = sorted(set((tmp_path / "input.txt").read_text(encoding="utf-8")))
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=len(characters))
    import_pickled(tmp_path / "ckpt.pt", tmp_path / "model", vocabulary=tmp_path / "input.txt")
    tokenizer = read_model(tmp_path / "model").tokenizer
    assert tokenizer is not None
    text = TEXT.replace("\r\n", "\n") * 3
    assert tokenizer.encode(text) == [characters.index(c) for c in text]  # as in prepare.py
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with pytest.raises(DataError, match="no token for the character 'J'"):
        tokenizer.encode("Judge")


def test_meta_pkl_is_never_opened(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=65)
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(ConfigError, match=r"has 65 tokens.*meta\.pkl.*never opened.*--vocabulary"):
        import_pickled(tmp_path / "ckpt.pt", tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


class Malicious:
    """An object whose pickle runs a command when loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_importing_a_pickle_runs_no_code(name: str, is_zip: bool, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    if name != "ckpt.pt":
        write_model(folder, make_model(259, "gpt2-tied"), BytesTokenizer())
        (folder / "model.safetensors").unlink()
    bomb = {"model": {"x": torch.ones(2)}, "model_args": Malicious(tmp_path / "ran")}
    torch.save(bomb, folder / name, _use_new_zipfile_serialization=is_zip)
    message = r"asks to run '\w+.system' when it is opened. Nothing was run"
    with pytest.raises(CheckpointError, match=message):
        import_pickled(folder, tmp_path / "model")
    assert not (tmp_path / "ran").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_plain_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"asks to run|has pickle protocol"):
        import_pickled(tmp_path / "ckpt.pt", tmp_path / "model")
    assert not (tmp_path / "ran").exists()


LAYOUTS = ["gpt2-tied", "gpt2-untied", "llama-grouped", "qwen3"]


def save_bins(folder: Path, layout: str, n_files: int, prefix: str = "") -> Tensor:
    """Write a folder of pickles like transformers 4, and return the model's logits."""
    model = make_model(259, layout)
    write_model(folder, model, BytesTokenizer())
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "extra.json").write_text("{}")
    if "lm_head.weight" not in tensors:  # transformers 4 stored tied embeddings twice
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    if layout.startswith("gpt2"):
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8)
    tensors = {prefix + name: tensor for name, tensor in tensors.items()}
    if n_files == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        files = [f"pytorch_model-{i + 1:05}-of-{n_files:05}.bin" for i in range(n_files)]
        weight_map = {name: files[i % n_files] for i, name in enumerate(tensors)}
        for file in files:
            torch.save({n: tensors[n] for n in tensors if weight_map[n] == file}, folder / file)
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with torch.no_grad():
        return model(torch.arange(20)[None])[0]


@pytest.mark.parametrize("n_files", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_pickles_is_converted_to_safetensors(
    layout: str, n_files: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")
    expected = save_bins(tmp_path / "old", layout, n_files)
    imported = import_pickled(tmp_path / "old", tmp_path / "new")
    assert imported.has_tokenizer
    assert torch.equal(our_logits(tmp_path / "new", torch.arange(20)), expected)
    for name in ("config.json", "tokenizer.json", "extra.json", "generation_config.json"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()
    assert not list((tmp_path / "new").glob("pytorch_model*"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    with torch.no_grad():
        logits = theirs(torch.arange(20)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_of_pickles_keeps_its_templates_and_licenses(tmp_path: Path) -> None:
    save_bins(tmp_path / "old", "gpt2-tied", 1)
    others = ("LICENSE", "additional_chat_templates/rag.jinja", "tokenizer.model", "qwen.tiktoken")
    for name in others:
        (tmp_path / "old" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "old" / name).write_text(name)
    import_pickled(tmp_path / "old", tmp_path / "new")
    assert all((tmp_path / "new" / name).read_text() == name for name in others)


def test_an_imported_pytorch_model_bin_has_the_logits_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers as the oracle")
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, "vocab_size": 50}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.config.save_pretrained(tmp_path / "old")
    torch.save(theirs.state_dict(), tmp_path / "old" / "pytorch_model.bin")
    imported = import_pickled(tmp_path / "old" / "pytorch_model.bin", tmp_path / "new")
    assert not imported.has_tokenizer
    ids = torch.arange(20)
    with torch.no_grad():
        logits = theirs(ids[None]).logits[0]
    torch.testing.assert_close(our_logits(tmp_path / "new", ids), logits, atol=1e-4, rtol=1e-4)


def test_a_pickle_is_imported_or_refused_by_its_protocol_without_warnings(tmp_path: Path) -> None:
    expected = save_bins(tmp_path / "old", next(iter(LAYOUTS)), 1)
    path = tmp_path / "old" / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    torch.save(state, path, pickle_protocol=3)
    import_pickled(tmp_path / "old", tmp_path / "new")
    assert torch.equal(our_logits(tmp_path / "new", torch.arange(20)), expected)
    torch.save(state, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"has pickle protocol 4.*default protocol"):
        import_pickled(tmp_path / "old", tmp_path / "other")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_name_prefix_of_torch_compile_is_removed(layout: str, tmp_path: Path) -> None:
    expected = save_bins(tmp_path / "old", layout, 1, prefix="_orig_mod.")
    import_pickled(tmp_path / "old", tmp_path / "new")
    assert torch.equal(our_logits(tmp_path / "new", torch.arange(20)), expected)
    tensors = load_file(tmp_path / "new" / "model.safetensors")
    compiled = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    (tmp_path / "new" / "manifest.json").unlink()
    save_file(compiled, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    assert torch.equal(our_logits(tmp_path / "new", torch.arange(20)), expected)
    twice = compiled | {next(iter(tensors)): next(iter(tensors.values())).clone()}
    save_file(twice, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="occurs twice"):
        read_model(tmp_path / "new")


def test_opening_a_folder_of_pickles_suggests_importing_it(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "out it" / "ckpt.pt")
    for spec in (tmp_path / "out it" / "ckpt.pt", tmp_path / "out it"):
        with pytest.raises(CheckpointError, match=r"`minigpt checkpoints import '.*out it/ckpt.pt"):
            resolve_model(str(spec))
    save_bins(tmp_path / "old", "gpt2-tied", 1)
    with pytest.raises(CheckpointError, match=r"`minigpt checkpoints import \S+old NEW_FOLDER`"):
        read_model(resolve_model(str(tmp_path / "old")))


def changed(path: Path, change: Callable[[dict[str, Any]], Any], **args: Any) -> None:
    save_nanogpt(path, **args)
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)


BAD = {
    "no model_args": (lambda c: c.pop("model_args"), "no model_args with its model"),
    "unknown": (lambda c: c["model_args"].update(n_kv_head=1), "no model_args 'n_kv_head'"),
    "lacks": (lambda c: c["model_args"].pop("n_head"), "model_args has no n_head"),
    "heads": (lambda c: c["model_args"].update(n_head=5), "n_head must divide"),
    "text": (lambda c: c["model_args"].update(n_layer="2"), "n_layer"),
    "layers": (lambda c: c["model_args"].update(n_layer=10**9), "10000000"),
    "more layers": (lambda c: c["model_args"].update(n_layer=3), "'transformer.h.2"),
    "missing": (
        lambda c: c["model"].pop("transformer.h.1.ln_2.bias"),
        "'transformer.h.1.ln_2.bias'",
    ),
    "extra": (lambda c: c["model"].update({"a.b": torch.ones(2)}), "a.b"),
    "width": (lambda c: c["model_args"].update(n_embd=48), "has shape"),
    "not tensors": (lambda c: c["model"].update(x=[1]), "'x' is not a dense tensor"),
    "scalar": (
        lambda c: c["model"].update({"transformer.ln_f.weight": torch.tensor(1.0)}),
        "'transformer.ln_f.weight' has shape",
    ),
    "integers": (
        lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(24, dtype=torch.int64)}),
        "is torch.int64",
    ),
    "list": (lambda c: c.update(model=[1]), "has no state_dict"),
}


@pytest.mark.parametrize("kind", BAD)
def test_an_invalid_checkpoint_is_refused_and_leaves_no_files(kind: str, tmp_path: Path) -> None:
    change, message = BAD[kind]
    changed(tmp_path / "ckpt.pt", change)
    with pytest.raises(CheckpointError, match=message) as error:
        import_pickled(tmp_path / "ckpt.pt", tmp_path / "model")
    assert ".writing-" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]


def test_damaged_and_missing_pickles_are_refused(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "ckpt.pt")
    data = (tmp_path / "ckpt.pt").read_bytes()
    for damaged in (data[: len(data) // 2], b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"hello"):
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        with pytest.raises(
            CheckpointError, match=r"not a complete torch|has no model_args|has no state_dict"
        ):
            import_pickled(tmp_path / "ckpt.pt", tmp_path / "model")
    with pytest.raises(CheckpointError, match="there is no"):
        import_pickled(tmp_path / "nowhere.pt", tmp_path / "model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="there is no"):
        import_pickled(tmp_path / "empty", tmp_path / "model")


def test_a_folder_without_a_whole_model_is_not_imported(tmp_path: Path) -> None:
    save_bins(tmp_path / "fsdp", "gpt2-tied", 1)
    (tmp_path / "fsdp" / "pytorch_model.bin").rename(tmp_path / "fsdp" / "training_args.bin")
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "peft").mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (tmp_path / "peft" / name).touch()
    for source, says in {
        "fsdp": "accelerate merge-weights",
        "fsdp/training_args.bin": "is a training state, not weights",
        "peft": "is an adapter",
        "peft/adapter_model.bin": "is an adapter",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            import_pickled(tmp_path / source, tmp_path / "model")


def test_vocabulary_options_are_checked(tmp_path: Path) -> None:
    save_nanogpt(tmp_path / "ckpt.pt", vocab_size=65)
    (tmp_path / "input.txt").write_text("abc")

    def refused(kind: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(kind, match=message):
            import_pickled(tmp_path / "ckpt.pt", tmp_path / "model", **options)

    text = tmp_path / "input.txt"
    refused(DataError, "has 3 different characters, but the model has 65 tokens", vocabulary=text)
    refused(DataError, "cannot be read as UTF-8", vocabulary=tmp_path / "ckpt.pt")
    refused(DataError, "cannot be read", vocabulary=tmp_path / "nowhere")
    refused(ConfigError, "are mutually exclusive", vocabulary=text, tokenizer="gpt2")
    refused(ConfigError, "gpt2 has 50257 tokens, but the model has 65", tokenizer="gpt2")
    refused(ConfigError, "train a new vocabulary", tokenizer="bpe:65")
    refused(ConfigError, "unknown tokenizer 'gpt3'", tokenizer="gpt3")
    save_bins(tmp_path / "old", "gpt2-tied", 1)
    with pytest.raises(ConfigError, match=r"are for ckpt.pt of nanoGPT.*leave them out"):
        import_pickled(tmp_path / "old", tmp_path / "model", tokenizer="gpt2")
    import_pickled(tmp_path / "old", tmp_path / "new")
    with pytest.raises(ConfigError, match="is already a model folder"):
        import_pickled(tmp_path / "new", tmp_path / "model")
