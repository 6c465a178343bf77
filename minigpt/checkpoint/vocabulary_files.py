"""Vocabularies without a tokenizer.json: vocab.json with merges.txt, and llama2.c's scores."""

import os
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from minigpt.checkpoint.byte_pair_json import tokenizer_file
from minigpt.errors import CheckpointError
from minigpt.files import read_bytes, read_json, resource_errors
from minigpt.text.tokenizer_classes import (
    PLAIN_TOKEN,
    PREPEND_SPACE,
    REPLACE_SPACES,
    SPACE,
    beginning_with,
    class_parts,
    content,
    decoder,
    tokenizer_class,
    tokenizer_settings,
)

VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
SCORES = "sp_vocab.json"

_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")

JSONValue = dict[str, Any]


def read_vocabulary_files(folder: Path) -> JSONValue | None:
    """Return the vocabulary of a folder as a tokenizer.json; None if it has none of these files.

    Raises: CheckpointError if a file is damaged, or of an unsupported kind.
    """
    if not (os.path.lexists(folder / VOCAB) and os.path.lexists(folder / MERGES)):
        has_scores = os.path.lexists(folder / SCORES)
        return json_from_scores(read_json(folder / SCORES)) if has_scores else None
    config = tokenizer_settings(folder)
    kind = tokenizer_class(folder, config)
    added = read_json(folder / ADDED) if os.path.lexists(folder / ADDED) else {}
    try:
        with resource_errors(folder):
            merges = read_bytes(folder / MERGES).decode().replace("\r\n", "\n")
        return json_from_merges(read_json(folder / VOCAB), merges, config, added, kind)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{VOCAB}, {MERGES} or {ADDED} in {str(folder)!r} is damaged ({type(error).__name__}: "
            f"{str(error)[:80]!r}). Download them again."
        ) from None


def with_library_ids(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tokenizer.json whose added tokens have the ids of the tokenizers library.

    It ignores the ids in the file: a token that is not in the vocabulary gets the next free one.
    """
    try:
        vocab, added = data["model"]["vocab"], data["added_tokens"]
        if not isinstance(vocab, Mapping):  # Unigram's: texts with their scores
            vocab = {text: id_ for id_, (text, _) in enumerate(vocab)}
        texts = filter(None, dict.fromkeys(token["content"] for token in added))
        following = count(len(vocab))
        ids = {text: vocab[text] if text in vocab else next(following) for text in texts}
        after = [token | {"id": ids.get(token["content"], token["id"])} for token in added]
        return data if after == added else {**data, "added_tokens": after}
    except (KeyError, TypeError, ValueError, AttributeError):
        return data  # damaged: reading it raises the error


def drop_tokens_without_row(
    data: Mapping[str, Any], n_rows: int
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Leave out the added tokens that have no row in the model's embedding.

    Returns: the tokenizer.json without them, and their texts by id.
    """
    try:
        tokens = [t for t in data["added_tokens"] if t["id"] >= n_rows]
        without = tuple(str(t["content"]) for t in sorted(tokens, key=lambda t: t["id"]))
        if not without:
            return data, ()
        added = [t for t in data["added_tokens"] if t["content"] not in without]
        model, vocab = data["model"], data["model"].get("vocab")
        if isinstance(vocab, dict):
            vocab = {token: id_ for token, id_ in vocab.items() if token not in without}
            model = model | {"vocab": vocab}
        return {**data, "added_tokens": added, "model": model}, without
    except (KeyError, TypeError, AttributeError):
        return data, ()  # damaged: reading it raises the error


def json_from_scores(data: Mapping[str, Any]) -> JSONValue:
    """Return llama2.c's vocabulary as a tokenizer.json.

    The first three ids are the unknown, beginning-of-text and end-of-text tokens. Merges follow
    the scores: the pair that forms the token with the highest score is merged first.

    Args: data, the tokens, with plain spaces, and their scores.
    Raises: CheckpointError if either is damaged, or their lengths differ.
    """
    try:
        tokens, scores = list(map(str, data["tokens"])), list(map(float, data["scores"]))
        if len(tokens) != len(scores):
            raise ValueError(f"{len(tokens)} tokens and {len(scores)} scores")
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the vocabulary's tokens and scores are damaged ({str(error)[:80]!r}). "
            "Download it again."
        ) from None
    names = dict(enumerate(("<unk>", "<s>", "</s>")))
    vocab = {names.get(i, t.replace(" ", SPACE)): i for i, t in enumerate(tokens)}
    by_score = sorted(vocab.keys() - names.values(), key=lambda t: (-scores[vocab[t]], vocab[t]))
    splits = (
        (t[:i], t[i:]) for t in by_score if not _BYTE_TOKEN.fullmatch(t) for i in range(1, len(t))
    )
    return tokenizer_file(
        added_tokens=[
            {"id": id_, "content": name, "special": True} | PLAIN_TOKEN
            for id_, name in names.items()
        ],
        normalizer={"type": "Sequence", "normalizers": [PREPEND_SPACE, REPLACE_SPACES]},
        post_processor=beginning_with("<s>", 1),
        decoder=decoder(strips=True),
        model={
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(pair) for pair in splits if vocab.keys() >= set(pair)],
        },
    )


def json_from_merges(
    vocab: Mapping[str, Any],
    merges: str,
    config: Mapping[str, Any],
    added: Mapping[str, Any],
    kind: str,
) -> JSONValue:
    """Return the tokenizer.json that transformers builds from vocab.json and merges.txt.

    Args: merges, the text of merges.txt; config, the ``tokenizer_settings``; added, the
        parsed added_tokens.json; kind, the tokenizer class, which decides how a text is split.
    Raises: CheckpointError for an unsupported class, or if a file is damaged.
    """
    parts = class_parts(kind, config)
    if parts is None or parts["model"]["byte_fallback"]:
        raise CheckpointError(
            f"vocab.json and merges.txt of a {kind[:40]!r} cannot be read without tokenizer.json. "
            "Write it with transformers: AutoTokenizer.from_pretrained(FOLDER).save_pretrained("
            "FOLDER)."
        )
    lines = [line for line in merges.split("\n") if line and not line.startswith("#version")]
    options: dict[str, JSONValue] = {str(token): {"id": id_} for token, id_ in added.items()}
    for id_, token in dict(config.get("added_tokens_decoder") or {}).items():
        options[token["content"]] = token | {"id": int(id_)}
    for field in ("bos_token", "eos_token", "unk_token", "pad_token"):
        if (token := content(config.get(field))) is not None:
            options.setdefault(token, {})
    ids = {str(token): int(id_) for token, id_ in vocab.items()}
    for token, option in options.items():
        ids.setdefault(token, option.get("id", 1 + max(ids.values(), default=-1)))
    begin = content(config.get("bos_token"))
    begins = bool(config.get("add_bos_token")) and begin is not None
    model = parts["model"] | {"vocab": dict(vocab), "merges": [m.rstrip("\r") for m in lines]}
    return tokenizer_file(
        added_tokens=[
            PLAIN_TOKEN | {"special": True} | options[token] | {"id": ids[token], "content": token}
            for token in sorted(options, key=ids.__getitem__)
        ],
        **parts
        | {"model": model, "post_processor": beginning_with(begin, ids[begin]) if begins else None},
    )


def tokenizer_remedy(folder: Path) -> str:
    """Return the remedy for a model folder without a tokenizer that is read."""
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if (folder / name).is_file():
            return (
                f"Its {name} is SentencePiece's. Write tokenizer.json with transformers: "
                "AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)."
            )
    return "Add the tokenizer.json that the model was trained with."
