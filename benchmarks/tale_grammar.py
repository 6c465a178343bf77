"""Generate short tales from a grammar, and print some of them.

    python benchmarks/tale_grammar.py [N]

The grammar, tale_grammar.toml, has plots with choices and slots. From 20,000 of its tales,
checkpoints/storyteller learned that names, things and places stay the same within a tale.
"""

import random
import re
import sys
import tomllib
from pathlib import Path

GRAMMAR = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
CHOICE = re.compile(r"\[([^\[\]]*)\]")
N_DRAWN = {
    "home": 1,
    "place": 1,
    "thing": 2,
    "food": 2,
    "treasure": 1,
    "time": 1,
    "work": 1,
    "hide": 2,
    "find": 1,
    "beast": 2,
}
"""Number of phrases that a tale draws from each list; the second thing is ``{thing2}``."""

BEGINNINGS = ("B", "D", "F", "G", "H", "K", "L", "M", "N", "P", "R", "S", "T", "V", "W", "Z")
BEGINNINGS += ("Br", "Ch", "Fl", "Gr", "Pl", "Qu", "Sh", "Tr", "Y", "J", "")
MIDDLES = ("b", "d", "l", "lm", "m", "nd", "n", "p", "r", "rb", "rl", "s", "ss", "t", "v", "z")


class Phrase(str):
    """A phrase of a tale; ``{phrase:first}`` is its form at the beginning of a sentence."""

    __slots__ = ()

    def __format__(self, form: str) -> str:
        return self[:1].upper() + self[1:] if form == "first" else str(self)


class Character:
    """A character of a tale, whose attributes are the slots of the grammar."""

    def __init__(self, draw: random.Random, others: "list[Character]") -> None:
        """Draw a character that differs from the others in kind and name."""
        taken = {word for c in others for word in (c.kind, c.call)}
        is_beast, is_she = draw.random() < 0.5, draw.random() < 0.5
        kinds = GRAMMAR["beasts" if is_beast else "women" if is_she else "men"]
        names = GRAMMAR["names_she" if is_she else "names_he"]
        self.kind: str = draw.choice([kind for kind in kinds if kind not in taken])
        name: str = draw.choice([name for name in names if name not in taken])
        if draw.random() < 0.6:  # a name that occurs in no other tale must be copied
            name = invented(draw, is_she=is_she)
        self.he, self.him, self.his = ("she", "her", "her") if is_she else ("he", "him", "his")
        self.He, self.His, self.self = self.he.title(), self.his.title(), f"{self.him}self"
        is_named = draw.random() < 0.8
        trait = draw.choice(GRAMMAR["traits"])
        is_plain = trait in self.kind or draw.random() < 0.3
        self.plain = f"a {self.kind}" if is_plain else f"a {trait} {self.kind}"
        long = self.plain[2:] if draw.random() < 0.4 else self.kind
        self.name = Phrase(name if is_named else f"the {long}")
        self.call: str = name if is_named else self.kind
        self.intro = f"{self.plain} named {name}" if is_named else self.plain
        self.Intro = f"A{self.intro[1:]}"
        is_called = f"{self.his} name was {name}"
        self.name_or_it = f"and {is_called}" if is_named else f"and {self.he} could talk"

    def __format__(self, form: str) -> str:
        return format(self.name, form)


def invented(draw: random.Random, *, is_she: bool) -> str:
    """Return a name of two or three syllables."""
    endings = ("a", "i", "ie", "una", "ella") if is_she else ("o", "in", "us", "ek", "um")
    middle = "".join(
        draw.choice("aeiou") + draw.choice(MIDDLES) for _ in range(draw.choice([1, 1, 2]))
    )
    return (draw.choice(BEGINNINGS) + middle + draw.choice(endings)).title()


def tell(draw: random.Random) -> str:
    """Return a tale."""
    hero = Character(draw, [])
    friend = Character(draw, [hero])
    other = Character(draw, [hero, friend])
    slots: dict[str, object] = {"hero": hero, "friend": friend, "other": other}
    for name, n in N_DRAWN.items():
        first, *second = map(Phrase, draw.sample(GRAMMAR[f"{name}s"], n))
        slots |= {name: first} | {f"{name}2": phrase for phrase in second}
    slots["girl"] = draw.choice(GRAMMAR["names_she"])
    slots["giant"] = draw.choice([n for n in GRAMMAR["names_he"] if n != hero.call])
    if draw.random() < 0.6:
        slots["girl"], slots["giant"] = invented(draw, is_she=True), invented(draw, is_she=False)
    for name in ("sibling", "sibling2", "sibling3"):
        slots[name] = invented(draw, is_she=False)
    text = draw.choice(GRAMMAR["plots"])
    text = text.replace("{opening}", draw.choice(GRAMMAR["openings"]))
    text = text.replace("{ending}", draw.choice(GRAMMAR["endings"]))
    if draw.random() < 0.35:
        opening, *rest = text.split("\n\n")
        text = "\n\n".join([f"{opening} {draw.choice(GRAMMAR['details'])}", *rest])
    while CHOICE.search(text):
        text = CHOICE.sub(lambda found: draw.choice(found[1].split("|")), text)
    return proofread(text.format(**slots))


def proofread(text: str) -> str:
    """Return a text with corrected commas in quotes, spaces, capitals and articles."""
    text = re.sub(r'([?!.])[,!]"', r'\1"', text)
    text = re.sub(r" +", " ", text).replace(" \n", "\n").strip()
    begins = r'((?:^|\n\n|[.!?]"? )"?)(a|an|the) '
    text = re.sub(begins, lambda found: f"{found[1]}{found[2].title()} ", text)
    return re.sub(r"\b([Aa]) (?=[aeiou]|honest)", r"\1n ", text)


if __name__ == "__main__":
    for i in range(int(sys.argv[1]) if sys.argv[1:] else 3):
        print(f"{tell(random.Random(i))}\n")
