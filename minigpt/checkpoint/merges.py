"""The two ways to write down what BPE learnt: tiktoken's ranks, and the merges of tokenizers.

tiktoken knows ranks: of all neighbouring parts whose union is a token, the one of least rank is
merged, leftmost first. tokenizers knows merges: an ordered list of pairs. One determines the
other. Parts that end up inside a token were merged as if it stood alone, since any merge across
its borders would have swallowed a border for good; so each token has one pair that can make it,
the last of its merges in isolation, and pairs in the order of their tokens' ranks merge alike.
Any other pair of a token never meets, and a token without such a pair is never merged.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from minigpt.errors import CheckpointError

Pair = tuple[bytes, bytes]

_NO_RANK = 2**32
_Made = dict[bytes, tuple[int, bytes, bytes]]  # token -> when it is made, and of which parts


def unsupported(what: str) -> CheckpointError:
    """Return the error for a tokenizer.json that would encode otherwise than we can."""
    return CheckpointError(
        f"tokenizer.json has {what}, which is not read. Choose a model with the BPE of GPT-2, "
        "Llama, Mistral or Qwen."
    )


def merges_of(ranks: Mapping[bytes, int], atoms: Iterable[bytes] | None = None) -> list[Pair]:
    """Return the pair that makes each token that is no atom, in the order of the ranks.

    A token that merging never reaches has none.

    Args: atoms, the tokens that are there before the first merge; by default, the single bytes.
    """
    made = _atoms((token for token in ranks if len(token) == 1) if atoms is None else atoms)
    tokens = sorted(ranks.keys() - made.keys(), key=ranks.__getitem__)
    pairs = {}
    for token in tokens:
        splits = ((token[:i], token[i:]) for i in range(1, len(token)))
        pair = next((pair for pair in splits if _is_last_merge(*pair, made, ranks)), None)
        if pair:
            made[token] = ranks[token], *pair
        pairs[token] = pair or _last_merge(token, made, ranks)
    return [pair for pair in pairs.values() if pair]


def merge_order(
    merges: Sequence[Pair], ids: Mapping[bytes, int], atoms: Iterable[bytes], *, keeps_whole: bool
) -> list[bytes]:
    """Return the tokens that are no atoms in an order of ranks that encodes as the merges do.

    It is the order of the ids where that is possible.

    Args: merges, in order, of tokens that ids has; ids, of all tokens; atoms, the tokens that are
        there before the first merge. keeps_whole: a text that is a token becomes it even if
        merging does not (ignore_merges); else tokens that merging never reaches are left out.
    Raises: CheckpointError if there is none.
    """
    if len(set(merges)) < len(merges):
        raise unsupported("a merge that is there twice")
    made = _atoms(atoms)
    listed = list(dict.fromkeys(left + right for left, right in merges))
    whole = ids.keys() - made.keys() - set(listed) if keeps_whole else set()
    order = listed + sorted(whole, key=ids.__getitem__)
    if all(ids[first] < ids[second] for first, second in pairwise(listed)):
        order.sort(key=ids.__getitem__)
    ranks = {token: rank for rank, token in enumerate(order)}
    for left, right in merges:
        if left + right not in made and _is_last_merge(left, right, made, ranks):
            made[left + right] = ranks[left + right], left, right
    pairs = {
        token: made[token][1:] if token in made else _last_merge(token, made, ranks)
        for token in order
    }
    reached = [token for token in order if pairs[token]]
    if [pair for pair in merges if pair == pairs[b"".join(pair)]] != [pairs[t] for t in reached]:
        raise unsupported("merges that are not in the order of their tokens")
    return order if keeps_whole else reached


def _atoms(tokens: Iterable[bytes]) -> _Made:
    return {token: (-1, b"", b"") for token in tokens}


def _last_merge(token: bytes, made: _Made, ranks: Mapping[bytes, int]) -> Pair | None:
    """Merge a token as if alone, plainly; return its last two parts, None if more are left."""
    parts, start = [], 0
    for end in range(1, len(token) + 1):
        if made.get(token[start:end], (0,))[0] < 0:  # an atom
            parts.append(token[start:end])
            start = end
    if start < len(token):
        return None
    while len(parts) > 2:
        unions = [ranks.get(left + right, _NO_RANK) for left, right in pairwise(parts)]
        i = unions.index(min(unions))
        if unions[i] == _NO_RANK:
            return None
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def _is_last_merge(left: bytes, right: bytes, made: _Made, ranks: Mapping[bytes, int]) -> bool:
    """Tell whether the bytes of left + right, merged as if alone, end as these two parts.

    Takes the merges of both apart, the last one first: at no moment may the two parts that meet
    at the border have been next in the order of ranks.
    """
    if left not in made or right not in made:
        return False
    left_until = right_until = _NO_RANK  # when the part at the border is merged into a larger one
    while True:
        (left_rank, _, tail), (right_rank, head, _) = made[left], made[right]
        if left_rank > right_rank:
            left, left_until = tail, left_rank
        elif right_rank >= 0:  # of equal ranks the rightmost is merged last
            right, right_until = head, right_rank
        else:
            return True
        rank = ranks.get(left + right, _NO_RANK)
        if rank < left_until and rank <= right_until:
            return False
