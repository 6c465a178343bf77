"""Settings of the text that a run trains on."""

import codecs
from dataclasses import dataclass
from typing import Literal

from minigpt.errors import cut
from minigpt.fields import check_fields, option, require

DEFAULT_TEXT = "builtin:tales"
"""Text used if none is given."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text to train on and its tokenizer."""

    paths: tuple[str, ...] = (DEFAULT_TEXT,)
    """Files, folders, globs, corpus names, or - for standard input. Empty, as in the config.toml of
    old runs, means ``builtin:python``."""
    tokenizer: str = option("bytes", metavar="NAME")
    """Tokenizer: bytes, bpe, bpe:N, gpt2, cl100k_base or o200k_base. bpe is trained on the corpus,
    with a vocabulary size that depends on it, or of N tokens. With ``from``, the model's."""
    special: bool = option(False)
    """Parse special tokens in the text, such as <|endoftext|>, which then ends a document."""
    skip_unencodable: bool = option(False)
    """Skip and count characters that are not in the vocabulary."""
    chat: bool = option(False)
    """Read rows as conversations: messages, prompt and completion, or instruction and output."""
    loss_on: Literal["completion", "all"] | None = option(None, shown="completion with --chat")
    """Conversation tokens that the loss is averaged over. completion: the assistant's."""
    chat_template: str | None = option(None, metavar="FILE", shown="the model's, or a plain one")
    """Chat template: a Jinja file, or the name of one of several in the model folder."""
    format: Literal["text", "jsonl", "json", "csv", "parquet"] | None = option(
        None, shown="by suffix or content"
    )
    """Format of all files. None detects it for each file, from its suffix or first rows."""
    field: str = option("text", metavar="NAME")
    """Field or column with the text of each row (JSONL, JSON, CSV, Parquet); data.text for a nested
    field."""
    encoding: str = option("utf-8", metavar="NAME")
    """Character encoding of the files, as named in Python: utf-16, cp1252, gb18030."""
    skip_bad: bool = option(False)
    """Skip and count rows that have no text, are malformed or cannot be decoded."""
    val_fraction: float = option(0.1, "[0, 1)", metavar="F")
    """Fraction of the text held out for validation; 0 to train on all. ``bpe`` is not trained on
    it."""
    val_split: Literal["tail", "documents"] | None = option(
        None, shown="documents if there are at least ten"
    )
    """Part of the text held out for validation. documents: those chosen by a hash of their text;
    tail: the last tokens. None derives documents if there are at least ten, else tail."""
    val: tuple[str, ...] = option((), metavar="DATA")
    """Separate validation text, instead of a fraction; repeat for several."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.paths:
            object.__setattr__(self, "paths", ("builtin:python",))
        try:
            is_text = codecs.lookup(self.encoding)._is_text_encoding
            b"text".decode(self.encoding, "ignore")  # fails for codecs of host names
        except (LookupError, ValueError):  # ValueError: NUL in the name, or UnicodeError
            is_text = False
        require(
            is_text,
            f"unknown encoding {cut(self.encoding)}. Use a name that Python knows, such as utf-8, "
            "utf-16, cp1252, latin-1, gb18030, big5 or shift_jis.",
        )
        require(
            [*self.paths, *self.val].count("-") < 2,
            "standard input, -, can be read only once. Name a file for the other text.",
        )
        require(
            self.chat or (self.loss_on is None and self.chat_template is None),
            "loss_on and chat_template are for conversations. Give --chat too, or leave them out.",
        )
        require(
            not self.chat or not (self.special or self.field != "text"),
            "special and field have no effect on conversations. Leave them out, or --chat.",
        )
        if self.chat and self.loss_on is None:
            object.__setattr__(self, "loss_on", "completion")
        require(
            not self.val or (self.val_split is None and self.val_fraction == 0.1),
            "val is the whole validation text, so val_split and val_fraction do not go with it. "
            "Leave them out.",
        )
