"""Create the texts that checkpoints/storyteller was trained on, and measure and sample the model.

    python benchmarks/storyteller.py texts ../shared/data OUT   the training texts, and the
                                                                works that are held out
    python benchmarks/storyteller.py card ../shared/data        bits/byte, repeated names, and
                                                                twelve samples

The card, checkpoints/storyteller/README.md, has the commands of the training itself. Every
twentieth tale, every tenth of the short ones, four novels and 50 tales of the grammar are held out.
Hard-wrapped lines are joined into paragraphs, so that the model does not learn to break lines.
"""

import json
import lzma
import random
import re
import sys
import tempfile
import textwrap
from pathlib import Path

from tale_grammar import invented, tell

import minigpt

HELD_OUT_NOVELS = {
    "Burnett_Princess_1905",
    "Eliot_Felix_1866",
    "Kipling_Captains_1896",
    "Stevenson_Catriona_1893",
}
N_NOVELS = 48
"""Number of novels to train on: those with the shortest words and sentences."""
PIECE = 120
"""Paragraphs of a novel in one document, so that tales and novels alternate."""
N_COPIED = 2_700_000
"""Number of letters in repetitive texts, 5% of the mixture."""
N_TOLD = 20_000
"""Number of tales of the grammar in the texts of the last three runs."""
N_NAMES = 100
"""Number of new names that the model is asked to repeat."""
SAMPLES = [
    "Once upon a time",
    "There was once a king who",
    "A poor woodcutter lived",
    "One day the little girl",
    "The fox said to the bear",
    "Far away, by the sea, there lived",
]


def paragraphs(text: str) -> str:
    """Return a text with each paragraph in one line and an empty line between paragraphs."""
    text = text.replace("\ufeff", "").replace("\r", "")
    lines, parts = text.split("\n"), re.split(r"\n\s*\n", text)
    middle = sorted(map(len, lines))[len(lines) // 2]
    n_long = sum(len(line) > 120 for line in lines)
    if (middle > 90 and len(parts) < len(lines) / 5) or n_long > 0.2 * len(lines):
        parts = lines  # each line is a paragraph already
    return "\n\n".join(" ".join(part.split()) for part in parts if part.strip())


def difficulty(text: str) -> float:
    """Return words per sentence, plus 16 times the mean letters per word beyond 4.5."""
    n_words = len(text.split())
    return n_words / len(re.split(r"[.!?]+\s", text)) + 16 * (len(text) / n_words - 4.5)


def read_tales() -> list[str]:
    """Return the short tales that ship with minigpt."""
    text = (Path(minigpt.__file__).parent / "text" / "tales.txt").read_text(encoding="utf-8")
    return [tale.strip() for tale in text.split("<|endoftext|>") if tale.strip()]


def in_pieces(novels: list[str]) -> list[str]:
    """Return novels cut into documents of PIECE paragraphs."""
    pieces = []
    for novel in novels:
        parts = novel.split("\n\n")
        starts = range(0, len(parts), PIECE)
        pieces += ["\n\n".join(parts[start : start + PIECE]) for start in starts]
    return pieces


def copies(tales: list[str], draw: random.Random) -> list[str]:
    """Return repetitive texts, from which a model learns to copy (an induction head).

    Each repeats random words of the tales, or a paragraph; part of another paragraph may separate
    the first two copies.
    """
    words = sorted({word for tale in tales for word in re.findall(r"[A-Za-z]+", tale)})
    choices = [part for tale in tales for part in tale.split("\n\n") if 60 < len(part) < 500]
    documents: list[str] = []
    while sum(map(len, documents)) < N_COPIED:
        n_words = draw.randint(8, 60)
        if draw.random() < 0.7:
            piece = " ".join(draw.choice(words) for _ in range(n_words))
        else:
            piece = draw.choice(choices)
        n_times = 2 if len(piece) > 500 else draw.randint(2, 4)
        separator = draw.choice(["\n\n", "\n", " ", " ; "])
        parts = [piece] * n_times
        if draw.random() < 0.5:
            parts.insert(1, draw.choice(choices)[: draw.randint(40, 200)])
        documents.append(separator.join(parts))
    return documents


def texts(data: Path) -> dict[str, list[str]]:
    """Return the documents of each text, by its name."""
    source = (data / "fairytales.txt").read_text(encoding="utf-8")
    tales = [paragraphs(tale) for tale in source.split("<|endoftext|>") if tale.strip()]
    with lzma.open(data / "novels.jsonl.xz", "rt", encoding="utf-8") as file:
        rows = map(json.loads, file)
        novels = {row["title"]: paragraphs(row["text"]) for row in rows}
    held_out = [novels.pop(title) for title in sorted(HELD_OUT_NOVELS)]
    by_difficulty = sorted(novels.values(), key=difficulty)
    pieces, other_pieces = map(in_pieces, (by_difficulty[:N_NOVELS], by_difficulty[N_NOVELS:]))
    ours = [tale for i, tale in enumerate(tales) if i % 20 != 19]
    mixture = pieces + 5 * ours
    random.Random(7).shuffle(mixture)
    draw = random.Random(3)
    repeating = copies(ours, draw)
    with_copies = mixture + repeating
    draw.shuffle(with_copies)
    others = other_pieces + ours + repeating[: len(repeating) // 2]
    draw.shuffle(others)
    short = read_tales()
    told = [tell(random.Random(i)) for i in range(N_TOLD)]
    simple = told + 6 * [tale for i, tale in enumerate(short) if i % 10 != 9]
    simple += ours + draw.sample(pieces, 150) + repeating[-200:]
    draw.shuffle(simple)
    copied = told[:5000] + repeating[: len(repeating) // 2]
    draw.shuffle(copied)
    return {
        "mixture": mixture,
        "with-copies": with_copies,
        "other-novels": others,
        "simple": simple,
        "copied": copied,
        "short-tales-held-out": short[9::10],
        "told-held-out": [tell(random.Random(N_TOLD + i)) for i in range(50)],
        "tales-held-out": tales[19::20],
        "novels-held-out": held_out,
    }


def write(out: Path, name: str, documents: list[str]) -> None:
    """Write a text as OUT/NAME.jsonl, one document per line."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents]
    (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    n_letters = sum(map(len, documents))
    print(f"{name}.jsonl: {len(documents)} documents, {n_letters:,} letters", file=sys.stderr)


def write_texts(data: Path, out: Path) -> None:
    """Write all texts."""
    out.mkdir(parents=True, exist_ok=True)
    for name, documents in texts(data).items():
        write(out, name, documents)


def new_names(documents: list[str]) -> list[str]:
    """Return invented names, as in the grammar's tales, that occur in none of the documents."""
    known = {word for text in documents for word in re.findall(r"[A-Z][a-z]+", text)}
    draw, names = random.Random(0), list[str]()
    while len(names) < N_NAMES:
        name = invented(draw, is_she=draw.random() < 0.5)
        if name not in known | {*names}:
            names.append(name)
    return names


def n_repeated(names: list[str], ablated: str | None) -> int:
    """Return for how many names the greedy continuation of a prompt starts with the name."""
    n = 0
    for name in names:
        prompt = f"There was once a fox named {name}. One morning"
        options = {"temperature": 0, "max_new_tokens": 12, "ablate": ablated}
        steps = minigpt.generate("storyteller", prompt, **options)
        n += "".join(step.text for step in steps).startswith(f" {name}")
    return n


def card(data: Path) -> None:
    """Print the measurements and samples of the card in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        all_texts = texts(data)
        for name, documents in all_texts.items():
            write(Path(folder), name, documents)
        seen = (all_texts[name] for name in all_texts if not name.endswith("held-out"))
        names = new_names([text for documents in seen for text in documents])
        for head in (None, "4.1", "3.2"):
            print(f"without head {head}: {n_repeated(names, head)} of {N_NAMES} names repeated")
        for name in ("tales-held-out", "novels-held-out", "short-tales-held-out", "told-held-out"):
            facts = minigpt.evaluate("storyteller", f"{folder}/{name}.jsonl")
            print(f"| {name} | {facts['bits_per_byte']:.3f} | {facts['n_tokens']:,} |")
    for seed, prompt in enumerate([*SAMPLES, *SAMPLES], 1):
        options = {"seed": seed, "temperature": 0.7, "top_p": 0.95, "max_new_tokens": 100}
        text = "".join(step.text for step in minigpt.generate("storyteller", prompt, **options))
        wrapped = (textwrap.wrap(line, 118) or [""] for line in f"**{prompt}**{text}".split("\n"))
        print(f"\nseed {seed}:\n")
        print("\n".join(f"> {line}".rstrip() for lines in wrapped for line in lines))


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["texts", data, out]:
            write_texts(Path(data), Path(out))
        case ["card", data]:
            card(Path(data))
        case _:
            sys.exit(__doc__)
