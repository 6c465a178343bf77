"""Every user error is one line with the problem, the value and the remedy."""

import json
import shutil
from pathlib import Path

import pytest
from calls import TINY, Run, error_line

from minigpt.checkpoint.folder import RunFolder

LONG = "word " * 40


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], ["'trian'", "Did you mean train?"]),
        (["--tempurature"], ["'--tempurature'"]),
        (["generate", "--tempurature", "1"], ["'--tempurature'", "Did you mean --temperature?"]),
        (["train", "--max-step", "1"], ["'--max-step'", "Did you mean --max-steps?"]),
        (["attention-trace", "--layer", "1"], ["'--layer'", "Did you mean --layers?"]),
        (["train", "--xyzzy"], ["'--xyzzy'", "See minigpt train --help."]),
        (["generate", "--top-k"], ["--top-k", "requires an argument", "minigpt generate --help"]),
        (["generate", "--top-k", "many"], ["--top-k", "'many'", "whole number"]),
        (["generate", "--top-p", "half"], ["--top-p", "'half'", "a number"]),
        (["generate", "once", "upon"], ["upon", "quotes"]),
        (["generate", "-- a list"], ["'-- a list'", "Put -- before"]),
        (["generate", "x", "--device", "cud"], ["--device", "'cud'", "Did you mean cuda?"]),
        (["generate", "x", "--dtype", "float16"], ["'float16'", "Did you mean bfloat16?"]),
        (["attention-trace", "x", "--reduce", "men"], ["'men'", "Did you mean mean?"]),
        (["train", "--preset", "nanoo"], ["'nanoo'", "Did you mean nano?"]),
        (["train", "--tokenizer", "gpt3"], ["'gpt3'", "Did you mean gpt2?"]),
        (["train", "--tokenizer", "bpe:"], ["'bpe:'", "as in bpe:1024"]),
        (["train", "--family", "lama"], ["'lama'", "Did you mean llama?"]),
    ],
)
def test_a_misspelled_word_gets_the_nearest_suggestion(
    run: Run, words: list[str], said: list[str]
) -> None:
    result = run(*words)
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--temperature -1", ["temperature", "-1"]),
        ("--temperature nan", ["--temperature", "nan"]),
        ("--top-k -1", ["--top-k", "-1", "at least 0"]),
        ("--top-p 0", ["--top-p", "(0, 1]", "0.0"]),
        ("--top-p 1.5", ["--top-p", "1.5"]),
        ("--min-p 2", ["--min-p", "2.0", "in [0, 1]"]),
        ("--repetition-penalty 0", ["--repetition-penalty", "0.0"]),
        ("--max-new-tokens -1", ["--max-new-tokens", "-1", "at least 0"]),
        ("--num-samples 0", ["--num-samples", "0"]),
        ("--seed -1", ["--seed", "-1"]),
        ("--seed 99999999999999999999", ["--seed", "99999999999999999999"]),
    ],
)
@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_sampling_values_out_of_range_are_refused(
    run: Run, command: str, words: str, said: list[str]
) -> None:
    result = run(command, "text", *words.split())
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--n-head 3 --d-model 128", ["--n-head", "3 does not divide 128", "Try --d-model 132"]),
        ("--n-head 4 --d-model 12", ["even", "3", "Try --d-model 16"]),
        (
            "--n-head 4 --set model.n_kv_head=3",
            ["n_kv_head must divide --n-head", "3"],
        ),
        ("--family gpt2 --set model.qk_norm=true", ["gpt2", "qk_norm", "llama"]),
        ("--n-layer 0", ["--n-layer", "0", "at least 1"]),
        ("--context-length 0", ["--context-length", "0"]),
        ("--batch-size 0", ["--batch-size", "0"]),
        (
            "--batch-size 6 --set training.micro_batch_size=4",
            ["micro_batch_size must divide --batch"],
        ),
        ("--lr 0", ["--lr", "0.0"]),
        ("--max-steps 0", ["set --max-steps, --max-minutes or --max-epochs"]),
        ("--max-minutes -1", ["--max-minutes", "-1"]),
        ("--set model.n_layr=2", ["model.n_layr", "Did you mean n_layer?"]),
        ("--set modle.n_layer=2", ["modle", "Did you mean model?"]),
        ("--set model.n_layer=two", ["model.n_layer", "int", "'two'"]),
        ("--set model=2", ["model", "table", "2"]),
        ("--set training=2", ["training", "table", "2"]),
        ("--set data=2", ["data", "table", "2"]),
        ("--set preset=2", ["preset", "2"]),
        ("--set n_layer", ["'n_layer'", "model.n_layer=4"]),
        ("--tokenizer bytes --set model.vocab_size=10", ["vocab_size", "257", "10"]),
        ("--set data.val_fraction=1", ["val_fraction must be", "1"]),
        ("--set data.loss_on=all", ["loss_on and chat_template"]),
        ("--loss-on all", ["--loss-on and --chat-template are for", "Give --chat"]),
        ("--chat --special --field prose", ["--special and --field have no effect"]),
        ("--chat --special", ["--special and --field have no effect"]),
        ("--val text.txt --val-fraction 0.2", ["--val is the", "--val-split and --val-fraction"]),
        ("--config missing.toml", ["missing.toml", "does not exist"]),
        ("--config .", ["cannot be read"]),
        ("--name a/b", ["'a/b'", "letters, digits"]),
        ("--name ..", ["'..'"]),
        ("--name \x1b[31m", ["\\x1b[31m"]),
        (f"--name {'x' * 101}", ["up to 100"]),
    ],
)
def test_impossible_settings_are_refused(
    run: Run, workplace: Path, words: str, said: list[str]
) -> None:
    (workplace / "text.txt").write_text("text " * 2000)
    result = run("train", "text.txt", *words.split(" "))
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line
    assert not list(workplace.glob("checkpoints/*/step-*"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[model]\nn_layers = 2\n", ["model.n_layers", "Did you mean n_layer?"]),
        ("modell.n_layer = 2\n", ["modell", "Did you mean model?"]),
        ("n_layer = \n", ["settings.toml", "TOML"]),
        ('[training]\nlr = "high"\n', ["training.lr", "float", "'high'"]),
    ],
)
def test_a_config_file_is_read_strictly(
    run: Run, workplace: Path, content: str, said: list[str]
) -> None:
    (workplace / "settings.toml").write_text(content)
    result = run("train", "--config", "settings.toml")
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.txt", None, ["missing.txt", "no file or folder"]),
        ("empty.txt", b"", ["empty", "empty.txt"]),
        ("blob.txt", b"text\0" * 900, ["binary", "byte 4"]),
        ("latin.txt", "café ".encode("latin1") * 900, ["not UTF-8", "byte 3", "iconv"]),
        ("short.txt", b"too short", ["too little text", "Give more text"]),
        ("lines.jsonl", b'{"txt": "a"}\n', ["line 1", '"text"']),
        ("missing*.txt", None, ["'missing*.txt'", "no file matches"]),
        ("gone\x1b[2J/a.txt", None, ["\\x1b[2J"]),
    ],
)
def test_an_unusable_corpus_is_refused(
    run: Run, workplace: Path, name: str, content: bytes | None, said: list[str]
) -> None:
    if content is not None:
        (workplace / name).write_bytes(content)
    result = run("train", name, *TINY)
    line = error_line(result)
    assert result.code == 3
    assert all(part in line for part in said), line
    assert not list(Path("checkpoints").glob("*"))


@pytest.mark.parametrize("words", [["train"], ["prepare", "--out", "p"], ["evaluate"]])
def test_an_empty_path_is_refused_and_not_read_as_the_working_directory(
    run: Run, at_trained: Path, words: list[str]
) -> None:
    result = run(words[0], "", *words[1:])
    assert result.code == 3
    assert "the path of a text is empty" in error_line(result)


def test_a_text_named_like_an_argument_is_no_option(run: Run, at_trained: Path) -> None:
    for words in (
        ["train", "data", *TINY],
        ["evaluate", "data"],
        ["prepare", "data", "--out", "p"],
    ):
        result = run(*words)
        assert result.code == 3
        assert "no file or folder 'data'" in error_line(result)
    assert run("generate", "prompt", "--max-new-tokens", "1").code == 0
    assert run("generate", "--max-new-tokens", "1", "--", "prompt").code == 0


def test_empty_standard_input_is_refused_as_corpus(run: Run) -> None:
    result = run("train", "-", *TINY)
    assert "standard input" in error_line(result)
    assert result.code == 3


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
@pytest.mark.parametrize(
    ("prompt", "stdin", "said"),
    [
        (LONG, b"", ["200 tokens", "64", "--context-length"]),
        ("-", LONG.encode(), ["200 tokens", "64"]),
        ("", b"", ["the prompt is empty", "new document"]),
        ("-", b"", ["standard input is empty"]),
        ("-", b"caf\xe9", ["standard input", "not UTF-8", "byte 3", "iconv"]),
        ("caf\udce9", b"", ["the prompt", "not UTF-8", "byte 3"]),
        ("-", b"a" * (2**24 + 1), ["longer than 16 MiB"]),
    ],
)
def test_an_unusable_prompt_is_refused(
    run: Run, at_trained: Path, command: str, prompt: str, stdin: bytes, said: list[str]
) -> None:
    result = run(command, prompt, stdin=stdin)
    line = error_line(result)
    assert result.code == 3
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--layers 9", ["--layers 9", "0 to 1"]),
        ("--layers x", ["--layers", "'x'"]),
        ("--layers 1-0", ["--layers", "1-0"]),
        ("--heads 3", ["--heads", "'3'", "layer.head"]),
        ("--heads 0.7", ["--heads 0.7", "0 to 1"]),
        ("--layers 0 --heads 1.*", ["no head in common"]),
        ("--n-sources -1", ["--n-sources", "-1"]),
        ("--sources few", ["--n-sources", "'few'"]),
    ],
)
def test_heads_not_in_the_model_are_refused(
    run: Run, at_trained: Path, words: str, said: list[str]
) -> None:
    result = run("attention-trace", "text", *words.split())
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_without_checkpoints_the_error_suggests_training(run: Run, command: str) -> None:
    result = run(command, "text")
    line = error_line(result)
    assert result.code == 4
    assert "no checkpoint" in line
    assert "`minigpt train`" in line


def test_a_missing_model_gets_the_nearest_suggestion(run: Run, at_trained: Path) -> None:
    (at_trained / "empty").mkdir()
    cases = {
        "tinny": ["'tinny'", "Did you mean tiny?"],
        "empty": ["'empty' contains no checkpoint"],
        "no/such": ["'no/such'"],
        "x" * 5000: ["xxx..."],
        "\x1b[2J": ["\\x1b[2J"],
    }
    for model, said in cases.items():
        result = run("generate", "text", "--model", model)
        line = error_line(result)
        assert result.code == 4
        assert all(part in line for part in said), line


@pytest.mark.parametrize("part", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_damaged_file_of_a_checkpoint_is_named(run: Run, at_trained: Path, part: str) -> None:
    path = at_trained / "checkpoints/tiny/step-000004" / part
    path.write_bytes(path.read_bytes()[:-9])
    result = run("generate", "text", "--model", str(path.parent))
    line = error_line(result)
    assert result.code == 4
    assert part in line


def test_an_existing_run_is_never_overwritten(run: Run, at_trained: Path) -> None:
    before = {p: p.read_bytes() for p in at_trained.rglob("checkpoints/**/*") if p.is_file()}
    result = run("train", "corpus.txt", "--name", "tiny", *TINY)
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in ("'tiny'", "--resume", "--name"))
    assert before == {p: p.read_bytes() for p in before}


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_locked_by_another_process_is_refused(
    run: Run, at_trained: Path, resume: list[str]
) -> None:
    name = "tiny" if resume else "other"
    with RunFolder(Path("checkpoints", name)).lock():
        result = run("train", "corpus.txt", "--name", name, *resume)
    assert result.code == 7
    assert name in error_line(result)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--n-layer 3", ["--n-layer", "2", "3"]),
        ("--context-length 32", ["--context-length", "64", "32"]),
        ("--seed 1", ["--seed", "1337", "1"]),
        ("--batch-size 4", ["--batch-size", "2", "4"]),
        ("--tokenizer bpe:300", ["--tokenizer", "'bytes'", "'bpe:300'"]),
        ("--preset mini", ["preset", "'nano'", "'mini'"]),
        ("--set training.optimizer=adamw", ["training.optimizer", "'muon'", "'adamw'"]),
        # Even if the run's other settings would not fit the new value.
        ("--batch-size 3", ["--batch-size", "2", "3"]),
        ("--context-length 100", ["--context-length", "64", "100"]),
        ("--arch lstm", ["--arch", "'gpt'", "'lstm'", "another --name"]),
        ("--n-head 3", ["--n-head", "2", "3"]),
        ("--val other.txt", ["--val", "other.txt"]),
        ("--val-fraction 0.2", ["--val-fraction", "0.1", "0.2"]),
        ("--set model.n_layr=3", ["model.n_layr", "Did you mean n_layer?"]),
    ],
)
def test_resume_refuses_settings_that_the_checkpoint_depends_on(
    run: Run, at_trained: Path, words: str, said: list[str]
) -> None:
    result = run("train", "--resume", "--name", "tiny", *words.split())
    line = error_line(result)
    assert result.code == 2
    assert all(part in line for part in said), line


def test_resume_refuses_another_text(run: Run, at_trained: Path) -> None:
    (at_trained / "corpus.txt").write_text("Another text altogether.\n" * 100)
    result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    assert result.code == 3
    assert "the text of 'corpus.txt' has changed" in error_line(result)


def test_resume_names_a_setting_that_changes_how_the_text_is_read(
    run: Run, workplace: Path
) -> None:
    row = {"text": "Once upon a time. " * 20, "body": "The king said. " * 20}
    Path("rows.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    assert run("train", "rows.jsonl", "--name", "rows", *TINY).code == 0
    result = run("train", "--resume", "--name", "rows", "--max-steps", "6", "--field", "body")
    assert result.code == 3
    assert "data.field is 'text' in this run, not 'body'. Leave it out" in error_line(result)


def test_resume_reports_damage_without_suggesting_the_same_run(run: Run, at_trained: Path) -> None:
    (weights,) = Path("checkpoints/tiny").glob("step-*/model.safetensors")
    weights.write_bytes(b"")
    result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    line = error_line(result)
    assert result.code == 4
    assert "'model.safetensors' has 0 bytes instead of" in line
    assert "another --name" in line
    assert "Did you mean" not in line


@pytest.mark.integration
@pytest.mark.parametrize("name", ["model.safetensors", "training_state/optimizer.safetensors"])
def test_resume_refuses_a_checkpoint_with_a_changed_byte(
    run: Run, at_trained: Path, name: str
) -> None:
    (first,) = Path("checkpoints/tiny").glob("step-*")
    resume = ("train", "--resume", "--name", "tiny", "--max-steps")
    assert run(*resume, "6").code == 0
    for folder in (Path("checkpoints/tiny/step-000006"), first):
        data = bytearray((folder / name).read_bytes())
        data[-101] ^= 0x40
        (folder / name).write_bytes(data)
        result = run(*resume, "8", "--dry-run")
        assert f"'{name}' has changed (its SHA-256 differs)" in result.err
        if folder != first:
            assert result.code == 0
            assert f"Step {int(first.name[5:])} is used" in result.err
    assert result.code == 4
    assert "another --name" in error_line(result)


@pytest.mark.parametrize(
    ("name", "said"), [("tinny", "Did you mean tiny?"), (None, "Start one")], ids=["name", "newest"]
)
def test_resume_refuses_a_missing_run(
    run: Run, workplace: Path, trained: Path, name: str | None, said: str
) -> None:
    if name:
        shutil.copytree(trained / "checkpoints", workplace / "checkpoints")
    result = run("train", "--resume", *(["--name", name] if name else []))
    assert result.code == 4
    assert said in error_line(result)
    assert not Path("checkpoints/tinny").exists()


def test_an_unavailable_device_is_refused(
    run: Run, at_trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["generate", "x"], ["attention-trace", "x"], ["train", "corpus.txt"]):
        result = run(*words, "--device", "cuda")
        line = error_line(result)
        assert result.code == 2
        assert "cuda is not available" in line
        assert "cpu" in line


def test_a_run_without_a_checkpoint_to_resume_from_is_not_said_to_resume(run: Run) -> None:
    # As a kill during the first checkpoint leaves it, after the weights of the best step.
    with RunFolder(Path("checkpoints/a")).writing_step(3, weights_only=True):
        pass
    line = error_line(run("train", "builtin", "--name", "a"))
    assert "no checkpoint to resume from, so give this one another --name" in line
    resumed = run("train", "--resume", "--name", "a")
    assert (resumed.code, "another --name" in error_line(resumed)) == (4, True)


def test_a_run_that_ended_before_its_first_checkpoint_is_started_again(
    run: Run, at_trained: Path
) -> None:
    (at_trained / "checkpoints/killed").mkdir()
    shutil.copy(at_trained / "checkpoints/tiny/config.toml", at_trained / "checkpoints/killed")
    resumed = run("train", "--resume", "--name", "killed")
    assert resumed.code == 4
    assert "Start it again without --resume." in error_line(resumed)
    assert run("train", "corpus.txt", "--name", "killed", *TINY).code == 0
