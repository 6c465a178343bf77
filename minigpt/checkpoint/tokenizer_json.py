"""tokenizer.json and tokenizer_config.json of a model folder <-> Tokenizer."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.files import read_json
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import BytesTokenizer, Tokenizer

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
NAME_FIELD = "name_or_path"
"""Where tokenizer_config.json keeps Tokenizer.name."""

BYTES_TOKENIZER = Path(__file__).with_name("bytes_tokenizer.json")
"""The tokenizer.json of single bytes, as the tokenizers library reads it."""
_VOCABULARIES = "checkpoint.byte_pair_json"


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
        if classes := find_ring("text.tokenizer_classes"):
            data = classes.as_auto_tokenizer(folder, data)
    elif files:
        data = files.read_vocabulary_files(folder)
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
    data: Mapping[str, Any], name: str, *, end_of_text_ids: tuple[int, ...] = ()
) -> Tokenizer:
    """Read a tokenizer.json: that of single bytes, or another with the ring of vocabularies.

    Args: name, for the Tokenizer; end_of_text_ids, () for ``<|endoftext|>``.
    Raises: CheckpointError naming the part that is damaged or cannot be used.
    """
    if data == read_json(BYTES_TOKENIZER):
        return BytesTokenizer(name, end_of_text_ids)
    return ring(_VOCABULARIES).tokenizer_from_json(data, name, end_of_text_ids)


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return tokenizer.json, by which the tokenizers library gives every text the same ids.

    Raises: CheckpointError if the library's regex dialect cannot express the split pattern.
    """
    if isinstance(tokenizer, BytesTokenizer):
        return read_json(BYTES_TOKENIZER)
    return ring(_VOCABULARIES).tokenizer_to_json(tokenizer)


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
