"""Texts on which tokenizers tend to differ: Unicode, digits, white space, emoji, code."""

import random
from pathlib import Path

SAMPLE = Path(__file__).with_name("test_tokenizer_json.py").read_text(encoding="utf-8")
CHARACTERS = (
    "aaaaabbbccdehlnorstvABSTW''     \t\n\r\r\n0123456789٣५½.,;:!?-_()<>|{}é\u0301ßKİ漢字かな한🙂"
    "👩\u200d\u2019\u017f\u00a0\u0085\u2028\u3000\x00\x0b\x1c\x7f\ufeff\ufffd\U0001d400"
    "\u212b\u1100\u1161\u0338\u2160\u00b2\u2581"
)


def fuzzed_texts(n: int, words: tuple[str, ...] = ()) -> list[str]:
    """Return fixed texts and n random ones of characters, code and words."""
    draw = random.Random(3)
    usual = ("'ll", "'VE", " 's", "12345", "  \n ", "the ", "aaaa", "  7", "e\u0301")
    words = (*CHARACTERS, *SAMPLE.split(), *usual, *(words * 20))
    drawn = ("".join(draw.choices(words, k=draw.randrange(1, 40))) for _ in range(n))
    return ["", " ", SAMPLE, *drawn]
