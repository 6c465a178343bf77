"""Changes that AutoTokenizer of transformers 5 makes to a folder's vocabulary.

Tokenizer classes such as Qwen2Tokenizer read vocabulary, merges, added tokens and post-processor
from tokenizer.json, but use their own normalizer, pre-tokenizer and decoder.
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.errors import MinigptError, MinigptWarning
from minigpt.files import read_json
from minigpt.rings import ring
from minigpt.text.tokenizer import END_OF_TEXT
from minigpt.text.vocabulary_parts import BPE_PATTERN, steps_of

JSONValue = dict[str, Any]

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"

_CLASS_OF_MODEL_TYPE = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neo": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "opt": "GPT2Tokenizer",
    "gemma": "GemmaTokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
}
_ALWAYS_FROM_FILE = ("mistral", "olmo2", "phi3")  # regardless of tokenizer_class
QWEN2_PATTERN = BPE_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")
SPACE = "\u2581"
"""Character that represents a space in SentencePiece."""
PREPEND_SPACE = {"type": "Prepend", "prepend": SPACE}
REPLACE_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
SPLIT_AT_SPACES = {
    "type": "Split",
    "pattern": {"String": " "},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
PLAIN_TOKEN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
"""Default options of an added token."""
_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
}
_END_OF_TEXT = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
_SENTENCEPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NAMED_TOKENS = {
    "GPT2Tokenizer": _END_OF_TEXT,
    "CodeGenTokenizer": _END_OF_TEXT,
    "GPTNeoXTokenizer": _END_OF_TEXT | {"pad_token": "<|padding|>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), END_OF_TEXT),
    "LlamaTokenizer": _SENTENCEPIECE,
    "CodeLlamaTokenizer": _SENTENCEPIECE,
    "GemmaTokenizer": {
        f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad", "mask")
    },
    "CohereTokenizer": {
        "bos_token": "<BOS_TOKEN>",
        "eos_token": "<|END_OF_TURN_TOKEN|>",
        "mask_token": "<MASK_TOKEN>",
    }
    | {f"{role}_token": f"<{role.upper()}>" for role in ("unk", "pad", "cls", "sep")},
}
"""Class -> its default special tokens."""
_BY_FILE = "minigpt uses tokenizer.json as it is."
_PROBE = "The 1984 I'LL x's de\u0301ja\u0300  vu,\n\n 3.14\t\u4e2d\u6587 A\u030a ... end "


def tokenizer_settings(folder: Path, data: Mapping[str, Any] | None = None) -> JSONValue:
    """Return the fields of tokenizer_config.json, and those that transformers adds to them.

    It adds special_tokens_map.json, which old folders have, and the default special tokens of the
    tokenizer class.

    Args: data, the parsed tokenizer.json; None to read it if needed.
    Raises: CheckpointError if a file is damaged.
    """
    config = _read(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" not in config:
        config |= _read(folder / "special_tokens_map.json")
    return _NAMED_TOKENS.get(tokenizer_class(folder, config, data), {}) | config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens of ``tokenizer_settings`` by name, such as eos_token."""
    found = {name: token for name, token in config.items() if name.endswith("_token")}
    for field in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(extra := config.get(field), Mapping):
            found |= extra
    texts = {name: content(token) for name, token in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def tokenizer_class(
    folder: Path, config: Mapping[str, Any], data: Mapping[str, Any] | None = None
) -> str:
    """Return the class that AutoTokenizer uses, without ``Fast``; "" for the generic one.

    Without a tokenizer.json, it is GPT-2's unless another class is named.

    Args: config, the parsed tokenizer_config.json; data, as for ``tokenizer_settings``.
    """
    has_file = data is not None or os.path.lexists(folder / TOKENIZER)
    generic = "" if has_file else "GPT2Tokenizer"
    model = _read(folder / "config.json")
    kind = model.get("model_type")
    declared = config.get("tokenizer_class") or model.get("tokenizer_class")
    named = declared.removesuffix("Fast") if isinstance(declared, str) else ""
    own = _CLASS_OF_MODEL_TYPE.get(kind, "") if isinstance(kind, str) else ""
    code = config.get("auto_map")
    if code and (not isinstance(code, Mapping) or "AutoTokenizer" in code):
        return named or own or generic
    if kind in _ALWAYS_FROM_FILE:
        return generic
    if kind == "qwen2":  # regardless of tokenizer_class
        return own
    if named == "LlamaTokenizer":
        data = _read(folder / TOKENIZER) if data is None else data
        steps = [*steps_of(data.get("pre_tokenizer")), *steps_of(data.get("decoder"))]
        if any(step["type"] == "ByteLevel" for step in steps):
            return ""
    return named or own or generic


def _read(path: Path) -> JSONValue:
    return read_json(path) if os.path.lexists(path) else {}


def class_parts(name: str, config: Mapping[str, Any]) -> JSONValue | None:
    """Return the parts of tokenizer.json that a class replaces; None if it uses the file's.

    Args: name, without ``Fast``; config, the ``tokenizer_settings``.
    """
    has_space = config.get("add_prefix_space")
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": bool(has_space),
        "trim_offsets": True,
        "use_regex": True,
    }
    merged = {"normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level, "model": _BPE}
    fallback = _BPE | {"fuse_unk": True, "byte_fallback": True}
    match name:
        case "GPT2Tokenizer" | "CodeGenTokenizer":
            return merged
        case "GPTNeoXTokenizer":
            # It rebuilds its post-processor without add_bos_token, so it adds no prefix.
            return merged | {"normalizer": {"type": "NFC"}, "post_processor": None}
        case "CohereTokenizer":
            digits = {"type": "Digits", "individual_digits": True}
            splits = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
            return merged | {"normalizer": {"type": "NFC"}, "pre_tokenizer": splits}
        case "Qwen2Tokenizer":
            regex = {"Regex": QWEN2_PATTERN}
            split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
            steps = [split, byte_level | {"use_regex": False}]
            splits = {"type": "Sequence", "pretokenizers": steps}
            return merged | {"normalizer": {"type": "NFC"}, "pre_tokenizer": splits}
        case "LlamaTokenizer" | "CodeLlamaTokenizer":
            is_code = name == "CodeLlamaTokenizer"
            scheme = "always" if config.get("legacy") and not is_code else "first"
            is_prefixed = has_space is None or has_space
            unknown = content(config.get("unk_token")) if is_code else None
            return {
                "normalizer": None,
                "pre_tokenizer": {
                    "type": "Metaspace",
                    "replacement": SPACE,
                    "prepend_scheme": scheme if is_prefixed else "never",
                    "split": False,
                },
                "decoder": decoder(strips=is_prefixed or is_code),
                "model": fallback | {"unk_token": unknown},
            }
        case "GemmaTokenizer":
            return {
                "normalizer": REPLACE_SPACES,
                "pre_tokenizer": SPLIT_AT_SPACES,
                "decoder": decoder(strips=False),
                "model": fallback | {"unk_token": content(config.get("unk_token", "<unk>"))},
            }
    return None


def as_auto_tokenizer(folder: Path, data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Apply AutoTokenizer's changes to a tokenizer.json: parts replaced and tokens added.

    Warns if this changes ids. Parts are not replaced by a class for another kind of vocabulary, or
    one that cannot encode characters that the file can.

    Args: data, the parsed tokenizer.json.
    Raises: CheckpointError if a file of the tokenizer's settings is damaged.
    """
    try:
        config = tokenizer_settings(folder, data)
        data = _with_named_tokens(data, config)
        model = data["model"]
        name = tokenizer_class(folder, config, data)
        parts = class_parts(name, config)
        kind = model.get("type", "BPE")
        if parts is not None and kind != "BPE":
            _warn(folder, name, f"is for BPE, and this vocabulary is {kind}: {_BY_FILE}")
        if parts is None or kind != "BPE" or "merges" not in model:
            return data
        changed = {**data, **parts, "model": model | parts["model"]}
        ids = {token["content"]: token["id"] for token in data["added_tokens"]}
        begin = content(config.get("bos_token"))
        if name == "CodeLlamaTokenizer" and begin in ids:  # regardless of add_bos_token
            changed["post_processor"] = beginning_with(begin, ids[begin])
        if _id_settings(data) == _id_settings(changed):
            return changed
    except (KeyError, TypeError, ValueError, AttributeError):
        return data  # damaged: reading it raises the error
    by_file, by_class = _probed(data), _probed(changed)
    if by_file is None or by_file == by_class:
        return changed
    is_lossy = by_class is None or len(by_class[1]) > len(by_file[1])
    if is_lossy:
        _warn(folder, name, f"loses characters of this vocabulary: {_BY_FILE}")
        return data
    _warn(folder, name, "splits text differently from tokenizer.json. minigpt does the same.")
    return changed


def _warn(folder: Path, name: str, what: str) -> None:
    warnings.warn(
        f"the tokenizer of {str(folder)!r}: transformers 5 uses {name} for it, which {what} "
        "docs/models.md explains how to choose.",
        MinigptWarning,
        stacklevel=3,
    )


def _probed(data: Mapping[str, Any]) -> tuple[list[int], set[str]] | None:
    """Return the ids of a text of many kinds, and its characters without a token."""
    try:
        tokenizer = ring("text.imported").ImportedTokenizer("", data)
        missing = tokenizer.unencodable(_PROBE)
        ids = tokenizer.encode_array("".join(c for c in _PROBE if c not in missing))
    except (MinigptError, KeyError, TypeError, ValueError, AttributeError):
        return None  # damaged: reading it raises the error
    return ids.tolist(), missing


def _id_settings(data: Mapping[str, Any]) -> list[Any]:
    """Return the settings that the ids depend on."""
    options = ("ignore_merges", "byte_fallback")
    parts = [bool(data["model"].get(name)) for name in options]
    steps = [*steps_of(data.get("normalizer")), *steps_of(data.get("pre_tokenizer"))]
    return parts + [{"use_regex": True} | step | {"trim_offsets": None} for step in steps]


def _with_named_tokens(data: Mapping[str, Any], config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the tokens that only tokenizer_config.json has, and use its options of the others."""
    before = list(data.get("added_tokens") or ())
    added = {token["content"]: token for token in before}
    vocab = data["model"].get("vocab") or {}
    if not isinstance(vocab, Mapping):  # Unigram's: texts with their scores
        vocab = {text: id_ for id_, (text, _) in enumerate(vocab)}
    ids = {*vocab.values(), *(token["id"] for token in before)}
    for text, options in _configured_tokens(config, added).items():
        if text not in added and text not in vocab and max(ids, default=-1) + 1 != len(ids):
            continue  # with gaps, the id would depend on how the libraries load the file
        new = {"id": vocab.get(text, len(ids)), "content": text, "special": False}
        old = added.get(text, new)
        ids.add(old["id"])
        is_special = old["special"] or options.get("special", False)
        added[text] = PLAIN_TOKEN | old | options | {"special": is_special}
    after = sorted(added.values(), key=lambda token: int(token["id"]))
    return data if after == before else {**data, "added_tokens": after}


def _configured_tokens(
    config: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, dict[str, bool]]:
    """Return the options of added_tokens_decoder's tokens, and of special ones not yet known."""
    decoder = config.get("added_tokens_decoder")
    stored = decoder.items() if isinstance(decoder, Mapping) else ()
    tokens = [token for _, token in sorted(stored, key=lambda item: int(item[0]))]
    configured = {content(token): _options(token) for token in tokens if content(token)}
    configured = {text: options for text, options in configured.items() if isinstance(text, str)}
    named = named_tokens(config)
    roles = [f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]
    names = [*filter(named.__contains__, roles), *(name for name in named if name not in roles)]
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    others = () if isinstance(extra, Mapping) else extra
    for token in [*(config.get(name, named[name]) for name in names), *others]:
        text = content(token)
        if isinstance(text, str) and text and (text in configured or text not in known):
            configured[text] = configured.get(text, _options(token)) | {"special": True}
    return configured


def _options(token: Any) -> dict[str, bool]:
    fields = token.items() if isinstance(token, Mapping) else ()
    names = (*PLAIN_TOKEN, "special")
    return {name: value for name, value in fields if name in names and isinstance(value, bool)}


def beginning_with(token: str, id_: int) -> JSONValue:
    """Return the post-processor of a tokenizer.json that puts a token before each text."""
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id_], "tokens": [token]}},
    }


def content(token: Any) -> Any:
    """Return the text of a token, which may be an object with options."""
    return token["content"] if isinstance(token, Mapping) else token


def decoder(*, strips: bool) -> JSONValue:
    """Return the decoder of SentencePiece tokens.

    Args: strips, whether it removes the space that was added before a text.
    """
    steps: list[JSONValue] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    return {"type": "Sequence", "decoders": [*steps, strip] if strips else steps}
