"""AutoTokenizer gives our ids for every text and every folder that we read or write."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from layout_models import LAYOUTS, make_model
from published_vocabularies import bert, unigram

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tokenizer_json import read_tokenizer, tokenizer_to_json
from minigpt.errors import MinigptWarning
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer


@pytest.fixture(scope="module")
def transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by its imports
        module = pytest.importorskip("transformers", reason="needs its AutoTokenizer as the oracle")
    module.logging.set_verbosity_error()
    return module


def template(token: str, id_: int) -> dict[str, Any]:
    """Return a post-processor that starts each text with a token."""
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


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::minigpt.errors.MinigptWarning")
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("kind", CLASSES)
def test_prompts_start_with_the_tokens_that_auto_tokenizer_adds(
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
    added: dict[str, Any] = {"__type": "AddedToken", "content": "<s>"}
    for flags, bos in [*itertools.product(FLAGS, ("<s>", None)), ({}, added)]:
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


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": False}, {"bos_token": "</s>"}])
@pytest.mark.parametrize("processor", ["none", "byte-level"])
def test_code_llama_prompts_always_start_with_the_begin_token(
    transformers: Any, tmp_path: Path, processor: str, flags: dict[str, Any]
) -> None:
    data = FILES["llama2"]() | {"post_processor": PROCESSORS[processor]}
    config = {"tokenizer_class": "CodeLlamaTokenizer", **flags}
    for name, value in (("tokenizer", data), ("tokenizer_config", config)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = read_tokenizer(tmp_path)
    assert ours is not None
    assert len(ours.prefix) == 1
    for text in ("In 1984 we", "  x", "\u2581a"):
        assert ours.encode_prompt(text) == theirs(text).input_ids


def _byte_level_vocabulary(**changes: Any) -> dict[str, Any]:
    text = "In 1984 the king's I'LL de\u0301ja\u0300 vu 12345 3.14159 a  b   d <s>"
    encoding = train_bpe([text] * 9, 310).encoding
    specials = {"<|endoftext|>": 320, "</s>": 322, "<unk>": 323}
    made = make_encoding("x", encoding._pat_str, encoding._mergeable_ranks, specials)
    return tokenizer_to_json(TiktokenTokenizer("x", made)) | changes


def _sentencepiece_vocabulary(**changes: Any) -> dict[str, Any]:
    """Return a character BPE with byte fallback, as in Llama 2 and Gemma."""
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))],
        show_progress=False,
    )
    library.train_from_iterator(["In 1984 the king's I'LL de\u0301ja vu 12345  a"] * 9, trainer)
    data: dict[str, Any] = json.loads(library.to_str())
    steps = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    decoder = {"type": "Sequence", "decoders": steps}
    return data | {"added_tokens": data["added_tokens"][:3], "decoder": decoder} | changes


_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS = BYTE_LEVEL | {"use_regex": True}
_QWEN2_SPLITS = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": _QWEN2},
            "behavior": "Isolated",
            "invert": False,
        },
        BYTE_LEVEL | {"use_regex": False},
    ],
}
_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [{"type": "Digits", "individual_digits": True}, _WORDS],
}
_TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
_PREPENDED = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, _TO_SPACE],
}
_MERGED = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
_NEVER = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False}
FILES = {
    "own": lambda: _byte_level_vocabulary(),
    "gpt2": lambda: _byte_level_vocabulary(pre_tokenizer=_WORDS),
    "spaced": lambda: _byte_level_vocabulary(pre_tokenizer=_WORDS | {"add_prefix_space": True}),
    "digits": lambda: _byte_level_vocabulary(pre_tokenizer=_DIGITS),
    "qwen2": lambda: _byte_level_vocabulary(
        pre_tokenizer=_QWEN2_SPLITS, normalizer={"type": "NFC"}
    ),
    "qwen2-not-normalized": lambda: _byte_level_vocabulary(pre_tokenizer=_QWEN2_SPLITS),
    "lowercase": lambda: _byte_level_vocabulary(normalizer={"type": "Lowercase"}),
    "metaspace": lambda: _sentencepiece_vocabulary(),
    "metaspace-never": lambda: _sentencepiece_vocabulary(pre_tokenizer=_NEVER),
    "llama2": lambda: _sentencepiece_vocabulary(pre_tokenizer=None, normalizer=_PREPENDED),
    "gemma": lambda: _sentencepiece_vocabulary(pre_tokenizer=_MERGED, normalizer=_TO_SPACE),
}
SPLITTING_CLASSES = [
    *(None, "PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer"),
    *("LlamaTokenizerFast", "Qwen2Tokenizer", "Qwen2TokenizerFast", "GemmaTokenizerFast"),
    *("GPTNeoXTokenizerFast", "CodeGenTokenizer", "CohereTokenizer", "UnknownTokenizer"),
    "CodeLlamaTokenizer",
]
MODEL_TYPES = [
    *("llama", "mistral", "gpt2", "qwen2", "qwen3", "gpt_neox", "gemma2", "gemma3_text"),
    *("olmo2", "phi3", "smollm3", "gpt_neo", "opt"),
]
_FOR_BYTES = (
    *("GPT2Tokenizer", "Qwen2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer"),
    "CohereTokenizer",
)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore::minigpt.errors.MinigptWarning")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_text_is_split_as_by_the_class_that_auto_tokenizer_selects(
    transformers: Any, tmp_path: Path, model_type: str
) -> None:
    """Some classes override the split of tokenizer.json."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for name, kind in itertools.product(FILES, SPLITTING_CLASSES):
        (tmp_path / "tokenizer.json").write_text(json.dumps(FILES[name]()))
        is_bytes = FILES[name]()["decoder"]["type"] == "ByteLevel"
        for flags in ({}, {"add_prefix_space": True}, {"add_prefix_space": False, "legacy": True}):
            config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **flags}
            config |= {"tokenizer_class": kind} if kind else {}
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
            by_class = type(theirs).__name__
            if by_class == "CodeLlamaTokenizer" if is_bytes else by_class in _FOR_BYTES:
                continue  # the class would lose characters: see the next test
            ours = read_tokenizer(tmp_path)
            assert ours is not None
            for text in HARD_TEXTS[:-1]:
                plain = text.replace("<s>", "")
                assert ours.encode_prompt(plain) == theirs(plain).input_ids, (name, config, text)
            special = "In </s>king <unk>"
            ids = [*ours.prefix, *ours.encode(special, special=True)]
            assert ids == theirs(special).input_ids, (name, config)


def test_a_class_with_another_split_is_reported_and_not_used_if_it_loses_characters(
    transformers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(file: str, kind: str, model_type: str) -> Tokenizer:
        (tmp_path / "tokenizer.json").write_text(json.dumps(FILES[file]()))
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        tokenizer = read_tokenizer(tmp_path)
        assert tokenizer is not None
        return tokenizer

    with pytest.warns(MinigptWarning, match="Qwen2Tokenizer.* splits text differently"):
        write("own", "PreTrainedTokenizerFast", "qwen2")
    with pytest.warns(MinigptWarning, match="loses characters.*uses tokenizer.json as it is"):
        tokenizer = write("llama2", "LlamaTokenizer", "qwen2")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("In 1984 we") == library.encode("In 1984 we").ids
    text = json.dumps(FILES["own"]()).replace("<unk>", "<x>")
    monkeypatch.setitem(FILES, "no-unk", lambda: json.loads(text))
    with pytest.warns(
        MinigptWarning, match="GemmaTokenizer.*loses characters.*uses tokenizer.json as it is"
    ):
        write("no-unk", "GemmaTokenizer", "llama")  # transformers cannot encode any text
    monkeypatch.setitem(FILES, "unigram", unigram)
    monkeypatch.setitem(FILES, "wordpiece", bert)
    with pytest.warns(
        MinigptWarning, match="is for BPE, .* is Unigram.*uses tokenizer.json as it is"
    ):
        write("unigram", "LlamaTokenizer", "llama")
    with pytest.warns(
        MinigptWarning, match="is for BPE, .* is WordPiece.*uses tokenizer.json as it is"
    ):
        write("wordpiece", "PreTrainedTokenizerFast", "qwen2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write("unigram", "PreTrainedTokenizerFast", "llama")
        write("qwen2", "Qwen2Tokenizer", "qwen2")  # class and file agree
        write("own", "PreTrainedTokenizerFast", "llama")
        write("llama2", "LlamaTokenizer", "llama")  # differs only at leading spaces


def _option(content: str, **options: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **flags, **options}


CONFIGURED: dict[str, dict[str, Any]] = {
    "a new special token": {"added_tokens_decoder": {"265": _option("<x>", special=True)}},
    "a new plain token": {"added_tokens_decoder": {"266": _option("<x>"), "265": _option("<y>")}},
    "other options": {
        "added_tokens_decoder": {"264": _option("<|endoftext|>", special=True, rstrip=True)}
    },
    "a new named token": {
        "eos_token": "<y>",
        "mask_token": {"__type": "AddedToken", **_option("<x>", lstrip=True)},
    },
    "new extra tokens": {"additional_special_tokens": ["<y>", "<x>"], "bos_token": "<z>"},
}


@pytest.mark.parametrize("what", CONFIGURED)
def test_tokens_that_only_tokenizer_config_has_get_the_ids_of_auto_tokenizer(
    transformers: Any, tmp_path: Path, what: str
) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(tokenizer_to_json(train_bpe(["the king and the kings"] * 9, 265)))
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **CONFIGURED[what]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ours = read_tokenizer(tmp_path)
    assert ours is not None
    assert dict(ours.special_ids) == theirs.get_added_vocab()
    for text in ("a <x> b<y>c", "the<|endoftext|>  king <z>"):
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text, special=True) == ids


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
    "bytes": BytesTokenizer,
    "bpe": lambda: train_bpe(["In 1984 the king said: de\u0301ja\u0300 vu 1984 times. "] * 9, 290),
}


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_auto_tokenizer_and_pipelines_read_every_saved_layout_as_we_do(
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
