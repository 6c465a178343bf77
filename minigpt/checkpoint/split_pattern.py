"""How a text is split before merging: tokenizer.json's steps <-> tiktoken's one regex."""

import re
from typing import Any

from tiktoken_ext.openai_public import r50k_pat_str  # type: ignore[import-untyped]

from minigpt.checkpoint.merges import unsupported
from minigpt.errors import CheckpointError

# GPT-2's pattern on the pieces between numbers, which are cut out first; where one ends, the text
# does: all blanks before it are one piece.
_BETWEEN_NUMBERS = (
    r"|'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?[^\s\p{L}\p{N}]++|\s++(?=\p{N})|\s++$|\s+(?!\S)|\s"
)
_KEEPS_MATCHES = (("Isolated", False), ("Removed", True))

# Oniguruma, which tokenizers uses, and fancy-regex, which tiktoken uses, disagree on these:
# X{1,3}+ is possessive only in fancy-regex, (?s:.) exists only there, and ^ and $ stand at every
# line's border in Oniguruma. After \s++ that is no difference: no line break can follow.
_ATOM_INTERVAL = r"(?P<atom>\\p\{\w+\}|\[[^\]]+\]|\\?[^\s{}()\[\]])(?P<interval>\{\d+(?:,\d*)?\})"
_POSSESSIVE = re.compile(_ATOM_INTERVAL + r"\+")
_ATOMIC = re.compile(rf"\(\?>{_ATOM_INTERVAL}\)")
_AMBIGUOUS = re.compile(
    r"\{\d+(?:,\d*)?\}\+|\(\?\w*[ms]\w*[:)]|(?<![\[\\])\^|(?<!\\)(?<!\\s\+\+)\$"
)


def pattern_from_json(pre_tokenizer: Any) -> str:
    """Return the regex that splits as a pre_tokenizer does.

    Raises: CheckpointError naming the step that a regex cannot say; KeyError, TypeError or
        AttributeError if a part is missing or damaged.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or kinds[:-1] not in ([], ["Split"], ["Digits"]):
        raise unsupported(f"the pre-tokenizers {str(kinds)[:60]}")
    if steps[-1].get("add_prefix_space", True):
        raise unsupported("the option add_prefix_space of its pre-tokenizer")
    if steps[-1].get("use_regex", True) != (kinds[0] != "Split"):
        raise unsupported(f"the pre-tokenizers {kinds} with use_regex {kinds[0] == 'Split'}")
    if kinds == ["ByteLevel"]:
        return str(r50k_pat_str)  # GPT-2's own, said in a faster way
    if kinds[0] == "Digits":
        return (r"\p{N}" if steps[0]["individual_digits"] else r"\p{N}++") + _BETWEEN_NUMBERS
    if (steps[0]["behavior"], steps[0]["invert"]) not in _KEEPS_MATCHES:
        found = steps[0]["behavior"], steps[0]["invert"]
        raise unsupported(f"a split whose behavior and invert are {str(found)[:60]!r}")
    return _from_oniguruma(steps[0]["pattern"]["Regex"])


def pattern_to_json(pattern: str) -> dict[str, Any]:
    """Return the first step of a pre_tokenizer that splits as a regex of tiktoken does.

    Raises: CheckpointError if the regex dialect of tokenizers cannot say it.
    """
    pattern = _POSSESSIVE.sub(r"(?>\g<atom>\g<interval>)", pattern.replace("(?s:.)", r"[\s\S]"))
    if found := _AMBIGUOUS.search(pattern):
        raise CheckpointError(
            f"the split pattern's {found[0]!r} means something else in tokenizer.json. "
            "Write the pattern without it."
        )
    kept = {"behavior": "Isolated", "invert": False}
    return {"type": "Split", "pattern": {"Regex": pattern}} | kept


def _from_oniguruma(pattern: str) -> str:
    if found := _AMBIGUOUS.search(pattern):
        raise unsupported(f"a split pattern with {found[0]!r}")
    return _ATOMIC.sub(r"\g<atom>\g<interval>+", pattern.replace(r"[\s\S]", "(?s:.)"))
