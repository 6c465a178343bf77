"""Training on conversations: the template is applied, and only answers have a loss."""

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import TINY, Run, error_line
from small_models import small_model
from transformers import GenerationConfig

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.model_folder import read_model, write_model
from minigpt.config import DataConfig, RunConfig
from minigpt.settings import build, read_toml
from minigpt.text.batches import NO_TARGET, batch
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.tokens import PreparedData, prepare
from minigpt.training.trainer import Trainer
from minigpt.training.world import ALONE, World

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = ["--chat", "--val-split", "tail", *TINY]


def turns(n: int) -> list[dict[str, str]]:
    question, answer = f"What is {n} + {n}?", f"It is {2 * n}. " * (1 + n % 3)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.fixture
def rows(workplace: Path) -> Path:
    """Write rows of messages, and of prompt and completion."""
    lines: list[Any] = [{"messages": turns(n)} for n in range(60)]
    lines += [{"prompt": f"Say {n}", "completion": f"{n}!"} for n in range(20)]
    Path("chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Path("chats.jsonl")


@pytest.fixture
def base(workplace: Path) -> Path:
    """Return the folder of a chat model."""
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = make_encoding("chat", r"(?s:.)", ranks, specials)
    model = small_model(vocab_size=259, context_length=128)
    write_model(Path("base"), model, TiktokenTokenizer("chat", encoding))
    Path("base/chat_template.jinja").write_text(CHATML)
    return Path("base")


def prepared(rows: Path, **about: Any) -> PreparedData:
    data = DataConfig(paths=(str(rows),), chat=True, val_split="tail", **about)
    return prepare(data)


def test_targets_are_the_answers_and_inputs_are_all_tokens(rows: Path) -> None:
    data, whole = prepared(rows), prepared(rows, loss_on="all")
    lengths = {"context_length": 200, "batch_size": 8, "seed": 1, "step": 0}
    inputs, targets = _batch(data, lengths)
    all_inputs, all_targets = _batch(whole, lengths)
    assert torch.equal(inputs, all_inputs)
    is_counted = targets != NO_TARGET
    assert torch.equal(targets[is_counted], all_targets[is_counted])
    assert not (all_targets == NO_TARGET).any()
    for row, counted in zip(all_targets, is_counted, strict=True):
        text = bytes(t if t < 256 else 0 for t in row.tolist())
        marks = bytes(65 if flag else 46 for flag in counted.tolist())
        # Plain loop: from an answer's first character to the end of text after it.
        start = text.find(b"Assistant:\n")
        while start >= 0:
            begin = start + len(b"Assistant:\n")
            end = text.find(b"\0", begin)
            stop = len(text) if end < 0 else end + 1
            assert marks[start:begin].count(b"A") == 0
            assert marks[begin:stop] == b"A" * (stop - begin)
            start = text.find(b"Assistant:\n", stop)


def _batch(data: PreparedData, lengths: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    span = data.tokens.split(0.1)[0]
    return batch(span, **lengths)


@dataclass(frozen=True)
class Rank(World):
    """One of two ranks, with the given mean of their token counts."""

    n_counted: torch.Tensor = field(default_factory=torch.Tensor)
    size: int = 2

    def __init__(self, n_counted: torch.Tensor, rank: int) -> None:
        super().__init__(rank=rank, size=2)
        object.__setattr__(self, "n_counted", n_counted)

    def on(self, device: torch.device, *, shard: bool) -> "Rank":
        return self

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        return self.n_counted


def trainer_of(config: RunConfig, data: PreparedData, base: Path, world: World = ALONE) -> Trainer:
    return Trainer(
        config,
        data,
        RunFolder(Path("checkpoints/y")),
        device=torch.device("cpu"),
        dtype=torch.float32,
        start_from=read_model(base, dtype=torch.float32).model,
        world=world,
    )


def assert_gradients_equal(model: torch.nn.Module, trainers: list[Trainer]) -> None:
    ranks = [dict(trainer.model.named_parameters()) for trainer in trainers]
    for name, parameter in model.named_parameters():
        mean = torch.stack([rank[name].grad for rank in ranks]).mean(dim=0)
        torch.testing.assert_close(mean, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.integration
def test_the_loss_and_gradient_are_the_means_over_counted_tokens(
    run: Run, rows: Path, base: Path
) -> None:
    sizes = ["--batch-size", "8", "--set", "training.micro_batch_size=2", "--max-steps", "1"]
    words = [
        "--from",
        "base",
        "--context-length",
        "32",
        "--val-split",
        "tail",
        "--dtype",
        "float32",
    ]
    assert run("train", str(rows), "--chat", "--name", "x", *words, *sizes).code == 0
    config = build(RunConfig, read_toml(Path("checkpoints/x/config.toml")))
    latest = RunFolder(Path("checkpoints/x")).latest()
    assert latest is not None
    loaded = read_model(base, dtype=torch.float32)
    data = prepare(config.data, tokenizer=loaded.tokenizer, chat_model=base)
    trainer = trainer_of(config, data, base)
    losses = [trainer._accumulate_gradients()]
    inputs, targets = batch(trainer.train_tokens, 32, 8, seed=config.training.seed, step=0)
    counts = [(part != NO_TARGET).sum().item() for part in targets.split(2)]
    assert len(set(counts)) > 1  # otherwise a mean of means would be the same
    model = read_model(base, dtype=torch.float32).model
    expected = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    expected.backward()
    torch.testing.assert_close(losses[0], expected.detach())
    assert_gradients_equal(model, [trainer])
    # Two ranks average their losses and gradients.
    n_counted = torch.tensor(sum(counts) / 2)
    ranks = [trainer_of(config, data, base, world=Rank(n_counted, rank)) for rank in (0, 1)]
    losses = [rank._accumulate_gradients() for rank in ranks]
    torch.testing.assert_close(sum(losses) / 2, expected.detach())
    assert_gradients_equal(model, ranks)


@pytest.mark.integration
def test_a_resumed_run_on_chats_ends_with_the_same_bits(run: Run, rows: Path) -> None:
    words = ["train", str(rows), *WORDS, "--set", "training.save_every=3"]
    assert run(*words, "--name", "whole", "--max-steps", "6").code == 0
    assert run(*words, "--name", "parts", "--max-steps", "6").code == 0
    folder = RunFolder(Path("checkpoints/parts"))
    shutil.rmtree(folder.step_folder(6))
    resumed = run("train", "--resume", "--name", "parts")
    assert resumed.code == 0, resumed.err
    names = [Path(f"checkpoints/{n}/step-000006/model.safetensors") for n in ("whole", "parts")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_model_trained_from_scratch_on_chats_can_chat(run: Run, rows: Path) -> None:
    result = run("train", str(rows), "--name", "own", *WORDS)
    assert result.code == 0, result.err
    assert result.err.count("the loss is on the assistant's tokens only") == 1
    step = Path("checkpoints/own/step-000004")
    assert (step / "chat_template.jinja").exists()
    out = run(
        "generate", "--model", "own", "--chat", "Say 4", "--max-new-tokens", "3", "--json"
    ).out
    assert json.loads(out)["n_prompt_tokens"] == len("User:\nSay 4\n\nAssistant:\n")


@pytest.mark.integration
def test_fine_tuning_keeps_the_chat_template_of_the_base(run: Run, rows: Path, base: Path) -> None:
    words = ["--from", "base", "--max-steps", "2", "--context-length", "32", "--val-split", "tail"]
    result = run("train", str(rows), "--chat", "--name", "tuned", *words)
    assert result.code == 0, result.err
    kept = Path("checkpoints/tuned/step-000002/chat_template.jinja")
    assert kept.read_text() == CHATML
    facts = {}
    for loss_on in ("completion", "all"):
        words = ["evaluate", str(rows), "--model", "base", "--chat", "--loss-on", loss_on, "--json"]
        facts[loss_on] = json.loads(run(*words).out)
    assert 0 < facts["completion"]["n_tokens"] < 0.6 * facts["all"]["n_tokens"]
    assert all(math.isfinite(fact["bits_per_byte"]) for fact in facts.values())


@pytest.mark.integration
@pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
def test_other_programs_end_answers_where_a_fine_tuned_template_does(
    run: Run, rows: Path, base: Path, place: str
) -> None:
    if place == "config.json":
        (base / "generation_config.json").unlink()
    (base / "chat_template.jinja").rename("new.jinja")
    steps, split = ["--max-steps", "2", "--context-length", "32"], ["--val-split", "tail"]
    template = ["--chat", "--chat-template", "new.jinja"]
    prepared = run("prepare", str(rows), "--from", "base", "--out", "folder", *split, *template)
    assert prepared.code == 0, prepared.err
    for name, call in {
        "tuned": [str(rows), "--from", "base", *split, *template],
        "prepared": ["folder", "--from", "tuned", "--chat"],  # tuned has one end more than base
    }.items():
        result = run("train", *call, *steps, "--name", name)
        assert result.code == 0, result.err
        theirs = GenerationConfig.from_pretrained(
            f"checkpoints/{name}/step-000002", config_file_name=place
        )
        assert theirs.eos_token_id == [256, 258]
        assert theirs.bos_token_id == 256
    before = json.loads((base / place).read_text())
    after = json.loads(Path("checkpoints/tuned/step-000002", place).read_text())
    assert before == after | {"eos_token_id": 256}
    resumed = run("train", "--resume", "--name", "tuned", "--max-steps", "4")
    assert resumed.code == 0, resumed.err
    again = json.loads(Path("checkpoints/tuned/step-000004", place).read_text())
    assert again == after


@pytest.mark.integration
def test_a_base_without_a_template_is_reported(run: Run, rows: Path, base: Path) -> None:
    note = "'base' has no chat template: the plain one is used"
    words = [str(rows), "--chat", "--val-split", "tail"]
    train = ["train", *words, "--from", "base", "--max-steps", "1", "--context-length", "32"]
    Path("base/chat_template.jinja").rename("own.jinja")
    for call in (
        [*train, "--name", "plain"],
        ["prepare", *words, "--from", "base", "--out", "folder"],
        ["evaluate", str(rows), "--model", "base", "--chat"],
    ):
        result = run(*call)
        assert result.code == 0, result.err
        said = " ".join(result.err.split())
        assert said.count(note) == 1, said
        assert "--chat-template FILE gives another" in said
    given = run(*train, "--name", "given", "--chat-template", "own.jinja")
    again = run(
        "evaluate", str(rows), "--model", "plain", "--chat"
    )  # it has a copy of the plain one
    for result in (given, again):
        assert result.code == 0, result.err
        assert "has no chat template" not in result.err


@pytest.mark.integration
def test_training_on_prepared_chats_equals_training_on_the_rows(run: Run, rows: Path) -> None:
    words = ["--chat", "--val-split", "tail", "--tokenizer", "bytes"]
    assert run("prepare", str(rows), "--out", "folder", *words).code == 0
    tiny = TINY[2:]
    assert run("train", "folder", "--name", "one", *tiny).code == 0
    assert run("train", str(rows), "--name", "two", *words, *tiny).code == 0
    names = [Path(f"checkpoints/{n}/step-000004/model.safetensors") for n in ("one", "two")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert Path("checkpoints/one/step-000004/chat_template.jinja").exists()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "a"}, 'has no "messages", or "prompt" and "completion"'),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant message"),
        ({"messages": ["a"]}, "not an object with role and content"),
        ({"messages": [{"role": 1, "content": "a"}]}, "not an object with role and content"),
        ({"messages": [{"role": "user", "content": 4}]}, "not an object with role and content"),
        ({"prompt": "a"}, 'has no "messages"'),
        ({"prompt": 1, "completion": "b"}, 'has a "prompt" that is neither'),
        ({"messages": []}, 'has no "messages"'),
    ],
)
def test_a_row_that_is_not_a_conversation_is_refused_or_skipped(
    run: Run, rows: Path, row: Any, says: str
) -> None:
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    refused = run("prepare", str(rows), "--chat", "--out", "folder")
    assert refused.code == 3
    assert says in error_line(refused)
    assert "line 81" in error_line(refused)
    assert "--skip-bad" in error_line(refused)
    assert run("prepare", str(rows), "--chat", "--out", "folder", "--skip-bad").code == 0


def test_chat_requires_rows_and_is_suggested_for_rows_of_chats(run: Run, rows: Path) -> None:
    Path("text.txt").write_text("plain " * 99)
    refused = run("train", "text.txt", *WORDS)
    assert (refused.code, "--chat reads conversations" in error_line(refused)) == (3, True)
    refused = run("train", str(rows), *TINY)
    assert (refused.code, "Give --chat" in error_line(refused)) == (3, True)
    refused = run("train", str(rows), "--loss-on", "all", *TINY)
    assert (refused.code, "--chat" in error_line(refused)) == (2, True)
    refused = run("train", str(rows), "--special", *WORDS)
    assert (refused.code, "special" in error_line(refused)) == (2, True)


def test_a_conversation_rejected_by_the_template_is_refused_or_skipped(
    run: Run, rows: Path
) -> None:
    Path("strict.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    )
    row = {"messages": [{"role": "system", "content": "x"}, *turns(3)]}
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    words = ["prepare", str(rows), "--chat", "--chat-template", "strict.jinja", "--out", "folder"]
    refused = run(*words)
    assert refused.code == 3
    assert "'no system'" in error_line(refused)
    assert "The conversation begins" in error_line(refused)
    result = run(*words, "--skip-bad", "--json")
    assert result.code == 0
    assert json.loads(result.out)["n_documents"] == 80
    assert "1 row was left out" in result.err


@pytest.mark.parametrize(
    "answer",
    [
        {"content": [{"type": "text", "text": "yes"}]},
        {"content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {},
    ],
)
def test_the_plain_template_refuses_answer_parts_that_it_would_drop(
    run: Run, rows: Path, answer: dict[str, Any]
) -> None:
    row = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", **answer}]}
    with rows.open("a") as file:
        file.write(json.dumps(row) + "\n")
    refused = run("prepare", str(rows), "--chat", "--out", "folder")
    assert refused.code == 3
    assert "texts only" in error_line(refused)
    result = run("prepare", str(rows), "--chat", "--out", "folder", "--skip-bad", "--json")
    assert json.loads(result.out)["n_documents"] == 80
