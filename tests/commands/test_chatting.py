"""generate --chat and attention-trace --chat: template ids, turns, and the end of a turn."""

import json
from pathlib import Path
from typing import Any

import pytest
from calls import Run, error_line
from small_models import small_model
from transformers import AutoTokenizer

import minigpt
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.chat import read_chat_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GREEDY = ["--temperature", "0", "--json", "--max-new-tokens"]


@pytest.fixture
def folder(workplace: Path) -> Path:
    """Return the folder of a chat model with random weights."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    encoding = make_encoding("chat", r"(?s:.)", ranks, specials)
    model = small_model(vocab_size=259, context_length=128)
    write_model(Path("model"), model, TiktokenTokenizer("chat", encoding))
    Path("model/chat_template.jinja").write_text(CHATML)
    return Path("model")


def facts(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.splitlines()]


def test_a_chat_prompt_has_the_ids_of_transformers(run: Run, folder: Path) -> None:
    words = ["--model", "model", "--chat", "--system", "Be brief", "Hi"]
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    theirs = AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    traced = facts(run("attention-trace", *words, *GREEDY, "4").out)
    assert [token["token"] for token in traced[0]["prompt"]] == ids
    generated = facts(run("generate", *words, *GREEDY, "4").out)[0]
    assert generated["n_prompt_tokens"] == len(ids)
    assert generated["prompt"] == "Hi"
    steps = minigpt.generate("model", messages, temperature=0, max_new_tokens=4)
    assert "".join(step.text for step in steps) == generated["text"]
    trace = minigpt.trace("model", messages, temperature=0, max_new_tokens=4)
    assert [token.id for token in trace.header.prompt] == ids


def test_each_turn_continues_the_conversation(run: Run, folder: Path) -> None:
    words = ["generate", "--chat", "--interactive", "--model", "model", "--system", "s", "a"]
    first, second = facts(run(*words, *GREEDY, "6", stdin=b"\nb\n").out)
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": first["text"]},
        {"role": "user", "content": "b"},
    ]
    tokenizer = read_model(folder).tokenizer
    assert tokenizer is not None
    ids = read_chat_template(folder).encode(tokenizer, messages)
    assert second["n_prompt_tokens"] == len(ids)
    steps = minigpt.generate("model", ids, temperature=0, max_new_tokens=6)  # without a cache
    assert second["text"] == "".join(step.text for step in steps)
    assert (first["prompt"], second["prompt"]) == ("a", "b")


def test_a_full_context_drops_the_oldest_turns_and_reports_it(run: Run, folder: Path) -> None:
    words = ["generate", "--chat", "--interactive", "--model", "model", *GREEDY, "8"]
    lines = "".join(f"question {n}\n" for n in range(5)).encode()
    slid = run(*words, "--overflow", "slide", stdin=lines)
    assert slid.code == 0
    assert len(facts(slid.out)) == 5
    assert "the context window is full: the oldest 2 messages are left out" in slid.err
    assert all(fact["n_prompt_tokens"] <= 120 for fact in facts(slid.out))
    stopped = run(*words, stdin=lines)
    assert len(facts(stopped.out)) < 5
    assert "--overflow slide" in stopped.err


def test_without_a_sliding_window_a_full_context_starts_a_new_chat(run: Run, folder: Path) -> None:
    words = ["generate", "--chat", "--interactive", "--model", "model", *GREEDY, "200"]
    result = run(*words, "--system", "s", "--ignore-eos", stdin=b"first\nsecond\n")
    assert result.err.count("the next text starts a new one") == 2
    second = run(*words, "--system", "s", "--ignore-eos", stdin=b"second\n")
    assert [fact["text"] for fact in facts(result.out)][1] == facts(second.out)[0]["text"]


def test_a_message_longer_than_the_context_is_refused_and_the_chat_continues(
    run: Run, folder: Path
) -> None:
    words = ["generate", "--chat", "--interactive", "--model", "model", *GREEDY, "4"]
    result = run(*words, "--overflow", "slide", stdin=b"y" * 200 + b"\na\n" + b"x" * 200 + b"\nb\n")
    assert [fact["prompt"] for fact in facts(result.out)] == ["a", "b"]
    assert result.err.count("the model sees 128") == 2


@pytest.mark.integration
def test_an_answer_ends_with_the_end_of_turn_token(run: Run, folder: Path) -> None:
    words = ["generate", "--chat", "--model", "model", "Hi", "--max-new-tokens", "100", "--json"]
    # A temperature at which every token is sampled soon.
    fact = facts(run(*words, "--temperature", "1000", "--seed", "4", "--overflow", "slide").out)[0]
    n = fact["n_tokens"]
    plain = minigpt.generate(
        "model",
        read_chat_template(folder).encode(
            read_model(folder).tokenizer,  # type: ignore[arg-type]
            [{"role": "user", "content": "Hi"}],
        ),
        temperature=1000,
        seed=4,
        max_new_tokens=100,
        overflow="slide",
    )
    tokens = [step.step.token for step in plain]
    expected = next((i + 1 for i, token in enumerate(tokens) if token in (256, 258)), len(tokens))
    assert n == expected
    if n < 100:
        assert fact["finish_reason"] == "end_of_text"


def test_chat_options_are_refused_where_they_have_no_effect(run: Run, folder: Path) -> None:
    for command in ("generate", "attention-trace"):
        calls = {
            "--system": ["Hi", "--system", "s"],
            "--chat-template": ["Hi", "--chat-template", "x"],
            "--special": ["Hi", "--chat", "--special"],
            "--chat answers a message": ["--chat"],
        }
        for says, words in calls.items():
            result = run(command, "--model", "model", *words)
            assert result.code == 2
            assert says in error_line(result)
            assert "--chat" in result.err


def test_chatting_with_a_model_without_a_template_requires_one(run: Run, folder: Path) -> None:
    Path("model/chat_template.jinja").rename("own.jinja")
    for command in ("generate", "attention-trace"):
        result = run(command, "--model", "model", "--chat", "Hi")
        assert result.code == 2
        assert "has no chat template" in error_line(result)
        assert "--chat-template FILE" in error_line(result)
    words = ["generate", "--model", "model", "--chat", "Hi", *GREEDY, "3"]
    assert facts(run(*words, "--chat-template", "own.jinja").out)[0]["n_prompt_tokens"] == 21
    Path("own.jinja").write_text("{{ raise_exception('only\x1b[31m songs') }}")
    refused = run(*words, "--chat-template", "own.jinja")
    assert (refused.code, "only" in error_line(refused)) == (3, True)
    Path("own.jinja").write_text("{{ ().__class__.__mro__ }}")
    refused = run(*words, "--chat-template", "own.jinja")
    assert (refused.code, "sandbox" in error_line(refused)) == (4, True)


def test_special_tokens_in_a_message_are_plain_text(run: Run, folder: Path) -> None:
    words = ["attention-trace", "--chat", "--model", "model", *GREEDY, "1"]
    ids = [token["token"] for token in facts(run(*words, "a<|im_end|>").out)[0]["prompt"]]
    assert (ids.count(257), ids.count(258)) == (2, 1)


@pytest.fixture
def resized_too_little(folder: Path) -> Path:
    """Return the folder of a model whose tokenizer got three more tokens, and which was not."""
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    like = data["added_tokens"][-1]
    for text in ("<|user|>", "<|bot|>", "<pad>"):
        data["added_tokens"].append(like | {"content": text, "id": len(data["added_tokens"]) + 256})
    path.write_text(json.dumps(data))
    return folder


@pytest.mark.integration
def test_tokens_without_an_embedding_are_reported_or_refused(
    run: Run, resized_too_little: Path
) -> None:
    said = "has no row for '<|user|>', '<|bot|>' of its tokenizer"
    template = resized_too_little / "chat_template.jinja"
    few = ["--model", "model", "--max-new-tokens", "2"]
    for words in (
        ["generate", "a", *few],
        ["generate", "a <|user|>", "--chat", *few],  # plain text in a message, as any other token
        ["checkpoints", "verify", "model"],
    ):
        result = run(*words)
        assert result.code == 0, result.err
        assert " ".join(result.err.split()).count(said) == 1, result.err
    template.write_text("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")
    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    Path("text.txt").write_text("a <|user|> b\n" * 99)
    for words in (
        ["generate", "a", "--chat", *few],
        ["generate", "a <|user|>", "--special", *few],
        ["generate", "a", "--special", "--force", "<|user|>", *few],
        ["generate", "--interactive", "--chat", *few],
        ["evaluate", "text.txt", "--special", "--model", "model"],
        ["evaluate", "rows.jsonl", "--chat", "--model", "model"],
        ["train", "rows.jsonl", "--chat", "--from", "model"],
    ):
        result = run(*words)
        assert result.code == 4, words
        line = result.err.splitlines()[-1]
        assert line.startswith("error: '<|user|>' is a token of the vocabulary"), result.err
        assert "resize_token_embeddings" in line


def test_only_a_padding_token_without_an_embedding_is_no_reason_to_warn(
    run: Run, resized_too_little: Path
) -> None:
    path = resized_too_little / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] not in (259, 260)]
    path.write_text(json.dumps(data))
    assert "no row" not in run("generate", "a", "--model", "model", "--max-new-tokens", "2").err
