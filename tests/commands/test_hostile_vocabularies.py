"""Hostile vocabularies and model cards: no token or name controls a terminal or a page."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, Run
from screens import OURS, Screen, control_characters
from small_models import small_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.text.tokenizer import BytesTokenizer

MARK = "PWNED"
TOKENS = [
    "\x1b]0;PWNED\x07",
    "\x1b[2J\x1b[H",
    "\x9b31m",
    "\x90q\x9c",
    "\rPWNED",
    "a\x08b\x7f",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "\u2028best   PWNED",
    "\x0b\x0c\x85",
    "\0",
    "\ufeff\u200b",
    "[bold red]PWNED[/]",
    "[link=http://evil]PWNED[/link]",
    "<script>alert('PWNED')</script>",
    "</script><script>alert('PWNED')</script>",
    "<!--<script>",
    "]]><svg onload=alert('PWNED')>",
    "\"><img src=x onerror=alert('PWNED')>",
    "' onmouseover='alert(1)",
    "&lt;script&gt;",
    "$(touch PWNED)`touch PWNED`",
    "%s%n{0}{x!r}",
    "\\u001b[2J",
]
VIEWS = ["lines", "heads", "lens", "matrix", "text"]


def word_level() -> Tokenizer:
    """Return a vocabulary in which each hostile text is a word."""
    words = ["<unk>", "a", "b", *TOKENS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def added() -> Tokenizer:
    """Return a byte vocabulary with each hostile text as a special token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in TOKENS])
    return tokenizer


@pytest.fixture(params=[word_level, added])
def model(request: pytest.FixtureRequest, workplace: Path) -> Path:
    """Return a folder with a random model, the vocabulary, and a hostile model card."""
    tokenizer: Tokenizer = request.param()
    folder = workplace / "\x1b[2Jmodel"
    n = tokenizer.get_vocab_size()
    write_model(folder, small_model(vocab_size=n, context_length=48), BytesTokenizer())
    for path in folder.glob("*tokenizer*"):
        path.unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": TOKENS[0], "bos_token": TOKENS[1], "tokenizer_class": TOKENS[2]}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    config = json.loads((folder / "config.json").read_text())
    config |= {"_name_or_path": TOKENS[0], "architectures": [TOKENS[1]]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("---\nlicense: \x1b[2J\n---\n" + "\n".join(TOKENS))
    found = read_model(folder).tokenizer
    assert found is not None
    pieces = {found.token_bytes(i).strip(b" ") for i in range(n)}
    assert pieces >= {TOKENS[1].encode(), TOKENS[8].encode()}
    return folder


@pytest.fixture
def on_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that calls the program in a terminal and returns its contents."""

    def call(*words: str) -> str:
        with monkeypatch.context() as patch:
            screen = Screen(patch)
            result = run(*words)
        shown = screen.text()
        assert result.code == 0, shown
        return shown

    return call


def check(shown: str, n_tokens: int) -> None:
    assert not control_characters(shown)
    plain = OURS.sub("", shown)
    assert MARK in plain, "hostile tokens must be shown"
    assert not re.search(r"(?m)^(best   )?PWNED", plain), "no token may start a new line"


SAMPLING_OPTIONS = ["--temperature", "99", "--max-new-tokens", "40", "--seed", "5"]


@pytest.mark.integration
def test_hostile_tokens_cannot_control_a_terminal(
    model: Path, on_terminal: Callable[..., str]
) -> None:
    source = ["--model", str(model)]
    Path("text.txt").write_text("a b " * 30)
    check(on_terminal("generate", "a b", *source, *SAMPLING_OPTIONS, "--logprobs", "3"), 40)
    for view in VIEWS:
        lens = ["--lens"] if view == "lens" else []
        words = ["attention-trace", "a b", *source, *SAMPLING_OPTIONS, "--view", view, *lens]
        assert not control_characters(on_terminal(*words))
    words = ["--candidates", "3", "--lens", "--n-verified", "1", "--against", "b"]
    words += ["--measure", "logit", "--prompt-rows"]
    check(on_terminal("attention-trace", "a b", *source, *SAMPLING_OPTIONS, *words), 40)
    for command in (["evaluate", "text.txt"], ["checkpoints", "show"]):
        given = source if command[0] == "evaluate" else source[1:]
        shown = on_terminal(*command, *given)
        assert not control_characters(shown)


class Scripts(HTMLParser):
    """Collects everything that a browser could run: scripts, event handlers and URLs."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.integration
def test_hostile_tokens_cannot_run_in_a_page_or_picture(model: Path, run: Run) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    words = [
        "attention-trace",
        "a b",
        "--model",
        str(model),
        *SAMPLING_OPTIONS,
        "--candidates",
        "3",
    ]
    plain = run("attention-trace", "a b", "--model", str(model), "--max-new-tokens", "1")
    assert plain.code == 0
    result = run(*words, "--html", "t.html", "--svg", "t.svg", "--png", "t.png")
    assert result.code == 0, result.err
    page, picture = (Path(name).read_text("utf-8") for name in ("t.html", "t.svg"))
    assert MARK in page
    scripts = Scripts()
    scripts.feed(page)
    own = page.count("<script")
    assert scripts.tags.count("script") == own, (
        "parser and text must agree on the number of scripts"
    )
    assert not {"img", "iframe"} & set(scripts.tags)
    assert scripts.handlers == []
    assert "<script>alert" not in page
    assert "<script" not in picture
    assert "onload" not in re.sub(r">[^<]*<", "><", picture)
    for text in (page, picture):
        assert not control_characters(text)


@pytest.mark.integration
def test_fine_tuning_an_untrusted_model_writes_an_escaped_card(
    model: Path, on_terminal: Callable[..., str], trained: Path
) -> None:
    shape = TINY[TINY.index("--set") :]
    options = ["--from", str(model), "--max-steps", "1", "--batch-size", "1", "--name", "x"]
    del shape[:2]  # the shape is that of the base model
    shown = on_terminal("train", str(trained / "corpus.txt"), *options, *shape)
    assert not control_characters(shown)
    [card] = Path("checkpoints/x").glob("step-*/README.md")
    text = card.read_text("utf-8")
    assert not control_characters(text)
    assert "<script" not in text
    facts: dict[str, Any] = {}
    for line in text.split("---")[1].splitlines():
        key, colon, value = line.partition(": ")
        facts |= {key: value} if colon else {}
    assert MARK not in str(facts)
