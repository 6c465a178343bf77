"""Token windows of each training step: a pure function of (seed, step, rank).

An epoch cuts the span into non-overlapping windows and visits each once, in a shuffled order that
is never stored: a keyed permutation maps each position in the order to a window.
"""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from minigpt.errors import DataError
from minigpt.text.tokens import CONTEXT_ONLY, TokenSpan

if TYPE_CHECKING:
    import torch

    Batch = tuple[torch.Tensor, torch.Tensor]
UInts = npt.NDArray[np.uint64]

N_ROUNDS = 3
_MIN_CONTEXT = 8  # the shortest context that an error message suggests
NO_TARGET = -100
"""Target of a position without loss: the default ``ignore_index`` of cross_entropy."""


def require_length(span: TokenSpan, context_length: int) -> None:
    """Check that a span has at least one window and its last target.

    Raises: DataError if it is shorter than context_length + 1 tokens.
    """
    longest = len(span) - 1
    if longest < context_length:
        shorter = f"Use a --context-length of at most {longest}, or more text."
        raise DataError(
            f"too little text: the {span.name} part has {len(span)} tokens, and a context of "
            f"{context_length} needs at least {context_length + 1}. "
            f"{shorter if longest >= _MIN_CONTEXT else 'Give more text.'}"
        )


def window_starts(
    n_tokens: int,
    context_length: int,
    batch_size: int,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    world_size: int = 1,
) -> npt.NDArray[np.int64]:
    """Return the start indices of the windows of one step.

    The batch_size windows of a step depend only on seed and step; each rank uses its slice of
    them. Every epoch shifts the grid of windows by a different phase in [0, context_length), so
    that contexts vary; only the tokens outside the grid, at both ends, are skipped.

    Args: n_tokens, at least context_length + 1; world_size divides batch_size.
    Returns: (batch_size // world_size,), each at most n_tokens - context_length - 1.
    """
    assert n_tokens > context_length
    assert batch_size % world_size == 0
    n_local = batch_size // world_size
    place = step * batch_size + rank * n_local + np.arange(n_local, dtype=np.uint64)
    # One window fewer than fits, so that every phase has the same number of windows.
    n_windows = max(1, (n_tokens - context_length) // context_length)
    n_phases = min(context_length, n_tokens - n_windows * context_length)
    epoch, index = np.divmod(place, np.uint64(n_windows))
    key = _mix(epoch + _mix(np.full(1, seed % 2**64, np.uint64)))
    window = _permute(index, n_windows, key)
    phase = _mix(~key) % np.uint64(n_phases)
    return (window * np.uint64(context_length) + phase).astype(np.int64)


def batch(span: TokenSpan, context_length: int, batch_size: int, **order: int) -> "Batch":
    """Return the inputs and targets of one step; a target is the next token.

    Args: order, arguments of ``window_starts``: seed, step, rank and world_size.
    Returns: inputs and targets, each (batch_size // world_size, T), int64. Targets without loss
        are NO_TARGET.
    Raises: DataError if the span is shorter than context_length + 1 tokens.
    """
    require_length(span, context_length)
    starts = window_starts(len(span), context_length, batch_size, **order)
    return _inputs_and_targets(span, starts, context_length, context_length)


def validation_windows(
    span: TokenSpan,
    context_length: int,
    max_tokens: int,
    batch_size: int,
    *,
    stride: int | None = None,
) -> Iterator["Batch"]:
    """Yield the batches of one pass over a span: every token except the first is a target once.

    Each window begins stride tokens after the previous one; only its last stride positions have
    targets, the others are context. Without a stride, windows do not overlap. Shorter windows
    cover the targets that no full window has, at the start and at the end. If the span has more
    than max_tokens targets, only evenly spaced full windows are used, at least one.

    Args: stride, 1 to context_length.
    Yields: inputs (B, T) with B at most batch_size, and the targets of their last S positions,
        (B, S); int64.
    Raises: DataError if the span is shorter than context_length + 1 tokens.
    Source: strided perplexity as in Hugging Face's guide, transformers/perplexity.
    """
    require_length(span, context_length)
    stride = stride or context_length
    assert 0 < stride <= context_length
    n_overlap = context_length - stride
    n_windows, n_rest = divmod(len(span) - 1 - n_overlap, stride)
    windows = np.arange(n_windows)
    is_thinned = len(span) - 1 > max_tokens
    if is_thinned:
        n_kept = min(max(1, max_tokens // stride), n_windows)
        windows = np.arange(n_kept) * n_windows // n_kept
    if n_overlap and not is_thinned:
        yield _inputs_and_targets(span, np.zeros(1, np.int64), n_overlap, n_overlap)
    for first in range(0, len(windows), batch_size):
        starts = windows[first : first + batch_size] * stride
        yield _inputs_and_targets(span, starts, context_length, stride)
    if n_rest and not is_thinned:
        starts = np.array([n_windows * stride])
        yield _inputs_and_targets(span, starts, n_overlap + n_rest, n_rest)


def _inputs_and_targets(
    span: TokenSpan, starts: npt.NDArray[np.int64], n_inputs: int, n_targets: int
) -> "Batch":
    """Return the inputs of some windows, (B, n_inputs), and the targets of their last positions."""
    import torch

    windows = span.windows(starts, n_inputs + 1)
    tokens = torch.from_numpy(windows % CONTEXT_ONLY)
    targets = torch.from_numpy(np.where(windows < CONTEXT_ONLY, windows, NO_TARGET))
    return tokens[:, :-1].contiguous(), targets[:, -n_targets:].contiguous()


def _mix(x: UInts) -> UInts:
    """Hash 64-bit numbers bijectively.

    Source: splitmix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _permute(index: UInts, n: int, key: UInts) -> UInts:
    """Map each index in [0, n) by a permutation that its key selects.

    A Feistel network (Luby and Rackoff 1988, doi:10.1137/0217022) permutes the pairs left < n_left,
    right < n_right, slightly more than n; results outside [0, n) are permuted again. Both ideas are
    from Black and Rogaway 2002, doi:10.1007/3-540-45760-7_9.
    """
    n_left = np.uint64(math.isqrt(n - 1) + 1)
    n_right = np.uint64(-(-n // int(n_left)))

    def encrypt(x: UInts, key: UInts) -> UInts:
        left, right = np.divmod(x, n_right)
        for _ in range(N_ROUNDS):
            key = _mix(key)
            left = (left + _mix(right ^ key) % n_left) % n_left
            key = _mix(key)
            right = (right + _mix(left ^ key) % n_right) % n_right
        return left * n_right + right

    window = encrypt(index, key)
    while (is_outside := window >= n).any():
        window[is_outside] = encrypt(window[is_outside], key[is_outside])
    return window
