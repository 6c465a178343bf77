"""One Tokenizer over a ``tiktoken.Encoding``: single bytes, trained BPE, named encodings.

tiktoken and rustbpe panic on some inputs, with an exception that ``except Exception`` lets pass;
everything that could make them panic is caught here first.
"""

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import rustbpe
import tiktoken

from minigpt.errors import ConfigError, DataError, nearest
from minigpt.text.rules import NO_RULES, NORMALIZATIONS, VISIBLE_SPACE, Rules

Ids = TypeVar("Ids")

END_OF_TEXT = "<|endoftext|>"
NAMED_ENCODINGS = ("gpt2", "cl100k_base", "o200k_base")

BYTES_PATTERN = r"(?s:.)"
# How GPT-4 and Llama 3 split text before merging: Dubey et al. 2024, arXiv:2407.21783, and
# tiktoken's cl100k_base. It uses no possessive quantifiers, so every regex engine reads it.
BPE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BPE_TRAINING_BYTES = 64 * 2**20
# What the spec ``bpe`` takes: docs/training.md has the losses.
BYTES_PER_MERGE = 1000
LARGEST_FITTING_BPE = 1024

# The backtracking of \s+(?!\S) overflows the regex engine's stack at about a million blanks.
_LONG_BLANK = re.compile(r"(\s{65536})")


class Tokenizer:
    """Text <-> token ids, over one ``tiktoken.Encoding``."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, rules: Rules = NO_RULES) -> None:
        """Args: name, what makes it again (``bytes``, ``bpe:1024``, ``gpt2``); encoding; rules."""
        self.name = name
        self.encoding = encoding
        self.rules = rules
        self.vocab_size = len(rules.tokens) or encoding.n_vocab
        """Ids run from 0 to vocab_size - 1; some encodings leave holes among them."""
        specials = encoding._special_tokens.items()
        self.special_ids: Mapping[str, int] = {text: self._ids([n])[0] for text, n in specials}
        """Special tokens, such as ``<|endoftext|>``."""
        usual = [self.special_ids[END_OF_TEXT]] if END_OF_TEXT in self.special_ids else []
        self.end_of_text: int | None = next(iter([*usual, *rules.end_of_text]), None)
        """The id that ends a document, None if the vocabulary has none."""
        self.end_of_text_ids = rules.end_of_text or tuple(usual)
        """The ids with which a model ends a text."""
        ranks = encoding._mergeable_ranks
        self._single_bytes = bytes(b for b in range(256) if bytes([b]) in ranks)
        is_plain = len(ranks) == 256 and all(ranks.get(bytes([b])) == b for b in range(256))
        self._is_bytes = is_plain and rules == NO_RULES
        longest_first = sorted(rules.added, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @property
    def separator(self) -> tuple[int, ...]:
        """The ids before each document of a corpus: an end of text, then what begins a prompt.

        A vocabulary that has neither gives none: documents then follow each other as they are.
        """
        if self.end_of_text is None or self.end_of_text in self.rules.prefix:
            return self.rules.prefix
        return (self.end_of_text, *self.rules.prefix)

    def encode(self, text: str, *, is_start: bool = True) -> list[int]:
        """Return the ids of a text; ``<|endoftext|>`` in it is plain text.

        Lone surrogates become U+FFFD; blanks of 65,536 characters and more are cut.
        Args: is_start, False for a later piece of a text, which gets no space before it.
        Raises: DataError if the vocabulary lacks one of the text's bytes.
        """
        text = well_formed(text)
        if not self.rules.added:
            return self._encode_plain(text, is_start)
        ids: list[int] = []
        for i, part in enumerate(self._added.split(text)):
            is_added = i % 2 == 1  # what a group of the pattern matched stands at the odd places
            ids += [self.special_ids[part]] if is_added else self._encode_plain(part, is_start)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids that a model goes on from: what stands before every prompt, then the text.

        No text is the beginning of a document; it has no ids if the vocabulary has no token for it.
        Raises: DataError as ``encode``.
        """
        begin = list(self.rules.prefix)
        if not text and not begin and self.end_of_text is not None:
            begin = [self.end_of_text]
        return begin + self.encode(text)

    def _encode_plain(self, text: str, is_start: bool) -> list[int]:
        ids: list[int] = []
        for part in self._plain_parts(text, is_start):
            ids += self._ids(self._guarded(self.encoding.encode_ordinary, part))
        return ids

    def _plain_parts(self, text: str, is_start: bool) -> list[str]:
        """Return a text, without added tokens, as what is split and merged part by part."""
        if is_start or not self.rules.normalization.startswith("metaspace"):
            text = NORMALIZATIONS[self.rules.normalization](text)
        else:
            text = text.replace(" ", VISIBLE_SPACE)
        self._check_bytes(text)
        return _parts(text)

    def _ids(self, numbers: list[int]) -> list[int]:
        of_number = self.rules.ids
        return [i for n in numbers for i in of_number[n]] if of_number else numbers

    def encode_array(self, text: str, *, is_start: bool = True) -> npt.NDArray[np.uint32]:
        """Return what ``encode`` returns, as uint32; for single bytes without tiktoken.

        A list of ids, where one can be avoided, would take as long as a tenth of the encoding.
        """
        text = well_formed(text)
        if self._is_bytes:
            return np.frombuffer(text.encode(), np.uint8).astype(np.uint32)
        if self.rules.ids or (self.rules.added and self._added.search(text)):
            return np.array(self.encode(text, is_start=is_start), np.uint32)
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        arrays = [self._guarded(encode, part) for part in self._plain_parts(text, is_start)]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids; an id that the vocabulary does not use has none."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; what is no UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one id: a special token's text, b"" if the id is not used.

        Models often have more rows than the vocabulary has tokens, and may draw one of them.
        """
        return self._bytes_of.get(int(token), b"")

    @cached_property
    def token_byte_lengths(self) -> npt.NDArray[np.int32]:
        """Bytes of text that each id stands for, (V,); 0 for special tokens and holes."""
        lengths = np.zeros(self.vocab_size, np.int32)
        for token, token_bytes in self._bytes_of.items():
            lengths[token] = len(token_bytes)
        are_no_text = self.special_ids.keys() - set(self.rules.added)
        lengths[[self.special_ids[text] for text in are_no_text]] = 0
        return lengths

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over pattern, ranks, special tokens and rules: equal iff they encode alike."""
        parts = {key: value for key, value in self.to_dict().items() if key != "name"}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the whole tokenizer as JSON values, for ``from_dict``; tokens are base64."""
        ranks = sorted(self.encoding._mergeable_ranks.items(), key=lambda item: item[1])
        parts = {
            "name": self.name,
            "pattern": self.encoding._pat_str,
            "ranks": {base64.b64encode(token).decode(): rank for token, rank in ranks},
            "specials": dict(self.encoding._special_tokens),
        }
        return parts if self.rules == NO_RULES else parts | {"rules": self.rules.to_dict()}

    @classmethod
    def from_dict(cls, parts: Mapping[str, Any]) -> "Tokenizer":
        """Rebuild a tokenizer from ``to_dict``.

        Raises: DataError if a part is missing or damaged.
        """
        try:
            name, pattern = str(parts["name"]), str(parts["pattern"])
            ranks = {base64.b64decode(t, validate=True): int(r) for t, r in parts["ranks"].items()}
            specials = {str(text): int(token) for text, token in parts["specials"].items()}
            rules = Rules.from_dict(parts["rules"]) if "rules" in parts else NO_RULES
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise DataError(f"the saved vocabulary is damaged: {error!r}.") from None
        return cls(name, make_encoding(name, pattern, ranks, specials), rules)

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        tokens = {rank: token for token, rank in self.encoding._mergeable_ranks.items()}
        if self.rules.tokens:
            tokens = dict(enumerate(self.rules.tokens))
        return tokens | {i: text.encode() for text, i in self.special_ids.items()}

    def _check_bytes(self, text: str) -> None:
        if len(self._single_bytes) == 256:
            return
        lacking = text.encode().translate(None, self._single_bytes)
        if lacking:
            raise DataError(
                f"the vocabulary {self.name!r} has no token for the byte {lacking[:1]!r}. "
                "Leave that character out of the text."
            )

    def _guarded(self, encode: Callable[[str], Ids], part: str) -> Ids:
        try:
            return encode(part)
        except BaseException as error:
            # PanicException cannot be imported, and is no Exception.
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the split pattern of {self.name!r} gave up on this text ({error}). "
                "Break its longest runs of the same character."
            ) from None


def make_encoding(
    name: str, pattern: str, ranks: Mapping[bytes, int], specials: Mapping[str, int]
) -> tiktoken.Encoding:
    """Build a ``tiktoken.Encoding`` from its parts.

    Args: pattern, the regex that splits text before merging; ranks, token bytes -> id, where a
        lower id merges first; specials, text -> id.
    Raises: DataError if there are no ranks, two tokens share an id, or the pattern is no regex.
    """
    ids = [*ranks.values(), *specials.values()]
    if not ranks or len(set(ids)) != len(ids) or min(ids) < 0:
        raise DataError(f"the vocabulary {name!r} is empty, or two of its tokens share an id.")
    try:
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
        )
    except ValueError as error:
        raise DataError(f"the split pattern of {name!r} is no regex: {error}.") from None


def bytes_tokenizer() -> Tokenizer:
    """Return the tokenizer whose ids are the bytes themselves, and 256 for ``<|endoftext|>``."""
    ranks = {bytes([b]): b for b in range(256)}
    return Tokenizer("bytes", make_encoding("bytes", BYTES_PATTERN, ranks, {END_OF_TEXT: 256}))


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn byte-pair merges from texts, with rustbpe.

    Only the first BPE_TRAINING_BYTES of text are read. A corpus with too few distinct pairs gives
    a smaller vocabulary than asked for.

    Args: vocab_size, all tokens: 256 bytes, the merges, ``<|endoftext|>`` last.
    Raises: ConfigError if vocab_size leaves no room for a merge.
    Source: Sennrich et al. 2016, arXiv:1508.07909.
    """
    if vocab_size <= 257:
        raise ConfigError(
            f"bpe:{vocab_size} leaves no room for merges: 256 bytes and {END_OF_TEXT} are always "
            "there. Try bpe:1024, or the tokenizer bytes."
        )
    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(_first_bytes(texts), vocab_size - 1, pattern=BPE_PATTERN)
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    name = f"bpe:{vocab_size}"
    return Tokenizer(name, make_encoding(name, BPE_PATTERN, ranks, {END_OF_TEXT: len(ranks)}))


def named_tokenizer(name: str) -> Tokenizer:
    """Return one of OpenAI's published tokenizers; the first use downloads its ranks.

    Raises: DataError if they can neither be found in tiktoken's cache nor downloaded.
    """
    try:
        return Tokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        raise DataError(
            f"the tokenizer {name} could not be downloaded ({type(error).__name__}). Connect to "
            "the internet once, point TIKTOKEN_CACHE_DIR at a folder that has its ranks, or use "
            "--tokenizer bytes."
        ) from None


def parse_spec(spec: str) -> tuple[str, int]:
    """Split a tokenizer's spec into its kind and vocabulary size: ``bpe:1024`` -> (bpe, 1024).

    The size is 0 where the kind or, for ``bpe``, the corpus settles it.
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
    """Make the tokenizer that a spec names; texts are read only if it has to be trained.

    Raises: ConfigError for an unknown spec; DataError if it cannot be had.
    """
    kind, vocab_size = parse_spec(spec)
    if kind == "bytes":
        return bytes_tokenizer()
    if kind != "bpe":
        return named_tokenizer(kind)
    if not vocab_size:
        vocab_size, texts = _fitting_vocab_size(texts)
    return train_bpe(texts, vocab_size)


def _fitting_vocab_size(texts: Iterable[str]) -> tuple[int, Iterable[str]]:
    """Return how many tokens a corpus can teach, and the texts, which are read in part."""
    texts = iter(texts)
    read: list[str] = []
    n_bytes = 0
    for text in texts:
        read.append(text)
        n_bytes += len(text.encode("utf-8", "replace"))
        if n_bytes >= BYTES_PER_MERGE * LARGEST_FITTING_BPE:
            break
    # The least that leaves room for a merge is the least that train_bpe takes.
    vocab_size = min(max(258, 257 + n_bytes // BYTES_PER_MERGE), LARGEST_FITTING_BPE)
    return vocab_size, chain(read, texts)


def well_formed(text: str) -> str:
    """Return the text with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _parts(text: str) -> list[str]:
    """Cut a text inside its very long blanks, so that no regex overflows on them."""
    # Such a blank holds at least 15 neighbouring samples: most texts need no full search.
    if not re.search(r"\s{15}", text[::4096]):
        return [text]
    return [part for part in _LONG_BLANK.split(text) if part]


def _first_bytes(texts: Iterable[str]) -> Iterator[str]:
    n_bytes = 0
    for text in texts:
        yield from _parts(well_formed(text))
        n_bytes += len(text.encode("utf-8", "replace"))
        if n_bytes >= BPE_TRAINING_BYTES:
            return
