"""Tokenizers by their specs, and byte-pair encodings trained on a corpus, with rustbpe."""

import re
from collections.abc import Iterable
from itertools import chain

import rustbpe

from minigpt.errors import ConfigError, nearest
from minigpt.text.byte_pairs import (
    TiktokenTokenizer,
    make_encoding,
    named_tokenizer,
    split_whitespace,
)
from minigpt.text.characters import character_tokens, frequent_characters, joined_ranks
from minigpt.text.tokenizer import END_OF_TEXT, BytesTokenizer, Tokenizer, well_formed
from minigpt.text.vocabulary_parts import BPE_PATTERN

NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")
BPE_TRAINING_BYTES = 64 * 2**20
# The vocabulary size of the spec ``bpe``: docs/training.md has the losses.
BYTES_PER_MERGE = 1000
LARGEST_FITTING_BPE = 1024
CHARACTER_COUNT_BYTES = BYTES_PER_MERGE * LARGEST_FITTING_BPE
_MOST_CHARACTERS = 2**14


def parse_spec(spec: str) -> tuple[str, int]:
    """Split a tokenizer's spec into its kind and vocabulary size: ``bpe:1024`` -> (bpe, 1024).

    The size is 0 if it is not part of the spec: for ``bpe``, it then depends on the corpus.

    Raises: ConfigError for an unknown spec, naming the nearest one.
    """
    kind, colon, size = spec.partition(":")
    if kind == "bpe" and colon:
        if not re.fullmatch("[0-9]{1,9}", size):
            raise ConfigError(
                f"the tokenizer {spec!r} needs its vocabulary size in digits, as in bpe:1024."
            )
        return kind, int(size)
    if spec not in ("bytes", "bpe", *NAMED_ENCODINGS):
        choices = ("bytes", "bpe", "bpe:1024", *NAMED_ENCODINGS)
        raise ConfigError(f"unknown tokenizer {spec!r}. {nearest(spec, choices)}")
    return spec, 0


def make_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of a spec, as ``text.tokenizer.make_tokenizer`` does."""
    kind, vocab_size = parse_spec(spec)
    if kind == "bytes":
        return BytesTokenizer()
    return trained_tokenizer(texts, vocab_size) if kind == "bpe" else named_tokenizer(kind)


def trained_tokenizer(texts: Iterable[str], vocab_size: int) -> TiktokenTokenizer:
    """Learn a vocabulary of a size from texts; size 0 for one that fits their length.

    Raises: as ``train_bpe``.
    """
    if vocab_size:
        return train_bpe(texts, vocab_size)
    texts = iter(texts)
    read = first_texts(texts, BYTES_PER_MERGE * LARGEST_FITTING_BPE)
    n_merges = sum(len(text.encode("utf-8", "replace")) for text in read) // BYTES_PER_MERGE
    # 258 is the smallest size that train_bpe takes.
    vocab_size = min(257 + max(1, n_merges), LARGEST_FITTING_BPE)
    # Room for all frequent characters beside the merges.
    n_seeds = len(character_tokens(frequent_characters(read), _MOST_CHARACTERS))
    return train_bpe(chain(read, texts), vocab_size + n_seeds, n_seeds=n_seeds)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, n_seeds: int | None = None
) -> TiktokenTokenizer:
    """Learn byte-pair merges from texts, with rustbpe.

    Only the first BPE_TRAINING_BYTES of text are read. A corpus with too few distinct pairs gives
    a smaller vocabulary than requested. Frequent characters outside of ASCII become tokens first
    (see characters.py).

    Args: vocab_size, number of all tokens: 256 bytes, the merges, ``<|endoftext|>`` last; n_seeds,
        the most tokens to spend on characters, by default half of those that are not bytes.
    Raises: ConfigError if vocab_size leaves no room for a merge.
    Source: Sennrich et al. 2016, arXiv:1508.07909.
    """
    if vocab_size <= 257:
        raise ConfigError(
            f"bpe:{vocab_size} leaves no room for merges: 256 bytes and {END_OF_TEXT} are always "
            "included. Try bpe:1024, or the tokenizer bytes."
        )
    trainer = rustbpe.Tokenizer()
    read = list(map(well_formed, first_texts(texts, BPE_TRAINING_BYTES)))
    characters = frequent_characters(first_texts(read, CHARACTER_COUNT_BYTES))
    seeds = character_tokens(characters, (vocab_size - 257) // 2 if n_seeds is None else n_seeds)
    parts = (part for text in read for part in split_whitespace(text))
    # Some of what is learned builds the same characters in other ways, and is left out.
    n_learned = vocab_size - 1 + 2 * len(seeds)
    trainer.train_from_iterator(parts, n_learned, pattern=BPE_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if seeds:
        ranks = joined_ranks(seeds, sorted(ranks, key=ranks.__getitem__), vocab_size - 1)
    name = f"bpe:{vocab_size}"
    encoding = make_encoding(name, BPE_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    return TiktokenTokenizer(name, encoding)


def first_texts(texts: Iterable[str], n_bytes: float) -> list[str]:
    """Return the first texts that have at least n_bytes together, or all texts."""
    read: list[str] = []
    for text in texts:
        read.append(text)
        n_bytes -= len(text.encode("utf-8", "replace"))
        if n_bytes <= 0:
            break
    return read
