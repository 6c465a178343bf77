"""transformers reads folders that we write, and we read those that it writes."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import Tokenizer

TEXT = "It's the cat's\n\n  12345 hats, déjà-vu! <b> \t I'LL don't"


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # raised by its imports; warnings about our files are errors
        return pytest.importorskip("transformers", reason="needs transformers as the oracle")


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
