"""Tokenizers by spec, and byte-pair encodings trained on a corpus."""

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
from minigpt.text.characters import (
    MAX_LEARNED_BYTES,
    character_tokens,
    frequent_characters,
    joined_ranks,
)
from minigpt.text.tokenizer import END_OF_TEXT, Tokenizer, well_formed
from minigpt.text.vocabulary_parts import BPE_PATTERN

NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")
BPE_TRAINING_BYTES = 64 * 2**20
CHARACTER_TRAINING_BYTES = 8 * 2**20  # merges of characters take longer to learn
# These two decide the vocabulary size of the spec ``bpe``: docs/training.md has the losses.
BYTES_PER_MERGE = 1000
LARGEST_FITTING_BPE = 1024
CHARACTER_COUNT_BYTES = BYTES_PER_MERGE * LARGEST_FITTING_BPE
_MAX_CHARACTERS = 2**14


def parse_spec(spec: str) -> tuple[str, int]:
    """Split a tokenizer spec into its kind and vocabulary size: ``bpe:1024`` -> (bpe, 1024).

    The size is 0 if the spec has none; that of ``bpe`` then depends on the corpus.

    Raises: ConfigError for an unknown spec, naming the nearest one.
    """
    kind, colon, size = spec.partition(":")
    if kind == "bpe" and colon:
        if not re.fullmatch("[0-9]{1,9}", size):
            wrong = "not a number. Give it in digits"
            if size.isdecimal():
                wrong = "above 999,999,999. Give less"
            raise ConfigError(
                f"the vocabulary size of the tokenizer {spec!r} is {wrong}, as in bpe:1024."
            )
        return kind, int(size)
    if spec not in ("bytes", "bpe", *NAMED_ENCODINGS):
        choices = ("bytes", "bpe", "bpe:1024", *NAMED_ENCODINGS)
        raise ConfigError(f"unknown tokenizer {spec!r}. {nearest(spec, choices)}")
    return spec, 0


def make_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Return the tokenizer of a spec other than bytes; see ``text.tokenizer.make_tokenizer``."""
    kind, vocab_size = parse_spec(spec)
    if kind != "bpe":
        return named_tokenizer(kind)
    if vocab_size:
        return train_bpe(texts, vocab_size)
    # The size depends on the length of the texts.
    texts = iter(texts)
    read = first_texts(texts, BYTES_PER_MERGE * LARGEST_FITTING_BPE)
    n_merges = sum(len(text.encode("utf-8", "replace")) for text in read) // BYTES_PER_MERGE
    # 258 is the smallest size that train_bpe accepts.
    vocab_size = min(257 + max(1, n_merges), LARGEST_FITTING_BPE)
    # Tokens for all frequent characters, in addition to the merges.
    n_seeds = len(character_tokens(frequent_characters(read), _MAX_CHARACTERS))
    return train_bpe(chain(read, texts), vocab_size + n_seeds, n_seeds=n_seeds)


def train_bpe(
    texts: Iterable[str], vocab_size: int, *, n_seeds: int | None = None
) -> TiktokenTokenizer:
    """Train a vocabulary of merged bytes or of merged characters, whichever gives fewer tokens.

    Only the first BPE_TRAINING_BYTES of text are read. A corpus with too few distinct pairs gives
    a smaller vocabulary than requested. Frequent non-ASCII characters become tokens first (see
    characters.py).

    Args: vocab_size, total number of tokens: 256 bytes, the merges, then ``<|endoftext|>``;
        n_seeds, maximum number of tokens for characters, by default half of those after the bytes.
    Raises: ConfigError if vocab_size leaves no room for a merge.
    Source: Sennrich et al. 2016, arXiv:1508.07909.
    """
    if vocab_size <= 257:
        raise ConfigError(
            f"bpe:{vocab_size} leaves no room for merges: 256 bytes and {END_OF_TEXT} are always "
            "included. Try bpe:1024, or the tokenizer bytes."
        )
    read = list(map(well_formed, first_texts(texts, BPE_TRAINING_BYTES)))
    characters = frequent_characters(first_texts(read, CHARACTER_COUNT_BYTES))
    seeds = character_tokens(characters, (vocab_size - 257) // 2 if n_seeds is None else n_seeds)
    parts = (part for text in read for part in split_whitespace(text))
    trainer = rustbpe.Tokenizer()
    # Extra merges, because those that build the same characters in other ways are discarded.
    n_learned = vocab_size - 1 + 2 * len(seeds)
    trainer.train_from_iterator(parts, n_learned, pattern=BPE_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    name = f"bpe:{vocab_size}"
    if not seeds:
        return _with_end(name, ranks)
    texts = first_texts(read, CHARACTER_TRAINING_BYTES)
    beginning = [part for text in texts for part in split_whitespace(text)]
    learned = (sorted(ranks, key=ranks.__getitem__), merged_characters(beginning, vocab_size))
    found = [_with_end(name, joined_ranks(seeds, each, vocab_size - 1)) for each in learned]
    sample = first_texts(read, CHARACTER_COUNT_BYTES)
    return min(found, key=lambda tokenizer: sum(map(len, map(tokenizer.encode_array, sample))))


def _with_end(name: str, ranks: dict[bytes, int]) -> TiktokenTokenizer:
    """Return the tokenizer with these ranks, followed by an end-of-text token."""
    encoding = make_encoding(name, BPE_PATTERN, ranks, {END_OF_TEXT: len(ranks)})
    return TiktokenTokenizer(name, encoding)


def merged_characters(texts: list[str], n_merges: int) -> list[bytes]:
    """Learn merges of whole characters with the tokenizers library; return the tokens in order.

    If all characters begin with the same two bytes, as in Devanagari, byte merges join the end of
    one character to the beginning of the next. If most characters are rare, as in Chinese, byte
    merges may be better, because they join parts of rare characters.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    longest = MAX_LEARNED_BYTES // 4
    alphabet = sorted(set().union(*texts))
    learner = Tokenizer(models.BPE())
    # The library takes quadratic time for long pieces, which scripts without spaces have.
    patterns = (BPE_PATTERN, rf"[\s\S]{{1,{longest}}}")
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    learner.pre_tokenizer = pre_tokenizers.Sequence(splits)
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + n_merges,
        initial_alphabet=alphabet,
        max_token_length=longest,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    ids = learner.get_vocab()
    return [token.encode() for token in sorted(ids, key=ids.__getitem__)]


def first_texts(texts: Iterable[str], n_bytes: float) -> list[str]:
    """Return the first texts that total at least n_bytes, or all texts."""
    read: list[str] = []
    for text in texts:
        read.append(text)
        n_bytes -= len(text.encode("utf-8", "replace"))
        if n_bytes <= 0:
            break
    return read
