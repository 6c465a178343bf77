"""tokenizer.json and tokenizer_config.json of a model folder <-> Tokenizer.

A vocabulary of our own is written so that the tokenizers library encodes every text alike, and is
read with tiktoken; so is one in GPT-2's layout. The others are kept as they are.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.errors import CheckpointError
from minigpt.files import read_json
from minigpt.rings import find_ring, has_ring, ring
from minigpt.text.tokenizer import BYTE_OF_CHARACTER, BytesTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NAME_FIELD = "name_or_path"
"""Where tokenizer_config.json keeps Tokenizer.name."""

CHARACTER_OF_BYTE = {byte: character for character, byte in BYTE_OF_CHARACTER.items()}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
ANY_CHARACTER = r"[\s\S]"
"""The split pattern of single characters: nothing is merged."""
PLAIN_BPE = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
}
_CLASSES = "checkpoint.tokenizer_classes"
_MOST_ADDED = 2**16  # the libraries take seconds for more
_BYTE_PAIRS = "checkpoint.byte_pair_json"


def read_tokenizer(
    folder: Path, end_of_text_ids: tuple[int, ...] = (), *, n_rows: int | None = None
) -> Tokenizer | None:
    """Read the tokenizer of a model folder, None if it has none.

    Args: end_of_text_ids, () for ``<|endoftext|>``; n_rows, number of the model's embeddings: added
        tokens without one are left out.
    Raises: CheckpointError if a file is damaged, or a vocabulary cannot be used.
    """
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if os.path.lexists(path) else {}
    files, data = find_ring("checkpoint.vocabulary_files"), None
    if os.path.lexists(folder / TOKENIZER):
        data = read_json(folder / TOKENIZER)
        if has_ring(_CLASSES):
            data = ring(_CLASSES).as_auto_tokenizer(folder, config, data)
    elif files:
        data = files.read_vocabulary_files(folder, config)
    if data is None:
        return None
    if n_rows is not None:
        data = files.with_rows(data, n_rows) if files else data
        end_of_text_ids = tuple(id_ for id_ in end_of_text_ids if id_ < n_rows)
    named = config.get(NAME_FIELD)
    place = folder.parent if folder.name.startswith("step-") else folder
    name = named if isinstance(named, str) else place.name
    return tokenizer_from_json(data, name, end_of_text_ids=end_of_text_ids)


def tokenizer_from_json(
    data: Mapping[str, Any],
    name: str,
    *,
    end_of_text_ids: tuple[int, ...] = (),
) -> Tokenizer:
    """Read a tokenizer.json, as tiktoken if that encodes alike, else with the tokenizers library.

    The post-processor decides what a prompt begins with. As in transformers, add_bos_token and
    add_eos_token of tokenizer_config.json are ignored.

    Args: data, the parsed file; name, for the Tokenizer; end_of_text_ids, () for
        ``<|endoftext|>``.
    Raises: CheckpointError naming the part that is damaged or cannot be used.
    """
    added = data.get("added_tokens")
    if isinstance(added, list) and len(added) > _MOST_ADDED:
        raise CheckpointError(
            f"tokenizer.json has {len(added):,} added tokens, and at most {_MOST_ADDED:,} are "
            "read. Choose another model."
        )
    if data == tokenizer_to_json(BytesTokenizer()):
        return BytesTokenizer(name, end_of_text_ids)
    if pairs := find_ring(_BYTE_PAIRS):
        tokenizer: Tokenizer | None = pairs.tiktoken_tokenizer(data, name, end_of_text_ids)
        if tokenizer is not None:
            return tokenizer
    try:
        imported: Tokenizer = ring("text.imported").ImportedTokenizer(name, data, end_of_text_ids)
        return imported
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json: the tokenizers library gives every text the same ids.

    As always there, special tokens in a text are found unless it is told not to look for them.

    Raises: CheckpointError if the library's regex dialect cannot express the split pattern.
    """
    if isinstance(tokenizer, BytesTokenizer):
        ranks = {bytes([byte]): byte for byte in range(256)}
        return byte_level_json(ranks, (), tokenizer.special_ids, ANY_CHARACTER)
    data: dict[str, Any] = tokenizer.to_dict()
    kept: dict[str, Any] | None = data.get("tokenizer_json")
    return kept or dict(ring(_BYTE_PAIRS).byte_pair_json(tokenizer))


def byte_level_json(
    ranks: Mapping[bytes, int],
    merges: Iterable[tuple[bytes, bytes]],
    specials: Mapping[str, int],
    pattern: str,
    *,
    ignore_merges: bool = False,
) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level vocabulary.

    Args: ranks, bytes -> id; merges, in order; specials, text -> id; pattern, of the parts that
        are merged, in Oniguruma's dialect; ignore_merges, whether a part that is a token is one
        token, though merging does not reach it.
    """
    vocab = {to_characters(token): id_ for token, id_ in ranks.items()} | dict(specials)
    return tokenizer_file(
        added_tokens=[
            {"id": id_, "content": text, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for text, id_ in sorted(specials.items(), key=lambda item: item[1])
        ],
        pre_tokenizer=splits_by(pattern),
        decoder=BYTE_LEVEL,
        model=PLAIN_BPE
        | {
            "ignore_merges": ignore_merges,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [" ".join(map(to_characters, pair)) for pair in merges],
        },
    )


def tokenizer_file(
    *,
    model: dict[str, Any],
    decoder: dict[str, Any],
    added_tokens: Sequence[dict[str, Any]] = (),
    normalizer: dict[str, Any] | None = None,
    pre_tokenizer: dict[str, Any] | None = None,
    post_processor: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return a tokenizer.json of these parts."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(added_tokens),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }


def splits_by(pattern: str) -> dict[str, Any]:
    """Return the pre_tokenizer that splits a text by a pattern in Oniguruma's dialect."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    steps = [split | {"invert": False}, BYTE_LEVEL | {"use_regex": False}]
    return {"type": "Sequence", "pretokenizers": steps}


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return tokenizer_config.json, for transformers; the name in it is ours."""
    end = tokenizer.end_of_text
    end_text = None if end is None else tokenizer.decode([end])
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": tokenizer.decode(tokenizer.prefix[:1]) or end_text,
        "eos_token": end_text,
        "pad_token": end_text,
        "padding_side": "left",
        "add_bos_token": bool(tokenizer.prefix),
        NAME_FIELD: tokenizer.name,
    }


def to_characters(token: bytes) -> str:
    """Return the characters that stand for the bytes of a token."""
    return "".join(map(CHARACTER_OF_BYTE.__getitem__, token))
