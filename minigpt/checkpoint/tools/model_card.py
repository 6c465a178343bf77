"""The model card: README.md of a checkpoint, in the format of the Hugging Face Hub."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.checkpoint.tools.hub import is_hub_name
from minigpt.config import ModelConfig, RunConfig
from minigpt.format import count
from minigpt.model.cost import parameter_count
from minigpt.model_config import OWN_TYPE
from minigpt.text.escape import one_line

_MOST_NAMES = 20
_COMMIT = re.compile("[0-9a-f]{40}")
_USE = """\
## Use

FOLDER is the folder that contains this file.

```console
minigpt generate --model FOLDER "Once upon a time"
minigpt attention-trace --model FOLDER "Once upon a time"
```

{elsewhere}"""
_ELSEWHERE = """\
```python
from transformers import AutoModelForCausalLM, {tokenizer}

tokenizer = {tokenizer}.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
inputs = tokenizer("Once upon a time", return_tensors="pt")
outputs = model.generate(**inputs, max_new_tokens=40, do_sample=True, temperature=0.8)
print(tokenizer.decode(outputs[0]))
```"""
_NOWHERE_ELSE = """\
transformers does not support this model, so only minigpt can read this folder."""
_LIMITS = """\
## Limits

The model continues text in the style of its training text, including its errors and biases. It does
not follow instructions, may state falsehoods as confidently as facts, and may repeat its training
text word for word. It was evaluated only by the losses above."""


def write_card(folder: Path, run: Any, step: int, losses: Mapping[str, float]) -> None:
    """Write the README.md of a checkpoint. Args: run, the ``training.run.Run``."""
    card = model_card(
        run.config,
        name=run.folder.path.name,
        step=step,
        n_train_tokens=len(run.train_tokens),
        val_split=run.data.manifest.val_split,
        **losses,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    config: RunConfig,
    *,
    name: str,
    step: int,
    n_train_tokens: int,
    val_split: str,
    val_loss: float | None = None,
    bits_per_byte: float | None = None,
) -> str:
    """Return the README.md of a checkpoint: the Hub's metadata, then a description in Markdown.

    Names and the command are escaped in both.

    Args: name, of the run; step, optimizer steps done; n_train_tokens, without those for
        validation; val_split, as in ``Manifest``; val_loss, nats/token.
    """
    model_type = config.model.model_type
    names = "\n".join(f"- {_code(name)}" for name in _names(config))
    n_seen = step * config.step_tokens
    # AutoTokenizer splits text as Qwen2 does in every qwen2 folder, whatever tokenizer.json says.
    tokenizer = "PreTrainedTokenizerFast" if model_type == "qwen2" else "AutoTokenizer"
    others = _NOWHERE_ELSE if model_type == OWN_TYPE else _ELSEWHERE.format(tokenizer=tokenizer)
    loss = "- No validation text"
    if val_loss is not None:
        loss = f"- Validation loss: {val_loss:.4f} nats/token, {bits_per_byte:.4f} bits/byte"
    parts = [
        _metadata(config, name, val_loss, bits_per_byte),
        f"# {_code(name)}",
        "A small language model that continues text, trained with minigpt.",
        f"""\
## The model

- Layout: {_layout(config.model)}
- Parameters: {parameter_count(config.model):,}
- Context: {config.model.context_length:,} tokens
- Vocabulary: {config.model.vocab_size:,} tokens, {_code(config.data.tokenizer)}""",
        f"""\
## The text

{names}

{n_train_tokens:,} tokens for training, {_validation(config, val_split)} for validation.""",
        f"""\
## Training

- Start: {_start(config)}
- Steps: {step:,}, with {config.training.optimizer}
- Tokens seen: {n_seen:,} ({n_seen / n_train_tokens:.3g} times the training text)
{loss}""",
        *([f"The command was:\n\n    {one_line(config.command)}"] if config.command else []),
        _USE.format(elsewhere=others),
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


def _validation(config: RunConfig, val_split: str) -> str:
    percent = f"{100 * config.data.val_fraction:.3g}%"
    if val_split == "own":
        return "a separate text"
    if not config.data.val_fraction:
        return "none"
    if val_split == "documents":
        return f"whole documents with about {percent} of the text"
    return f"the last {percent} of the text"


def _metadata(
    config: RunConfig, name: str, val_loss: float | None, bits_per_byte: float | None
) -> str:
    """Return the YAML block of a model card, as the Hub specifies it."""
    repository = _base_repository(config)
    library = "minigpt" if config.model.model_type == OWN_TYPE else "transformers"
    base = f"base_model: {_quoted(repository)}\n" if repository else ""
    results = (
        ""
        if val_loss is None
        else f"""\
model-index:
- name: {_quoted(name)}
  results:
  - task:
      type: text-generation
    dataset:
      type: text
      name: {_quoted(", ".join(_names(config)))}
      split: validation
    metrics:
    - type: loss
      name: nats/token
      value: {val_loss:.4f}
    - type: bits_per_byte
      name: bits/byte
      value: {bits_per_byte:.4f}
"""
    )
    return f"""\
---
library_name: {library}
pipeline_tag: text-generation
{base}tags:
- minigpt
- {config.model.model_type}
{results}---"""


def _layout(model: ModelConfig) -> str:
    name = f"{model.model_type} in Hugging Face's format"
    if model.model_type == OWN_TYPE:
        name = f"{model.family} with {model.attention} attention, supported only by minigpt"
    if model.arch != "gpt":
        shape = f"{count(model.n_layer, 'layer')}, width {model.d_model}"
        return f"{model.arch}, supported only by minigpt; {shape}"
    return f"""\
{name}; {count(model.n_layer, "layer")}, {count(model.n_head, "head")}
  ({count(model.n_kv_head, "key/value head")}), width {model.d_model}, MLP width {model.d_mlp}"""


def _names(config: RunConfig) -> list[str]:
    """Return the names of the corpora without their folders, which may be private."""
    titles = {
        "-": "standard input",
        "builtin": "short tales that come with minigpt",
        "builtin:tales": "short tales that come with minigpt",
        "builtin:python": "English prose that comes with Python",
    }
    names = [titles.get(path) or Path(path).name or path for path in config.data.paths]
    n_more = len(names) - _MOST_NAMES
    return [*names[:_MOST_NAMES], f"and {n_more} more"] if n_more > 0 else names


def _start(config: RunConfig) -> str:
    if config.from_ is None:
        return f"random weights with seed {config.training.seed}"
    path = Path(config.from_)
    place = f"{path.parent.name}/{path.name}" if path.name.startswith("step-") else path.name
    return f"the weights of {_code(config.from_ if _base_repository(config) else place)}"


def _base_repository(config: RunConfig) -> str | None:
    """Return the Hub repository of the run's base model; None without one."""
    repository, _, commit = (config.from_ or "").partition("@")
    return repository if is_hub_name(repository) and _COMMIT.fullmatch(commit) else None


def _quoted(text: str) -> str:
    """Return a text as a YAML string: a JSON string without characters YAML folds or rejects."""
    return json.dumps(one_line(text), ensure_ascii=False)


def _code(text: str) -> str:
    """Return a text as a Markdown code span, in which nothing is markup."""
    text = one_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text or not text.strip() else f"{fence}{text}{fence}"
