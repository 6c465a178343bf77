"""An option without effect in the chosen mode of a command is refused by name."""

import re
import signal
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from calls import TINY, Run, error_line

from minigpt.commands.help.conditions import MODES
from minigpt.commands.help.usage import INEFFECTIVE_IF
from minigpt.config import DataConfig, ModelConfig, SamplingConfig, TrainingConfig
from minigpt.fields import choices_in, require_within

TRACE = ["attention-trace", "The king", "--temperature", "0", "--max-new-tokens", "4"]
FILES = {"R": ["attention-trace", "--replay", "t.jsonl"]}
FILES["D"] = ["attention-trace", "--diff", "t.jsonl", "t.jsonl"]


@pytest.fixture(scope="module")
def kept_trace() -> dict[str, bytes]:
    """Return a cache for the file t.jsonl, which the first test writes."""
    return {}


@pytest.fixture
def place(trained: Path, workplace: Path, run: Run, kept_trace: dict[str, bytes]) -> Path:
    """Return a folder with the tiny run and the trace t.jsonl."""
    (workplace / "checkpoints").symlink_to(trained / "checkpoints")
    if not kept_trace:
        assert run(*TRACE, "--out", "t.jsonl", "--verify", "1").code == 0
        kept_trace["t.jsonl"] = Path("t.jsonl").read_bytes()
    Path("t.jsonl").write_bytes(kept_trace["t.jsonl"])
    return workplace


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        *(
            (mode, words)
            for mode in "RD"
            for words in (
                *("PROMPT", "--model x", "--device cpu", "--dtype float32", "--quantize int8"),
                *("--compile", "--no-compile", "--threads 1", "--layers 0", "--heads 0.0"),
                *(
                    "--measure norm",
                    "--against x",
                    "--n-steps 2",
                    "--reduce max",
                    "--sink 0",
                    "--roles",
                    "--verify 1",
                ),
                *("--knockout key", "--out o", "--max-new-tokens 1", "--top-k 1"),
                *("--temperature 0", "--seed 1", "--stop x", "--num-samples 2", "--ignore-eos"),
                *("--overflow stop", "--top-p 1", "--min-p 0", "--repetition-penalty 1"),
            )
        ),
        ("D", "--dense o"),
        *(("D", w) for w in ("--html h", "--svg s", "--png p", "--view text", "--picture strip")),
        *(("D", w) for w in ("--position 1", "--n-sources 2", "--replay t.jsonl")),
    ],
)
def test_replay_and_diff_refuse_every_option_that_needs_a_model(
    run: Run, place: Path, mode: str, words: str
) -> None:
    before = sorted(place.iterdir())
    result = run(*FILES[mode], *words.split())
    line = error_line(result)
    assert result.code == 2
    name = words.split()[0].replace("--verify", "--n-verified")
    other = {"R": "--replay", "D": "--diff"}[mode]
    if mode == "R" and name in ("--layers", "--heads", "--reduce"):  # allowed with --dense
        assert line.startswith(f"{name} has no effect without --dense"), line
    else:
        assert line.startswith(f"{name} cannot be used with {other}."), line
    assert sorted(place.iterdir()) == before, "nothing may be written"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--knockout value", "--knockout has no effect without --n-verified"),
        ("--knockout key --verify 0", "--knockout has no effect without --n-verified"),
        ("--position 9", "--position has no effect without --view text or --picture strip"),
        ("--position 9 --view matrix", "--position has no effect without"),
        ("--position 9 --svg x.svg", "--position has no effect without"),
        ("--picture strip", "--picture has no effect without --svg or --png"),
        ("--picture matrix --html x.html", "--picture has no effect without --svg or --png"),
        ("--json --view matrix", "--view has no effect with --json"),
        ("--json --view lines", "--view has no effect with --json"),
        ("--view matrix --verify 1", "--n-verified has no effect without --view lines"),
        ("--view text --n-sources 3", "--n-sources has no effect without --view lines"),
        ("--view matrix --roles", "--roles has no effect without --view lines, --view heads"),
        ("--patch-from A --patch 0.0 --roles", "--roles has no effect with --patch-from"),
        ("--view heads --heads 0.0", "--heads has no effect without --view other than heads"),
        ("--view heads --layers 0", "--layers has no effect without"),
        ("--view heads --reduce max", "--reduce has no effect without"),
        (
            "--against x",
            "--against compares the logits of two tokens, and --measure weight does not",
        ),
        ("--against x --measure both", "--against compares the logits of two tokens"),
        ("--steps 5", "--n-steps has no effect without --measure integrated"),
        ("--measure gradient --steps 5", "--n-steps has no effect without --measure integrated"),
        ("--measure logit --against=", "--against needs a token"),
        ("--measure logit --reduce mean", "--reduce has no effect with --measure logit"),
        ("--measure gradient --heads 0.0", "--heads has no effect on --measure gradient"),
        ("--measure integrated --layers 0", "--layers has no effect on --measure integrated"),
        ("--measure gradient --view heads", "--view heads shows the rows of single heads"),
        ("--view lens", "--view lens shows what --lens measures"),
        ("--max-new-tokens 0", "--temperature has no effect with --max-new-tokens 0"),
        ("--replay t.jsonl --position 9", "--position has no effect without --view text"),
        ("--replay t.jsonl --picture strip", "--picture has no effect without --svg or --png"),
        ("--replay t.jsonl --json --view text", "--view has no effect with --json"),
        ("--replay t.jsonl --json --n-sources 1", "--n-sources has no effect with --json"),
        ("--replay t.jsonl --view matrix --n-sources 1", "--n-sources has no effect without"),
    ],
)
def test_trace_options_are_refused_without_the_options_they_require(
    run: Run, place: Path, words: str, said: str
) -> None:
    start = TRACE[:1] if "--replay" in words else TRACE
    result = run(*start, *words.split())
    assert result.code == 2
    assert error_line(result).startswith(said)


@pytest.mark.parametrize(
    "words", ["--top-k 3", "--stop x", "--num-samples 2", "--seed 0", "--ignore-eos"]
)
def test_sampling_options_are_refused_where_nothing_is_sampled(
    run: Run, place: Path, words: str
) -> None:
    result = run(*TRACE[:2], "--max-new-tokens", "0", *words.split())
    assert result.code == 2
    said = f"{words.split()[0]} has no effect with --max-new-tokens 0."
    assert error_line(result).startswith(said)


@pytest.mark.parametrize(
    "words",
    [
        "--verify 1 --knockout value",
        "--position 9 --view text",
        "--position 9 --svg x.svg --picture strip",
        "--view heads --roles",
        "--view heads --heads 0.0 --out x.jsonl",
        "--view matrix --verify 1 --html x.html",
        "--view text --heads 0.0",
        "--n-sources 2 --json",
        "--measure logit --against x --view heads --roles",
        "--measure logit --verify 1 --heads 0.0 --out x.jsonl --html x.html --svg x.svg",
        "--measure gradient --view text",
        "--measure integrated --steps 2 --view matrix",
        "--roles --json",
        "--replay t.jsonl --view text --position 9",
        "--replay t.jsonl --n-sources 1",
        "--replay t.jsonl --view heads",
        "--diff t.jsonl t.jsonl --json",
    ],
)
def test_trace_options_are_accepted_with_the_options_they_require(
    run: Run, place: Path, words: str
) -> None:
    start = TRACE[:1] if "--replay" in words or "--diff" in words else TRACE
    result = run(*start, *words.split())
    assert result.code == 0, result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("generate --interactive --num-samples 2", "--num-samples has no effect with --inter"),
        ("generate --interactive --num-samples 1", "--num-samples has no effect with --inter"),
        ("generate --json --stream", "--stream has no effect with --json"),
        ("train --json", "--json has no effect without --dry-run"),
        ("train --dry-run --report-to none", "--report-to has no effect with --dry-run"),
        ("train --resume --from tiny", "--from has no effect with --resume"),
        ("plot --json --x tokens", "--x has no effect with --json"),
        ("compare --x tokens", "--x has no effect without --out"),
        ("heads --json --view table", "--view has no effect with --json"),
        ("checkpoints prune tiny --dry-run --yes", "--yes has no effect with --dry-run"),
    ],
)
def test_options_without_effect_on_a_command_are_refused(
    run: Run, place: Path, words: str, said: str
) -> None:
    result = run(*words.split())
    assert result.code == 2
    assert error_line(result).startswith(said)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["generate", "x", "--stop", "--json"], "--stop", "--json"),
        (["generate", "x", "--stop", "a", "--stop", "--no-stream"], "--stop", "--no-stream"),
        (["generate", "x", "--stop", "--jsn"], "--stop", "--jsn"),
        (["generate", "x", "--stop", "-h"], "--stop", "-h"),
        (["generate", "x", "--model", "--seed", "1"], "--model", "--seed"),
        (["generate", "x", "--seed", "--json"], "--seed", "--json"),
        (["train", "--name", "--dry-run"], "--name", "--dry-run"),
        (["train", "--set", "--json"], "--set", "--json"),
        (["train", "--config", "--resume"], "--config", "--resume"),
        (["attention-trace", "x", "--out", "--json"], "--out", "--json"),
        (["attention-trace", "--diff", "a", "--json"], "--diff", "--json"),
        (["plot", "--out", "--json"], "--out", "--json"),
        (["checkpoints", "average", "a", "--out", "--json"], "--out", "--json"),
    ],
)
def test_an_option_is_never_read_as_the_value_of_another(
    run: Run, workplace: Path, words: list[str], name: str, value: str
) -> None:
    result = run(*words)
    assert result.code == 2
    assert error_line(result).startswith(f"{name} needs a value, and {value!r} is an option.")
    assert not list(workplace.iterdir())


def test_the_name_of_an_argument_can_be_an_option_value(run: Run, workplace: Path) -> None:
    Path("a.jsonl").write_text('{"data": "Once upon a time."}\n')
    assert (
        run("prepare", "a.jsonl", "--out", "o", "--field", "data", "--tokenizer", "bytes").code == 0
    )


def test_a_value_that_looks_like_an_option_can_be_given_with_an_equals_sign(
    run: Run, place: Path
) -> None:
    for words in (["--stop=--json"], ["--stop", "--"], ["--stop", "-5"], ["--stop", "---"]):
        result = run("generate", "The", "--max-new-tokens", "3", *words)
        assert result.code == 0, result.err
        assert not result.out.startswith("{")


def test_ctrl_c_prints_one_line_in_every_command(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minigpt.commands import loading
    from minigpt.commands.train import job

    def press(*words: Any, **more: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:  # like some libraries
            raise RuntimeError("import failed") from error

    monkeypatch.setattr(loading, "resolve_model", press)
    monkeypatch.setattr(job, "prepare", press)
    for words in (["generate", "x"], ["attention-trace", "x"], ["heads"], ["train", "t.jsonl"]):
        result = run(*words)
        assert (result.code, result.out, result.err) == (130, "", "interrupted\n")


@pytest.mark.parametrize(
    ("words", "noted"),
    [
        ("--temperature 0 --top-k 5", "--top-k has no effect with --temperature 0"),
        ("--temperature 0 --top-p 0.5", "--top-p has no effect with --temperature 0"),
        ("--temperature 0 --min-p 0.1", "--min-p has no effect with --temperature 0"),
        ("--top-k 1 --temperature 2", "--temperature has no effect with --top-k 1"),
        ("--top-k 1 --top-p 0.5", "--top-p has no effect with --top-k 1"),
        ("--temperature 0 --top-p 1", ""),
        ("--temperature 0 --repetition-penalty 2", ""),
        ("--top-k 2 --top-p 0.5", ""),
    ],
)
@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_a_sampling_option_without_effect_is_reported(
    run: Run, place: Path, command: str, words: str, noted: str
) -> None:
    result = run(command, "The king", "--max-new-tokens", "2", "--model", "tiny", *words.split())
    assert result.code == 0
    assert noted in result.err.splitlines()[:1] if noted else "no effect" not in result.err


@pytest.mark.parametrize(
    ("words", "noted"),
    [
        ("--val-fraction 0 --eval-every 2", "--eval-every has no effect with --val-fraction 0"),
        ("--val-fraction 0 --patience 2", "--patience has no effect with --val-fraction 0"),
        ("--val-fraction 0 --val-split tail", "--val-split has no effect with --val-fraction 0"),
        (
            "--val-fraction 0 --set training.average=0.9",
            "training.average has no effect with --val-fraction 0",
        ),
        (
            "--set training.optimizer=adamw --set training.momentum=0.5",
            "training.momentum has no effect with training.optimizer adamw",
        ),
        (
            "--set training.schedule=cosine --set training.decay_fraction=0.5",
            "training.decay_fraction has no effect with training.schedule cosine",
        ),
        (
            "--dropout 0 --set training.dropout_start=1",
            "training.dropout_start has no effect with --dropout 0",
        ),
        (
            "--family gpt2 --set model.rope_theta=100.0",
            "model.rope_theta has no effect with --family gpt2",
        ),
        ("--val-fraction 0 --patience 0", ""),
    ],
)
def test_a_training_setting_without_effect_is_reported(
    run: Run, place: Path, trained: Path, words: str, noted: str
) -> None:
    text = str(trained / "corpus.txt")
    result = run("train", text, *TINY, *words.split(), "--dry-run", "--json")
    assert result.code == 0
    found = [line.removeprefix("note").strip() for line in result.err.splitlines()]
    found = [line for line in found if "no effect" in line]
    # TINY sets eval_tokens, too.
    assert noted in found if noted else not [line for line in found if "eval_tokens" not in line]


def test_conditions_for_settings_without_effect_are_valid_values() -> None:
    tables = {
        "model": ModelConfig,
        "training": TrainingConfig,
        "data": DataConfig,
        "": SamplingConfig,
    }
    n_conditions = 0
    for table, config in tables.items():
        for f in fields(config):
            for other, value in INEFFECTIVE_IF.get(f.name, ()):
                place, _, name = other.rpartition(".")
                (field,) = (o for o in fields(tables[place or table]) if o.name == name)
                choices = choices_in(field.type) or field.metadata["choices"]
                if choices:
                    assert value in choices
                else:
                    require_within(name, value, field.metadata["bounds"])
                n_conditions += 1
    assert n_conditions > 40


def test_the_help_of_attention_trace_does_not_list_refused_options(run: Run) -> None:
    assert "--overflow" in run("generate", "--help").out
    assert "--overflow" not in run("attention-trace", "--help").out


def test_options_named_in_mode_rules_exist_in_the_help(run: Run) -> None:
    sampling = {f"--{f.name.replace('_', '-')}" for f in fields(SamplingConfig)}
    for name, modes in MODES.items():
        command = ["checkpoints", "prune"] if name == "prune" else [name.replace("_", "-")]
        page = run(*command, "--help").out.replace("--[no-]", "--")
        for mode in modes:
            named = {mode.flag, *(mode.takes or ()), *mode.needs, *mode.refuses, *mode.defaults}
            named |= {other for others in mode.needs.values() for other in others}
            named |= {other for others in mode.refuses.values() for other in others}
            options = {words.split(" ")[0] for words in named if words} - sampling
            for option in options:
                assert re.search(rf"{option}\b(?!-)", page), (name, option)
