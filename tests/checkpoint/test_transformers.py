"""transformers reads folders that we write, and we read those that it writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers_models import CONTEXT, TOKENS, Pair, has_long_rope

from minigpt.checkpoint.model_folder import WEIGHTS, read_model, write_model
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import Tokenizer

TEXT = "It's the cat's\n\n  12345 hats, déjà-vu! <b> \t I'LL don't"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat's hat and the cats' hats, 12345 times!", TEXT], 259)


def load(transformers: Any, folder: Path) -> tuple[Any, Any]:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return theirs.eval(), transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_transformers_computes_the_same_logits_from_our_folder(
    transformers: Any, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_model(tmp_path, model, tokenizer)
    theirs, their_tokenizer = load(transformers, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [type(theirs).__name__] == config["architectures"]
    ids = tokenizer.encode(TEXT)
    assert their_tokenizer(TEXT).input_ids == ids
    assert their_tokenizer.decode(ids) == TEXT
    assert their_tokenizer.eos_token_id == theirs.config.eos_token_id == tokenizer.end_of_text
    assert theirs.generation_config.eos_token_id == tokenizer.end_of_text
    tokens = torch.tensor([ids[:20]])
    with torch.no_grad():
        # float32 sums in another order; the logits are about 10.
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


def test_a_folder_that_transformers_saved_is_read(
    transformers: Any, model: GPT, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_model(tmp_path / "ours", model, tokenizer)
    for part in load(transformers, tmp_path / "ours"):
        part.save_pretrained(tmp_path / "theirs")
    loaded = read_model(tmp_path / "theirs")
    assert loaded.model.config == model.config
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_a_loaded_and_saved_model_has_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    write_model(tmp_path, pair.ours.model, None)
    before, after = load_file(pair.folder / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
    assert read_model(tmp_path).model.config == pair.ours.model.config


OMITTED_FIELDS = {
    "_name_or_path",
    "_sliding_window_pattern",  # layer_types and no_rope_layers are written instead
    "sliding_window_pattern",
    "no_rope_layer_interval",
    "pad_token_id",
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",  # belongs to the tokenizer, which these models do not have
    "eos_token_id",
    "max_window_layers",
    "resid_pdrop",
    "embd_pdrop",
    "transformers_version",
}


def test_a_loaded_and_saved_config_is_equal(pair: Pair, tmp_path: Path) -> None:
    write_model(tmp_path, pair.ours.model, None)
    again = type(pair.theirs.config).from_pretrained(tmp_path).to_dict()
    expected = pair.theirs.config.to_dict()
    if expected.get("sliding_window") == CONTEXT or pair.folder.name == "qwen2-window-nowhere":
        # A window as long as the context, or in no layer, has no effect and is not written.
        expected |= {"sliding_window": None, "use_sliding_window": again.get("use_sliding_window")}
    if has_long_rope(pair) or pair.ours.model.config.rope_scaling == "yarn":
        # Derived values are written explicitly.
        given, written = expected["rope_parameters"], again["rope_parameters"]
        if "full_attention" in given:
            given, written = given["full_attention"], written["full_attention"]
        given |= written | {k: given[k] for k in given if "mscale" not in k}
        for key in [key for key in given if "mscale" in key]:
            del given[key]
    for width, of in (("n_inner", "n_embd"), ("intermediate_size", "hidden_size")):
        if expected.get(width, 0) is None:
            expected[width] = 4 * expected[of]
    different = {key for key in expected if expected[key] != again.get(key)}
    assert different <= OMITTED_FIELDS


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2-tied", "llama-tied", "opt"])
def test_a_base_model_without_a_head_is_read(
    open_both: Callable[[str], Pair], tmp_path: Path, kind: str
) -> None:
    pair = open_both(kind)
    pair.theirs.base_model.save_pretrained(tmp_path)  # its tensor names have no prefix
    assert not any(name.startswith(("model.", "transformer.")) for name in names_in(tmp_path))
    expected = pair.ours.model(TOKENS)
    assert torch.equal(read_model(tmp_path).model(TOKENS), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["neox", "neox-serial", "opt-untied", "llama-2"])
def test_a_state_dict_of_transformers_is_read(
    open_both: Callable[[str], Pair], tmp_path: Path, kind: str
) -> None:
    pair = open_both(kind)
    pair.theirs.config.save_pretrained(tmp_path)
    # The output projection of GPT-NeoX is lm_head.weight here, and embed_out.weight in files.
    tensors = {name: tensor.clone() for name, tensor in pair.theirs.state_dict().items()}
    assert "lm_head.weight" in tensors
    save_file(tensors, tmp_path / WEIGHTS)
    assert torch.equal(read_model(tmp_path).model(TOKENS), pair.ours.model(TOKENS))


def names_in(folder: Path) -> list[str]:
    return [name for path in folder.glob("*.safetensors") for name in load_file(path)]


@torch.no_grad()
def test_sharded_weights_saved_by_transformers_are_read(
    open_both: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = open_both("qwen3")
    pair.theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert torch.equal(read_model(tmp_path).model(TOKENS), pair.ours.model(TOKENS))
