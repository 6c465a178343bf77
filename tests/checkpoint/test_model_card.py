"""The model card, read by YAML and Markdown parsers, huggingface_hub and transformers."""

import contextlib
import io
import json
import re
import warnings
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from layout_models import make_model
from markdown_it import MarkdownIt

from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.checkpoint.tools.model_card import model_card
from minigpt.config import DataConfig, ModelConfig, RunConfig, TrainingConfig
from minigpt.model.gpt import GPT
from minigpt.text.bpe import train_bpe

CONFIG = RunConfig(
    model=ModelConfig(
        vocab_size=257, context_length=256, n_layer=2, n_head=4, d_model=32, qk_norm=True
    ),
    training=TrainingConfig(max_steps=500, batch_size=8),
    data=DataConfig(paths=("/home/someone/tales.txt", "more/*.jsonl", "-"), val_fraction=0.05),
    command="minigpt train '/home/someone/tales.txt' --name tales",
)
FACTS: dict[str, Any] = {
    "name": "tales",
    "step": 400,
    "val_loss": 1.25,
    "bits_per_byte": 1.80337,
    "n_train_tokens": 204_800,
    "val_split": "tail",
}
HOSTILE = (
    'a"\n---\nlicense: mit\n# b',
    "</code><script>alert(1)</script><img src=x onerror=alert(1)>",
    "`` ` ```\n```\n<b>x</b>",
    "`",
    "",
    " ",
    "[x](javascript:alert(1)) **b** www.example.com <https://example.com> &lt; $x$ | y",
    "'\"\\: {}[]#&*!|>%@`, ? -",
    "\x1b[2J\x00\x7f\x85\u2028\u2029\ufeff\ufffe\u202e\ud800\U0001f600 \r\n\té世界",
    "\n\n    indented\n\n# heading\n- item\n---\n",
    "${{ secrets }} {tokenizer} %s",
)


class Page(HTMLParser):
    """Parses the tags of a page, and the text in each code element."""

    def __init__(self, card: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.codes: list[str] = []
        # The Hub shows the front matter as a table and renders the rest.
        html = MarkdownIt("commonmark").enable("table").render(card.split("\n---\n", 1)[1])
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.codes += [""] if tag == "code" else []
        # The only attributes are the languages of code fences.
        assert {name for name, _ in attributes} <= {"class"}

    def handle_data(self, data: str) -> None:
        if self.tags[-1] == "code":
            self.codes[-1] += data


def metadata(card: str) -> dict[str, Any]:
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub to read the card")
    data: dict[str, Any] = hub.ModelCard(card).data.to_dict()
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(re.split(r"(?m)^---$", card)[1]).keys() == data.keys()
    return data


def test_huggingface_hub_reads_the_metadata_of_the_card() -> None:
    data = metadata(model_card(CONFIG, **FACTS))
    index = data.pop("model-index")
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["minigpt", "qwen3"],
    }
    hub = pytest.importorskip("huggingface_hub")
    name, results = hub.repocard_data.model_index_to_eval_results(index)
    assert name == "tales"
    assert [(r.task_type, r.dataset_split, r.metric_type, r.metric_value) for r in results] == [
        ("text-generation", "validation", "loss", 1.25),
        ("text-generation", "validation", "bits_per_byte", 1.8034),
    ]
    assert results[0].dataset_name == "tales.txt, *.jsonl, standard input"


def test_the_card_of_a_model_with_one_head_has_singulars() -> None:
    model = replace(CONFIG.model, n_layer=1, n_head=1, n_kv_head=1)
    card = model_card(replace(CONFIG, model=model), **FACTS)
    assert "; 1 layer, 1 head\n  (1 key/value head), width 32" in card


def test_the_card_describes_the_model_and_its_training() -> None:
    card = model_card(CONFIG, **FACTS)
    model = GPT.without_weights(CONFIG.model)
    for says in (
        f"Parameters: {sum(p.numel() for p in model.parameters()):,}\n",
        "Layout: qwen3 in Hugging Face's format; 2 layers, 4 heads\n",
        "Context: 256 tokens\n",
        "Vocabulary: 257 tokens, `bytes`\n",
        "\n- `tales.txt`\n- `*.jsonl`\n- `standard input`\n",
        "204,800 tokens for training, the last 5% of the text for validation.",
        "Start: random weights with seed 1337\n",
        "Steps: 400, with muon\n",
        "Tokens seen: 819,200 (4 times the training text)\n",  # 400 x 8 x 256
        "Validation loss: 1.2500 nats/token, 1.8034 bits/byte\n",
        f"The command was:\n\n    {CONFIG.command}\n",
    ):
        assert says in card, says
    assert card.count("/home/someone") == 1, "paths must occur only in the command"
    built_in = model_card(replace(CONFIG, data=DataConfig(), command=""), **FACTS)
    assert "The command was" not in built_in
    assert "- `short tales that come with minigpt`\n" in built_in
    older = model_card(replace(CONFIG, data=DataConfig(paths=())), **FACTS)
    assert "- `English prose that comes with Python`\n" in older


def test_a_long_list_of_corpora_is_shortened() -> None:
    paths = tuple(f"part-{i}.txt" for i in range(1000))
    card = model_card(replace(CONFIG, data=DataConfig(paths=paths)), **FACTS)
    assert "- `part-19.txt`\n- `and 980 more`\n" in card
    assert "part-20.txt" not in card


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("source", "shown", "base"),
    [
        (f"Qwen/Qwen3-0.6B@{COMMIT}", f"Qwen/Qwen3-0.6B@{COMMIT}", "Qwen/Qwen3-0.6B"),
        ("/home/someone/gpt2", "gpt2", None),
        ("checkpoints/book/step-000500", "book/step-000500", None),
        ("models/gpt2", "gpt2", None),
        (f"../Qwen/x@{COMMIT}", f"x@{COMMIT}", None),
    ],
)
def test_the_card_names_the_base_model(source: str, shown: str, base: str | None) -> None:
    config = replace(CONFIG, from_=source, training=replace(CONFIG.training, sequence_length=32))
    card = model_card(config, **FACTS)
    assert f"Start: the weights of `{shown}`\n" in card
    assert "Tokens seen: 102,400 (" in card  # 400 x 8 x 32
    assert metadata(card).get("base_model") == base


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_are_escaped_in_the_metadata_and_the_markdown(text: str) -> None:
    plain = model_card(CONFIG, **FACTS)
    data = replace(CONFIG.data, paths=(text, "b/" + text, "c"), tokenizer=text)
    config = replace(CONFIG, data=data, from_=text, command=f"x {text}")
    card = model_card(config, **FACTS | {"name": text})

    shown = metadata(card)
    assert shown.keys() == metadata(plain).keys()
    [index] = shown["model-index"]
    assert index.keys() == {"name", "results"}
    assert index["results"][0].keys() == {"task", "dataset", "metrics"}
    card.encode()  # no lone surrogate
    assert not set(card) & set(map(chr, [*range(10), *range(11, 32), *range(127, 160), 0x202E]))

    page, plain_page = Page(card), Page(plain)
    assert sorted(page.tags) == sorted([*plain_page.tags, "code"])  # the code element of from_
    assert page.codes[0].strip() == index["name"].strip()
    [command] = [code for code in page.codes if code.startswith("x ")]
    assert command.removeprefix("x ").strip() == index["name"].strip()
    if text.isprintable():
        assert index["name"] == text


@pytest.mark.integration
@pytest.mark.parametrize("layout", ["qwen3", "llama-grouped", "gpt2-tied", "qwen2"])
def test_the_commands_on_the_card_work(layout: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # raised by its imports
        pytest.importorskip("transformers", reason="needs transformers, whose use the card shows")
    text = "Once upon a time, in 12345 and 12345, there was"
    tokenizer = train_bpe([text], 280)
    write_model(tmp_path, make_model(tokenizer.vocab_size, layout), tokenizer)
    config = read_model(tmp_path).model.config
    card = model_card(replace(CONFIG, model=config), **FACTS)
    [program] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    # The small model has a context of 32 tokens.
    program = program.replace('"FOLDER"', json.dumps(str(tmp_path))).replace("=40", "=9")
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names: dict[str, Any] = {}
        exec(program, names)
        assert names["tokenizer"](text).input_ids == tokenizer.encode(text)
    assert out.getvalue().startswith("Once upon a time")
    assert len(out.getvalue()) > len("Once upon a time\n")


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("documents", "whole documents with about 5% of the text for validation."),
        ("tail", "the last 5% of the text for validation."),
        ("own", "a separate text for validation."),
    ],
)
def test_the_card_says_how_the_text_was_split(split: str, kept: str) -> None:
    assert f"tokens for training, {kept}" in model_card(CONFIG, **FACTS | {"val_split": split})
