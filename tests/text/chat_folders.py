"""Folders with a chat template and a vocabulary that minigpt and transformers can read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from minigpt.checkpoint.tokenizer_json import read_tokenizer, tokenizer_to_json
from minigpt.text.bpe import train_bpe
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokenizer import BYTES_PATTERN, Tokenizer

CHATML = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{% for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA = """{{ bos_token }}
{%- for message in messages %}
    {%- set head = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' %}
    {{- head + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{% set role = 'model' if m.role == 'assistant' else m.role %}
{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """{%- set ns = namespace(system='') -%}
{{- bos_token }}
{%- for m in messages -%}
    {%- if m.role == 'system' -%}{%- set ns.system = m.content + '\\n\\n' -%}{%- continue -%}
    {%- elif m.role == 'user' -%}{{- '[INST] ' + ns.system + m.content + '[/INST]' -}}
    {%- set ns.system = '' -%}
    {%- else -%}{{- ' ' + m.content + eos_token -}}{%- endif -%}
{%- endfor -%}"""

# Thoughts are removed from earlier answers and left empty in the last one, as in Qwen 3.
THINKING = """{%- for m in messages %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- set thought = '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last else '' %}
{{- '<|im_start|>' + m.role + '\\n' + thought + content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

GENERATION = """{% for m in messages %}
{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ m.role }}
{{ m | tojson(indent=1) }} {{ strftime_now('%Y') }}<|im_end|>
{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama": LLAMA,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "thinking": THINKING,
    "generation": GENERATION,
}

SPECIALS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
]


def bytes_of_tiktoken() -> TiktokenTokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)}
    return TiktokenTokenizer("bytes", make_encoding("bytes", BYTES_PATTERN, ranks, {}))


def our_json(make: Callable[[], TiktokenTokenizer]) -> dict[str, Any]:
    made = make()
    ranks = made.encoding._mergeable_ranks
    specials = {text: len(ranks) + i for i, text in enumerate(SPECIALS)}
    pattern = made.encoding._pat_str
    return tokenizer_to_json(
        TiktokenTokenizer("own", make_encoding("own", pattern, ranks, specials))
    )


def other_json(pre_tokenizer: Any, normalizer: Any = None) -> dict[str, Any]:
    characters = ["<unk>", "\u2581", *map(chr, range(32, 127)), "\n"]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(characters))}
    library = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    library.pre_tokenizer, library.normalizer = pre_tokenizer, normalizer
    library.add_special_tokens(SPECIALS)
    data: dict[str, Any] = json.loads(library.to_str())
    return data


VOCABULARIES: dict[str, Callable[[], dict[str, Any]]] = {
    "bytes": lambda: our_json(bytes_of_tiktoken),
    "bpe": lambda: our_json(
        lambda: train_bpe(["the owl said: user, system and assistant " * 9], 290)
    ),
    "first": lambda: other_json(pre_tokenizers.Metaspace(prepend_scheme="first")),
    "always": lambda: other_json(pre_tokenizers.Metaspace(prepend_scheme="always")),
    "prepend": lambda: other_json(None, normalizers.Prepend("\u2581")),
}

NAMED = {"bos_token": "<s>", "eos_token": {"content": "</s>", "__type": "AddedToken"}}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = {
    "one": [turn("user", "Hi there")],
    "system": [turn("system", "Be kind. "), turn("user", " What is an owl?\n")],
    "turns": [
        turn("user", "a"),
        turn("assistant", "<think>\nhm</think>\n\nb  "),
        turn("user", "{{ c }}"),
        turn("assistant", "d\n\nd"),
    ],
}


def folder_with(path: Path, vocabulary: str, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(json.dumps(VOCABULARIES[vocabulary]()))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **NAMED, **config}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def tokenizer_of(folder: Path) -> Tokenizer:
    made = read_tokenizer(folder)
    assert made is not None
    return made
