"""Read and write the tokenizer.json and tokenizer_config.json of a model folder."""

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minigpt.checkpoint.byte_pair_json import byte_pair_json, tiktoken_tokenizer
from minigpt.checkpoint.model_folder import (
    BYTES_TOKENIZER,
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER,
)
from minigpt.checkpoint.vocabulary_files import (
    drop_tokens_without_row,
    read_vocabulary_files,
    tokenizer_remedy,
    with_library_ids,
)
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, MinigptWarning, cut
from minigpt.files import read_json, to_json
from minigpt.rings import ring
from minigpt.text.byte_pairs import TiktokenTokenizer
from minigpt.text.token_ids import TokenIdTokenizer
from minigpt.text.tokenizer import RESIZE, BytesTokenizer, Tokenizer
from minigpt.text.tokenizer_classes import (
    TOKENIZER_CONFIG,
    as_auto_tokenizer,
    named_tokens,
    tokenizer_settings,
)

NAME_FIELD = "name_or_path"
"""Field of tokenizer_config.json that stores Tokenizer.name."""
_MOST_ADDED = 2**16  # with more, the libraries take seconds
_PLAIN_MODULE = "tokenization_plain"
_PLAIN_CLASS = {"auto_map": {"AutoTokenizer": [None, f"{_PLAIN_MODULE}.PlainTokenizer"]}}
"""Field of tokenizer_config.json without which AutoTokenizer uses Qwen2Tokenizer for a qwen2 model,
with its own normalizer and split pattern, regardless of tokenizer_class."""
# A separate class, because transformers marks the class that it finds there as custom code. It is
# run only with trust_remote_code.
_PLAIN_CODE = b"""from transformers import PreTrainedTokenizerFast


class PlainTokenizer(PreTrainedTokenizerFast):
    pass
"""


def read_vocabulary(folder: Path, n_rows: int) -> Tokenizer | None:
    """Read the tokenizer of a model folder; None if it has none.

    Args: n_rows, number of rows of the model's embedding.
    Raises: CheckpointError if a file is damaged, or the vocabulary has more tokens than the model.
    """
    tokenizer = read_tokenizer(folder, _end_of_text_ids(folder), n_rows=n_rows)
    problem = ""
    if tokenizer is not None and tokenizer.vocab_size > n_rows:
        problem = f"has {tokenizer.vocab_size} tokens, and the model only {n_rows}"
    elif tokenizer is not None and any(id_ >= n_rows for id_ in tokenizer.prefix):
        first = tokenizer.prefix[0]
        problem = f"begins each text with the id {first}, but the model's are 0 to {n_rows - 1}"
    if problem:
        raise CheckpointError(
            f"the vocabulary in {str(folder)!r} {problem}. Take both from the same place."
        )
    if tokenizer is not None and tokenizer.without_row:
        _warn_of_tokens_without_row(folder, tokenizer.without_row)
    return tokenizer


def id_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer:
    """Return the tokenizer of a model folder without one: its text is token ids as numbers."""
    ends = tuple(id_ for id_ in _end_of_text_ids(folder) if id_ < config.vocab_size)
    return TokenIdTokenizer(folder, config.vocab_size, ends, remedy=tokenizer_remedy(folder))


def _end_of_text_ids(folder: Path) -> tuple[int, ...]:
    """Return the end-of-text token ids in generation_config.json, else in config.json."""
    settings, path = read_json(folder / CONFIG), folder / GENERATION_CONFIG
    ends = read_json(path).get("eos_token_id") if os.path.lexists(path) else None
    ends = settings.get("eos_token_id") if ends is None else ends
    ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(id_) is int for id_ in ids):
        raise CheckpointError(
            f"the eos_token_id of {str(folder)!r} is {str(ends)[:80]!r}, and not an id or a list "
            "of ids. Download its JSON files again."
        )
    return tuple(id_ for id_ in ids if id_ >= 0)  # -1 means none


def read_tokenizer(
    folder: Path, end_of_text_ids: tuple[int, ...] = (), *, n_rows: int | None = None
) -> Tokenizer | None:
    """Read the tokenizer of a model folder; None if it has none.

    Args: end_of_text_ids, () for ``<|endoftext|>``; n_rows, number of rows of the model's
        embedding: added tokens without a row are left out.
    Raises: CheckpointError if a file is damaged, or a vocabulary cannot be used.
    """
    path = folder / TOKENIZER_CONFIG
    config = read_json(path) if os.path.lexists(path) else {}
    data: Mapping[str, Any] | None = None
    if os.path.lexists(folder / TOKENIZER):
        data = as_auto_tokenizer(folder, with_library_ids(read_json(folder / TOKENIZER)))
    else:
        data = read_vocabulary_files(folder)
    if data is None:
        return None
    without_row: tuple[str, ...] = ()
    if n_rows is not None:
        data, without_row = drop_tokens_without_row(data, n_rows)
        end_of_text_ids = tuple(id_ for id_ in end_of_text_ids if id_ < n_rows)
    named = config.get(NAME_FIELD)
    place = folder.parent if folder.name.startswith("step-") else folder
    name = named if isinstance(named, str) else place.name
    tokenizer = tokenizer_from_json(data, name, end_of_text_ids=end_of_text_ids)
    tokenizer.without_row = without_row
    return tokenizer


def _warn_of_tokens_without_row(folder: Path, tokens: Sequence[str]) -> None:
    """Warn of tokens without a row, except those that are for padding or images only."""
    named = named_tokens(tokenizer_settings(folder))
    unused = (named.get("pad_token"), named.get("image_token"))
    texts = [token for token in tokens if token not in unused and "pad" not in token.lower()]
    if not texts:
        return
    shown = ", ".join(map(cut, texts[:3])) + (", ..." if len(texts) > 3 else "")
    warnings.warn(
        f"the model's embedding in {str(folder)!r} has no row for {shown} of its tokenizer "
        f"(plain text here). {RESIZE}",
        MinigptWarning,
        stacklevel=2,
    )


def tokenizer_from_json(
    data: Mapping[str, Any], name: str, *, end_of_text_ids: tuple[int, ...] = ()
) -> Tokenizer:
    """Read a tokenizer.json with tiktoken if the ids are the same, else with tokenizers.

    The post-processor determines which tokens a prompt begins with. As in transformers,
    add_bos_token and add_eos_token of tokenizer_config.json are ignored.

    Args: name, for the Tokenizer; end_of_text_ids, () for ``<|endoftext|>``.
    Raises: CheckpointError naming the part that is damaged or cannot be used.
    """
    if data == read_json(BYTES_TOKENIZER):
        return BytesTokenizer(name, end_of_text_ids)
    added = data.get("added_tokens")
    if isinstance(added, list) and len(added) > _MOST_ADDED:
        raise CheckpointError(
            f"tokenizer.json has {len(added):,} added tokens, and at most {_MOST_ADDED:,} are "
            "read. Remove those that occur in no text from the file."
        )
    if tokenizer := tiktoken_tokenizer(data, name, end_of_text_ids):
        return tokenizer
    try:
        # Not imported above: the library takes time to load, and most vocabularies do not need it.
        return ring("text.imported").ImportedTokenizer(name, data, end_of_text_ids)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"tokenizer.json is damaged ({type(error).__name__}: {str(error)[:120]!r}). "
            "Write or download it again."
        ) from None


def tokenizer_to_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a tokenizer.json with which the tokenizers library gives every text the same ids.

    Raises: CheckpointError if the library's regex dialect cannot express the split pattern.
    """
    if isinstance(tokenizer, BytesTokenizer):
        return read_json(BYTES_TOKENIZER)
    if isinstance(tokenizer, TiktokenTokenizer):
        return byte_pair_json(tokenizer)
    return tokenizer.to_dict()["tokenizer_json"]


def tokenizer_files(tokenizer: Tokenizer, config: ModelConfig, *, is_new: bool) -> dict[str, bytes]:
    """Return the files of a tokenizer. Args: is_new, False for that of a published base model."""
    files = {TOKENIZER: to_json(tokenizer_to_json(tokenizer))}
    settings = tokenizer_config(tokenizer, config.context_length)
    if config.model_type == "qwen2" and is_new:
        settings |= _PLAIN_CLASS
        files[f"{_PLAIN_MODULE}.py"] = _PLAIN_CODE
    return files | {TOKENIZER_CONFIG: to_json(settings)}


def tokenizer_config(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    """Return the tokenizer_config.json for transformers, with our field for the name."""
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
