"""Choose the documents of a corpus that are held out for validation, by a hash of their text."""

import hashlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace

from minigpt.errors import ConfigError, DataError
from minigpt.text.corpus import Corpus, Document, reporter

MIN_DOCUMENTS = 10
"""Minimum number of documents for splitting by documents by default."""
MAX_MEASURED = 2**16
"""Maximum number of documents whose sizes are measured. With more, the sizes average out."""
_LARGEST = 2**64


def split(corpus: Corpus) -> Corpus:
    """Choose the documents of a corpus that are held out for validation.

    Raises: DataError if a file is in both texts; ConfigError for an option of rows without rows.
    """
    data, files = corpus.data, corpus.files
    has_rows = any(file.format != "text" for file in (*files, *corpus.val_files))
    for name, default in (("field", "text"), ("skip_bad", False)):
        if getattr(data, name) != default and not has_rows:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for files of rows, and {files[0].name!r} is text. "
                "Leave it out, or name the format with --format."
            )
    paths = [{file.path.resolve() for file in part} for part in (files, corpus.val_files)]
    if both := paths[0] & paths[1]:
        raise DataError(f"{str(min(both))!r} is in both DATA and --val. Leave it out of one.")
    if corpus.val_files or not data.val_fraction:
        return replace(corpus, val_split="own" if corpus.val_files else "none")
    if data.val_split == "tail":
        return corpus
    if data.val_split is None:
        # A text file is one document, so text files can be counted without being read.
        is_few = not has_rows and not data.special and len(files) < MIN_DOCUMENTS
        if is_few or not has_min_documents(corpus.read(files)):
            return corpus
    report = reporter(files, "split", corpus.report)
    is_validation = choose(map(report, corpus.read(files)), data.val_fraction)
    return replace(corpus, val_split="documents", is_validation=is_validation)


def has_min_documents(documents: Iterable[Document]) -> bool:
    """Return whether MIN_DOCUMENTS documents have different first pieces, without reading more.

    Copies of a document count once, because they stay on the same side of the split.
    """
    beginnings: set[str] = set()
    for document in documents:
        if document.is_start:
            beginnings.add(document.text)
        if len(beginnings) == MIN_DOCUMENTS:
            return True
    return False


def choose(documents: Iterable[Document], val_fraction: float) -> Callable[[str], bool]:
    """Choose the documents for validation; return a predicate on a document's first piece.

    The choice depends only on the texts, not on their order or a seed, and puts equal texts on
    the same side. Documents are added in the order of their hashes until they have val_fraction of
    the bytes; those that would exceed it by half are left out, but at least one is chosen.

    Raises: DataError if there are fewer than two different documents.
    """
    hashes, sizes = array("Q"), array("Q")
    for document in documents:
        if document.is_start:
            if len(hashes) == MAX_MEASURED:
                return lambda text: _hash(text) < val_fraction * _LARGEST
            hashes.append(_hash(document.text))
            sizes.append(0)
        sizes[-1] += len(document.text.encode())
    n_bytes = {h: 0 for h in hashes}
    for h, size in zip(hashes, sizes, strict=True):
        n_bytes[h] += size
    if len(n_bytes) < 2:
        raise DataError(
            f"--val-split documents needs two different documents: this text has {len(n_bytes)}. "
            "Use --val-split tail."
        )
    wanted = val_fraction * sum(sizes)
    chosen: set[int] = set()
    n_chosen = 0
    for h in sorted(n_bytes):
        if n_chosen < wanted and n_chosen + n_bytes[h] <= 1.5 * wanted:
            chosen.add(h)
            n_chosen += n_bytes[h]
    chosen = chosen or {min(n_bytes, key=lambda h: (n_bytes[h], h))}
    return lambda text: _hash(text) in chosen


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
