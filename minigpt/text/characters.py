"""Byte-pair vocabularies in which each frequent character is one token.

If the alphabet is large, as in Chinese, merges learned from bytes spend most of a small vocabulary
on parts of characters: most characters then take two or three tokens, and generated text may end
inside a character.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

COVERED = 0.995
"""Share of a text's characters that are to be one token each; ASCII characters always are."""
MAX_LEARNED_BYTES = 256
"""Maximum bytes of a learned token: longer ones come from repeated text and are slow to check."""
_NO_RANK = 2**32


def frequent_characters(texts: Iterable[str]) -> list[str]:
    """Return the characters that must become tokens to cover texts, most frequent first.

    Characters that occur once are left out, because nothing can be learned about them. Texts with
    few non-ASCII characters need none.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    total = counts.total()
    covered = sum(n for character, n in counts.items() if character.isascii())
    chosen = []
    for character, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        if covered >= COVERED * total or n < 2:
            break
        if not character.isascii():
            chosen.append(character)
            covered += n
    return chosen


def character_tokens(characters: Iterable[str], room: int) -> list[bytes]:
    """Return at most ``room`` tokens that build these characters byte by byte.

    They must be merged before all others, so that the bytes of one character are joined before
    bytes of two characters can be.
    """
    tokens: dict[bytes, None] = {}
    for character in characters:
        data = character.encode()
        new = [data[:n] for n in range(2, len(data) + 1) if data[:n] not in tokens]
        if len(tokens) + len(new) > room:
            break
        tokens |= dict.fromkeys(new)
    # Shortest first, so that the first bytes of a character have a lower rank than all of them.
    return sorted(tokens, key=len)


def joined_ranks(
    seeds: Sequence[bytes], learned: Iterable[bytes], n_tokens: int
) -> dict[bytes, int]:
    """Return ranks of the bytes, the seeds, and the learned tokens that merges can still build.

    Args: learned, tokens in the order of their merges; n_tokens, maximum number of ranks.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in seeds:
        ranks[token] = len(ranks)
    for token in learned:
        if len(ranks) == n_tokens:
            break
        is_new = token not in ranks and not _joins_parts_of_characters(token)
        if is_new and len(token) <= MAX_LEARNED_BYTES and len(last_parts(token, ranks)) == 2:
            ranks[token] = len(ranks)
    return ranks


def _joins_parts_of_characters(token: bytes) -> bool:
    """Return whether a token has bytes of several characters, but not all bytes of each."""
    try:
        token.decode()
    except UnicodeDecodeError:
        # Only the first byte of a character is outside 0x80 to 0xBF.
        return any(byte & 0xC0 != 0x80 for byte in token[1:])
    return False


def last_parts(token: bytes, ranks: Mapping[bytes, int]) -> list[bytes]:
    """Return the parts of a token before its last merge: two, or more if merges cannot build it.

    Of all adjacent pairs whose union is a token, the one with the lowest rank is merged first.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        unions = [ranks.get(left + right, _NO_RANK) for left, right in pairwise(parts)]
        i = unions.index(min(unions))
        if unions[i] == _NO_RANK:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts
