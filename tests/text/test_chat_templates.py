"""Chat templates are found and rendered as in transformers, and untrusted ones do no harm."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_folders import (
    CHATML,
    NAMED,
    folder_with,
    tokenizer_of,
    turn,
)
from transformers import AutoTokenizer

from minigpt.errors import CheckpointError, ConfigError, DataError
from minigpt.text.chat import ChatTemplate, ending_turns, read_chat_template
from minigpt.text.tokenizer import BytesTokenizer


@pytest.mark.parametrize(
    ("config", "files", "named", "expected"),
    [
        ({"chat_template": "one"}, {}, None, "one"),
        ({"chat_template": [{"name": "default", "template": "one"}]}, {}, None, "one"),
        ({"chat_template": {"default": "one", "rag": "r"}}, {}, None, "one"),
        ({"chat_template": {"default": "one", "rag": "r"}}, {}, "rag", "r"),
        ({"chat_template": "one"}, {"chat_template.jinja": "two"}, None, "two"),
        ({"chat_template": [{"name": "rag", "template": "r"}]}, {}, "rag", "r"),
        ({}, {"additional_chat_templates/t.jinja": "t", "chat_template.jinja": "d"}, "t", "t"),
        ({}, {"additional_chat_templates/t.jinja": "t", "chat_template.jinja": "d"}, None, "d"),
    ],
)
def test_chat_templates_are_found_in_the_same_places_as_in_transformers(
    config: dict[str, Any],
    files: dict[str, str],
    named: str | None,
    expected: str,
    tmp_path: Path,
) -> None:
    folder = folder_with(tmp_path, "bytes", **config)
    for name, source in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(source)
    assert read_chat_template(folder, named).source == expected
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.get_chat_template(named) == expected


NAMES = "{% for token in [bos_token, eos_token, unk_token, pad_token, mask_token] %}{{ token }}|"

NAMES += "{% endfor %}{{ image_token }}"

OLD_MAP = {"bos_token": "[INST]", "eos_token": {"content": "[/INST]", "lstrip": False}}


@pytest.mark.parametrize("vocabulary", ["bytes", "first"])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pad_token": "[INST]"},
        {"bos_token": None},
        {"image_token": "[INST]"},
        {"extra_special_tokens": {"image_token": "[INST]"}},
        {"extra_special_tokens": ["[INST]"]},
        {"model_specific_special_tokens": {"image_token": "[INST]"}},
        {"added_tokens_decoder": {"256": {"content": "<s>", "special": True}}},
        *(
            {"tokenizer_class": name}
            for name in (
                *("GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizerFast", "Qwen2Tokenizer"),
                *("LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "CohereTokenizer"),
            )
        ),
    ],
    ids=str,
)
def test_templates_get_the_same_special_tokens_as_in_transformers(
    config: dict[str, Any], vocabulary: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, vocabulary, chat_template=NAMES, **config)
    path = folder / "tokenizer_config.json"
    unnamed = json.loads(path.read_text())
    for name in NAMED.keys() - config.keys():
        del unnamed[name]
    messages = [turn("user", "a")]
    for kept, old in itertools.product((path.read_text(), json.dumps(unnamed)), (None, OLD_MAP)):
        path.write_text(kept)
        if old:
            (folder / "special_tokens_map.json").write_text(json.dumps(old))
        theirs = AutoTokenizer.from_pretrained(folder)
        text = theirs.apply_chat_template(messages, tokenize=False)
        assert read_chat_template(folder).render(messages) == text, (kept, old)


def test_a_missing_template_is_a_usage_error_that_names_the_option(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "bytes")
    with pytest.raises(ConfigError, match=r"has no chat template.*--chat-template FILE"):
        read_chat_template(folder)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_chat_template(folder, "missing.jinja")
    folder_with(tmp_path, "bytes", chat_template=[{"name": "rag", "template": ""}])
    with pytest.raises(ConfigError, match=r"'rag'\. Choose one"):
        read_chat_template(folder)
    folder_with(tmp_path, "bytes", chat_template=[{"name": "rag"}])
    with pytest.raises(CheckpointError, match="neither a string nor a list"):
        read_chat_template(folder)
    (tmp_path / "own.jinja").write_text("own")
    assert read_chat_template(folder, str(tmp_path / "own.jinja")).source == "own"
    folder_with(tmp_path, "bytes")
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read: it is a folder"):
        read_chat_template(folder)
    (tmp_path / "chat_template.jinja").rmdir()
    with pytest.raises(DataError, match="as empty text"):
        ChatTemplate("", {}, "x").encode(BytesTokenizer(), [turn("user", "a")])


GROW = "{% set ns = namespace(s='aa') %}{% for i in range(99) %}GROWN{% endfor %}"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "end"),
        ("{% for a in range(10**9) %}{% endfor %}", "fails"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "end"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n-1) ~ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "end",
        ),
        ("{{ 'a' * 10**12 }}", "end"),
        ("{{ [1] * 10**12 }}", "end"),
        ("{{ 2 ** (10 ** 10) }}", "end"),
        ("{{ 'a' | center(10**10) }}", "end"),
        ("{{ 'a'.ljust(10**10) }}", "end"),
        ("{{ '%9999999999d' % 1 }}", "end"),
        ("{{ '{:9999999999}'.format(1) }}", "end"),
        ("{{ '{:{}}'.format('a', 9999999999) }}", "end"),
        ("{{ range(99999) | list | join('x' * 9999) }}", "end"),
        (GROW.replace("GROWN", "{% set ns.s = ns.s ~ ns.s %}"), "end"),
        (GROW.replace("GROWN", "{% set ns.s = ns.s + ns.s %}"), "end"),
        (GROW.replace("GROWN", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"), "end"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "end"),
        ("{{ ().__class__.__mro__ }}", "sandbox"),
        ("{{ cycler.__init__.__globals__ }}", "sandbox"),
        ("{{ messages.append(1) }}", "sandbox"),
        ("{{ raise_exception.__globals__.os }}", "sandbox"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "sandbox"),
        ("{% include '/etc/passwd' %}", "fails"),
        ("{% import 'os' as os %}", "fails"),
        ("{{ a.b.c }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ messages[0].content + 1 }}", "fails"),
        ("{% if %}", "not valid Jinja on line 1"),
        ("\n{{ unclosed", "not valid Jinja on line 2"),
    ],
)
def test_a_harmful_or_broken_template_is_refused_in_one_line(source: str, says: str) -> None:
    template = ChatTemplate(source, {}, "the chat template of 'x'")
    with pytest.raises(CheckpointError, match=says) as caught:
        template.render([turn("user", "a")])
    assert re.search("--chat-template", str(caught.value))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_long_conversations_stay_below_the_step_limit_of_templates() -> None:
    messages = [turn("user", "word " * 2000), turn("assistant", "more " * 2000)] * 100
    text = ChatTemplate(CHATML, {}, "x").render(messages)
    assert len(text) > 2_000_000


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, "bytes", chat_template=CHATML)
    tokenizer = tokenizer_of(folder)
    ends = ending_turns(tokenizer, read_chat_template(folder)).end_of_text_ids
    assert {*ends} == {tokenizer.special_ids["<|im_end|>"], tokenizer.special_ids["</s>"]}


FEATURES = {
    "json": "{% for m in messages %}{{ m | tojson(indent=2, sort_keys=true) }}{{ m }}{% endfor %}",
    "attributes": "{% for m in messages %}{{ m.get('tool_calls', 0) }}{{ 'content' in m }}|"
    "{{ m.content is none }}{{ m.content is string }}{{ m.content is iterable }}{{ m.x }}|"
    "{{ m.reasoning_content }}{{ m['thinking'] }}{% for k, v in m.items() %}{{ k }}={{ v }},"
    "{% endfor %}{% endfor %}",
    "selected": "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
    "| list }}{{ messages | rejectattr('role', 'in', ['user']) | list | length }}",
    "namespace": "{% set ns = namespace(last=-1) %}{% for m in messages[::-1] %}"
    "{% if m.role == 'user' and ns.last < 0 %}{% set ns.last = loop.revindex0 %}{% endif %}"
    "{% endfor %}{{ ns.last }}{{ messages[ns.last:] }}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}"
    "{{ loop.previtem.role if loop.previtem is defined }}{{ loop.nextitem.role }}"
    "{{ loop.cycle('a', 'b') }}{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}",
    "macro": "{% macro show(v, sep=',') %}{% if v is mapping %}{% for k, x in v | dictsort %}"
    "{{ k }}:{{ show(x) }}{{ sep }}{% endfor %}{% elif v is string %}{{ v | upper }}"
    "{% elif v is iterable %}[{% for x in v %}{{ show(x) }}{% endfor %}]{% else %}{{ v }}"
    "{% endif %}{{ caller() if caller }}{% endmacro %}{{ show(messages, sep=';') }}"
    "{% call show(1) %}inner{% endcall %}",
    "strings": "{% set c = messages[0].content | string %}{{ c.strip() }}{{ c.split(' ')[-1] }}"
    "{{ c.startswith('<') }}{{ c | replace('a', 'b') }}{{ c[:3] }}{{ c | e }}{{ c | title }}"
    "{{ '%s-%d' | format('x', 3) }}{{ '{:>4}'.format(c | length) }}{{ c.splitlines() }}",
    "values": "{{ 7 // 2 }}{{ 2 ** 3 }}{{ 3.7 | round }}{{ '3' | int + 1 }}{{ (1, none, true) }}"
    "{{ 1 ~ 2 }}{{ x is defined }}{{ x | default('y') }}{{ dict(a=1) }}{{ [3, 1] | sort | join }}",
    "blocks": "{% set b %}a{{ messages | length }}{% endset %}{{ b }}{% filter upper %}a"
    "{% endfilter %}{% with a = 1 %}{{ a }}{% endwith %}{% raw %}{{ x }}{% endraw %}{# comment #}",
    "spaces": "\n  {% if true %}\n   A\n  {% endif %}\n{#- c -#}\n B \n{{- 1 -}}\n",
    "raised": "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, not ' + m.role) }}{% endif %}{% endfor %}ok",
    "asked": "{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ strftime_now('%Y') }}"
    "{% if enable_thinking is defined %}{{ enable_thinking }}{% endif %}"
    "{{ bos_token ~ eos_token }}",
}

ODD_CONVERSATIONS = [
    [turn("system", "<a & 'b'> {{ x }}"), turn("user", " a \n"), turn("assistant", "\u00fc")],
    [turn("user", "a"), turn("user", "b")],
    [turn("developer", "d"), turn("user", "")],
    [{"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]}],
    [turn("user", "a"), {"role": "assistant", "reasoning": "hm", "content": "b"}],
    [
        turn("user", "a"),
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "name": "f", "content": '{"t": 1.0}'},
    ],
    [{"role": "user"}],
    [turn("assistant", "first")],
    [turn("user", "a") | {"weight": 0, "name": "Bob"}],
]


@pytest.mark.parametrize("feature", FEATURES)
def test_jinja_features_of_templates_render_as_in_transformers(
    feature: str, tmp_path: Path
) -> None:
    folder = folder_with(tmp_path, "bytes", chat_template=FEATURES[feature])
    theirs, ours = AutoTokenizer.from_pretrained(folder), read_chat_template(folder)
    for messages, prompts in itertools.product(ODD_CONVERSATIONS, (True, False)):
        try:
            text = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompts
            )
        except Exception:  # raised by Jinja, Python or the template
            with pytest.raises((DataError, CheckpointError)):
                ours.render(messages, add_generation_prompt=prompts)
        else:
            assert ours.render(messages, add_generation_prompt=prompts) == text, messages
