"""Documents -> arrays of tokens, several at once, in the order of the documents.

Threads are enough: tiktoken encodes without holding Python's lock.
"""

import os
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.text.corpus import Document
from minigpt.text.tokenizer import Tokenizer

CHUNK_CHARS = 2**20
MOST_WORKERS = 16
"""Unless asked for: every worker holds some megabytes, and one thread reads for all."""


@dataclass(frozen=True)
class Encoded:
    """Some pieces of documents, one after the other, as tokens."""

    tokens: npt.NDArray[Any]
    """With the separators before the documents that begin here."""
    n_pieces: int
    n_documents: int
    """How many begin here."""
    n_bytes: int
    """UTF-8 bytes of the text."""
    last: Document
    """The last of the pieces."""


def default_workers() -> int:
    """Return how many threads this process may keep busy, at most MOST_WORKERS."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return min(os.cpu_count() or 1, MOST_WORKERS)


def encoded(
    pieces: Iterable[Document], tokenizer: Tokenizer, dtype: str, n_workers: int
) -> Generator[Encoded]:
    """Encode documents, and yield their tokens in order, whatever the number of workers.

    Memory holds about CHUNK_CHARS characters and their tokens, twice for each worker.

    Raises: DataError if the vocabulary lacks a byte, and what reading ``pieces`` raises.
    """
    pool = ThreadPoolExecutor(n_workers, thread_name_prefix="encode")
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in _chunks(pieces):
            waiting.append(pool.submit(_encode, chunk, tokenizer, dtype))
            if len(waiting) >= 2 * n_workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(pieces: Iterable[Document]) -> Iterator[list[Document]]:
    """Bring small documents together: a task for each would cost more than its encoding."""
    chunk: list[Document] = []
    n_chars = 0
    for piece in pieces:
        chunk.append(piece)
        n_chars += len(piece.text)
        if n_chars >= CHUNK_CHARS:
            yield chunk
            chunk, n_chars = [], 0
    if chunk:
        yield chunk


def _encode(chunk: list[Document], tokenizer: Tokenizer, dtype: str) -> Encoded:
    separator = np.array(tokenizer.separator, np.uint32)
    arrays = []
    for piece in chunk:
        if piece.is_start:
            arrays.append(separator)
        arrays.append(tokenizer.encode_array(piece.text, is_start=piece.is_start))
    return Encoded(
        tokens=np.concatenate(arrays, dtype=dtype, casting="unsafe"),
        n_pieces=len(chunk),
        n_documents=sum(piece.is_start for piece in chunk),
        n_bytes=sum(len(piece.text.encode()) for piece in chunk),
        last=chunk[-1],
    )
