"""Token ids written as numbers: the text of a model without a tokenizer."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from minigpt.errors import DataError, cut
from minigpt.text.tokenizer import Tokenizer

_SEPARATORS = re.compile(r"[\s,\[\]]+")  # also those of a Python list


class TokenIdTokenizer(Tokenizer):
    """Parses text such as ``5 9 40`` as token ids, for a model folder without a tokenizer."""

    def __init__(
        self, folder: Path, n_rows: int, end_of_text_ids: tuple[int, ...] = (), *, remedy: str
    ) -> None:
        """Args: n_rows, number of rows of the model's embedding; remedy, to have a tokenizer."""
        self.folder = folder
        self.remedy = remedy
        super().__init__(
            "ids", {}, vocab_size=n_rows, textless_ids=[], end_of_text_ids=end_of_text_ids
        )

    def encode_array(
        self, text: str, *, is_start: bool = True, special: bool = False
    ) -> npt.NDArray[np.uint32]:
        words = [word for word in _SEPARATORS.split(text) if word]
        for word in words:
            is_id = word.isascii() and word.isdecimal() and len(word) < 10
            if not is_id or int(word) >= self.vocab_size:
                raise DataError(
                    f"{str(self.folder)!r} has no tokenizer.json, so text must be token ids from 0 "
                    f"to {self.vocab_size - 1}, as in '5 9 40': {cut(word)} is not one. "
                    f"{self.remedy}"
                )
        return np.array(words, np.uint32)

    def token_bytes(self, token: int) -> bytes:
        return f" {int(token)}".encode() if 0 <= token < self.vocab_size else b""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "n_ids": self.vocab_size} | self.unusual_ends
