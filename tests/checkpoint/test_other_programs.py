"""AutoTokenizer reads every folder that we read or write as we do: the same ids for every text."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from layout_models import LAYOUTS, make_model

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tokenizer_json import read_tokenizer, tokenizer_to_json
from minigpt.text.bpe import train_bpe
from minigpt.text.tokenizer import (
    TiktokenTokenizer,
    Tokenizer,
    bytes_tokenizer,
    make_encoding,
)


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        module = pytest.importorskip("transformers", reason="compares with its AutoTokenizer")
    module.logging.set_verbosity_error()
    return module


def template(token: str, id_: int) -> dict[str, Any]:
    """The post-processor that begins a text with a token."""
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [begin, sequences[0]],
        "pair": [begin, *sequences],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
BEGIN = template("<s>", 300)
PROCESSORS = {
    "none": None,
    "byte-level": BYTE_LEVEL | {"use_regex": True},
    "template": BEGIN,
    "sequence": {"type": "Sequence", "processors": [BYTE_LEVEL | {"use_regex": True}, BEGIN]},
}
FLAGS: list[dict[str, Any]] = [
    {},
    {"add_bos_token": True},
    {"add_bos_token": False},
    {"add_bos_token": True, "add_eos_token": True},
    {"add_bos_token": None, "add_eos_token": False},
]
CLASSES = {
    "TokenizersBackend": "llama",
    "PreTrainedTokenizerFast": "llama",
    "PreTrainedTokenizer": "qwen3",
    "LlamaTokenizer": "llama",
    "LlamaTokenizerFast": "mistral",
    "GPT2Tokenizer": "gpt2",
    "GPT2TokenizerFast": "llama",
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen3",
    "GemmaTokenizer": "gemma2",
    "CohereTokenizer": "llama",
    "GPTNeoXTokenizer": "gpt_neox",
    "GPTNeoXTokenizerFast": "llama",
    "UnknownTokenizer": "llama",
    "": "llama",
}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", CLASSES)
def test_prompts_begin_as_those_of_auto_tokenizer_with_every_class_flag_and_post_processor(
    transformers: Any, tmp_path: Path, kind: str, processor: str
) -> None:
    encoding = train_bpe(["the king and the kings"] * 9, 265).encoding
    specials = {"<|endoftext|>": 299, "<s>": 300, "</s>": 301}
    made = make_encoding("x", encoding._pat_str, encoding._mergeable_ranks, specials)
    data = tokenizer_to_json(TiktokenTokenizer("x", made))
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(data | {"post_processor": PROCESSORS[processor]})
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": CLASSES[kind]}))
    for flags, bos in itertools.product(
        FLAGS, ("<s>", {"__type": "AddedToken", "content": "<s>"}, None)
    ):
        config: dict[str, Any] = {"bos_token": bos, "eos_token": "</s>", **flags}
        config |= {"tokenizer_class": kind} if kind else {}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
        ours = read_tokenizer(tmp_path)
        assert ours is not None
        ids = theirs("king").input_ids
        assert list(ours.prefix) == [token for token in ids if token >= 299], config
        assert ours.encode_prompt("king") == ids, config
        begin = [299, *ours.prefix]
        assert list(ours.separator) == begin, config


HARD_TEXTS = [
    "1984 12345 3.14159 \u0664\u0662",
    "de\u0301ja\u0300 vu, A\u030a \uac00 \u1100\u1161 \ufb01",
    "a  b\t\tc \n\n\n   d \r\n\u00a0\u2003e   ",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f44d\U0001f3fd!",
    "\u6f22\u5b57\u3068\u304b\u306a \ud55c\uad6d\uc5b4",
    "I'LL we're DON'T x's <|endo ftext|> <s>",
    " leading and trailing ",
    "",
]
VOCABULARIES = {
    "bytes": bytes_tokenizer,
    "bpe": lambda: train_bpe(["In 1984 the king said: de\u0301ja\u0300 vu 1984 times. "] * 9, 290),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_tokenizer_and_pipelines_read_every_layout_that_we_write_as_we_do(
    transformers: Any, tmp_path: Path, layout: str, vocabulary: str
) -> None:
    tokenizer: Tokenizer = VOCABULARIES[vocabulary]()
    write_model(tmp_path, make_model(tokenizer.vocab_size, layout), tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    for trusts in (False, True):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=trusts)
        for text in HARD_TEXTS:
            assert theirs(text).input_ids == tokenizer.encode_prompt(text) if text else True
            assert theirs.decode(theirs(text).input_ids) == text
    end = tokenizer.end_of_text
    assert theirs.pad_token_id == theirs.eos_token_id == theirs.bos_token_id == end
    for name in ("generation_config.json", "config.json"):
        ids = json.loads((tmp_path / name).read_text())
        for kind in ("pad", "eos", "bos"):
            assert ids[f"{kind}_token_id"] == end
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is False
    if config["model_type"] == "gpt2":
        assert config["n_ctx"] == config["n_positions"]
    batch = theirs(["the", "the king"], padding=True)
    assert len({len(ids) for ids in batch.input_ids}) == 1
    pipeline = transformers.pipeline("text-generation", model=str(tmp_path), batch_size=2)
    together = pipeline(["the", "the king"], max_new_tokens=4, do_sample=False)
    assert len(together) == 2
    assert read_model(tmp_path).model.config == make_model(tokenizer.vocab_size, layout).config
