"""minigpt train: its output, its files and its settings."""

import json
import os
import platform
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from calls import TINY, Run, error_line, proposed

from minigpt.checkpoint.folder import RunFolder
from minigpt.presets import PRESETS
from minigpt.settings import read_toml


@pytest.fixture(autouse=True)
def corpus(trained: Path, workplace: Path) -> None:
    shutil.copy(trained / "corpus.txt", workplace)


@pytest.mark.integration
def test_the_last_lines_name_the_checkpoint_its_loss_and_next_commands(run: Run) -> None:
    result = run("train", "corpus.txt", "--name", "my-run", *TINY)
    assert (result.code, result.out) == (0, "")
    best = json.loads(Path("checkpoints/my-run/best.json").read_text())
    said = re.search(
        r"\nbest +(\S+): val loss ([\d.]+) nats/token, ([\d.]+) bits/byte\n", result.err
    )
    assert said
    assert Path(said[1], "model.safetensors").is_file()
    assert float(said[2]) == pytest.approx(best["val_loss"], abs=5e-5)
    assert float(said[3]) == pytest.approx(best["bits_per_byte"], abs=5e-5)
    commands = proposed(result.err, "next")
    assert [words[0] for words in commands] == ["generate", "attention-trace"]
    for words in commands:
        assert run(*words).code == 0


@pytest.mark.integration
def test_a_preset_adapts_to_the_requested_heads_and_layout(run: Run) -> None:
    nano = PRESETS["nano"]["model"]
    assert nano["n_kv_head"] % 3, "three heads must not fit the preset"
    short = ["--max-steps", "1", "--context-length", "64", "--n-layer", "1", "--batch-size", "1"]
    for name, words in (
        ("heads", ["--n-head", "3"]),
        ("wide", ["--d-model", "24", "--n-head", "2"]),
        ("gpt2", ["--family", "gpt2"]),
    ):
        assert run("train", "corpus.txt", "--name", name, *short, *words).code == 0
    made = {
        name: read_toml(Path("checkpoints", name, "config.toml"))["model"]
        for name in ("heads", "wide", "gpt2")
    }
    assert (made["heads"]["n_head"], made["heads"]["n_kv_head"]) == (3, 1)
    assert made["wide"]["d_mlp"] == 64  # 8/3 of the width as in Llama, not the preset's value
    assert (made["gpt2"]["n_kv_head"], made["gpt2"]["d_mlp"]) == (6, 4 * nano["d_model"])


@pytest.mark.integration
def test_the_model_card_keeps_the_command_that_started_the_run(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "carded", *TINY).code == 0
    words = shlex.join(["train", "corpus.txt", "--name", "carded", *TINY])
    first = Path("checkpoints/carded/step-000004/README.md").read_text()
    assert words in first
    assert run("train", "--resume", "--name", "carded", "--max-steps", "6").code == 0
    second = Path("checkpoints/carded/step-000006/README.md").read_text()
    assert words in second
    best = json.loads(Path("checkpoints/carded/latest.json").read_text())
    assert f"Validation loss: {best['val_loss']:.4f} nats/token" in second
    assert "Steps: 6," in second


def test_a_file_name_that_is_not_utf_8_is_accepted(run: Run) -> None:
    name = os.fsdecode(b"\xff.txt")
    shutil.copy("corpus.txt", name)
    assert run("train", name, *TINY).code == 0
    [card] = Path("checkpoints").glob("*/step-000004/README.md")
    assert card.read_text(encoding="utf-8").isascii()


@pytest.mark.integration
def test_suggested_commands_fit_a_short_context(run: Run) -> None:
    result = run("train", "corpus.txt", *TINY, "--context-length", "8")
    assert result.code == 0
    assert all(run(*words).code == 0 for words in proposed(result.err, "next"))


@pytest.mark.integration
def test_without_held_out_text_samples_start_like_the_training_text(run: Run) -> None:
    words = (*TINY, "--tokenizer", "bytes", "--val-fraction", "0", "--sample-every", "2")
    result = run("train", "corpus.txt", *words)
    assert result.code == 0, result.err
    assert result.err.count("sample") == 2


@pytest.mark.integration
def test_training_output_in_a_pipe_has_no_control_bytes(run: Run) -> None:
    err = run("train", "corpus.txt", "--sample-every", "2", *TINY).err
    assert all(line.isprintable() for line in err.split("\n"))
    assert err.count("sample") == 2
    for fact in ("2,971 tokens (bytes)", "2 layers, 2 heads, width 16", "4 steps on cpu", "4/4"):
        assert fact in err


def test_later_sources_of_settings_override_earlier_ones(run: Run) -> None:
    Path("a.toml").write_text("[training]\nlr = 0.5\nbeta1 = 0.5\nbeta2 = 0.5\nseed = 5\n")
    words = ["--config", "a.toml", "--lr", "0.25", "--set", "training.beta1=0.125"]
    assert run("train", "corpus.txt", "--name", "a", *TINY, *words).code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    momentum = PRESETS["nano"]["training"]["momentum"]
    assert (training["momentum"], training["seed"]) == (momentum, 5)
    assert (training["lr"], training["beta1"], training["beta2"]) == (0.25, 0.125, 0.5)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="needs /dev/fd")
def test_a_config_file_can_be_a_pipe(run: Run) -> None:
    """As with --config <(command): a pipe can be read only once."""
    reader, writer = os.pipe()
    os.write(writer, b"[training]\nseed = 5\n")
    os.close(writer)
    words = ["--config", f"/dev/fd/{reader}", *TINY]
    assert run("train", "corpus.txt", "--name", "a", *words).code == 0
    os.close(reader)
    assert read_toml(Path("checkpoints/a/config.toml"))["training"]["seed"] == 5


def test_a_run_can_be_repeated_from_its_own_config(run: Run, trained: Path) -> None:
    config = trained / "checkpoints/tiny/config.toml"
    assert run("train", "--config", str(config), "--name", "again").code == 0
    weights = "step-000004/model.safetensors"
    before = (trained / "checkpoints/tiny" / weights).read_bytes()
    assert Path("checkpoints/again", weights).read_bytes() == before


@pytest.mark.integration
def test_a_preset_adapts_to_the_batch_and_context_of_the_user(run: Run) -> None:
    words = ["--context-length", "40", "--batch-size", "6", "--tokenizer", "bytes"]
    result = run("train", "corpus.txt", "--preset", "small", "--name", "a", *TINY, *words)
    assert result.code == 0, result.err
    assert read_toml(Path("checkpoints/a/config.toml"))["training"]["micro_batch_size"] == 2
    assert run("train", "corpus.txt", "--name", "b", *TINY, *words).code == 0


@pytest.mark.integration
def test_setting_one_training_limit_replaces_the_other(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY, "--max-minutes", "0.0001").code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (training["max_steps"], training["max_minutes"]) == (4, 0.0001)
    assert run("train", "--resume", "--name", "a", "--max-steps", "50").code == 0
    training = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (training["max_steps"], training["max_minutes"]) == (50, 0.0)


@pytest.mark.integration
def test_derived_run_names_contain_text_and_preset_and_never_collide(run: Run) -> None:
    Path("odd name;$(x).v2.txt").write_text(Path("corpus.txt").read_text())
    words = ["train", "odd name;$(x).v2.txt", *TINY, "--max-steps", "1"]
    assert run(*words).code == run(*words).code == 0
    assert {path.name for path in Path("checkpoints").iterdir()} == {
        "odd-name-x-nano",
        "odd-name-x-nano-2",
    }


@pytest.mark.integration
def test_without_data_the_bundled_tales_are_the_training_text(run: Run) -> None:
    assert run("train", *TINY).code == 0
    config = read_toml(Path("checkpoints/tales-nano/config.toml"))
    assert config["data"]["paths"] == ["builtin:tales"]
    assert config["data"]["val_split"] == "documents"
    assert run("train", "--resume", "--max-steps", "5").code == 0
    for name in ("builtin", "builtin:tales"):  # the same text under another name
        assert run("train", name, "--resume", "--max-steps", "5").code == 0
    evaluated = run("evaluate")
    assert evaluated.code == 0
    assert "text   builtin:tales: the run's own" in evaluated.err


@pytest.mark.integration
def test_a_run_older_than_the_tales_resumes_with_the_python_corpus(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path))
    prose = tmp_path / f"builtin-1-python-{platform.python_version()}.jsonl"
    prose.write_text(json.dumps({"text": "Return the path of a file.\n" * 90}))
    assert run("train", "builtin:python", *TINY).code == 0
    config = Path("checkpoints/python-nano/config.toml")
    text = config.read_text()
    older = re.sub(r'paths = \[\s*"builtin:python",\s*\]', "paths = []", text)
    assert older != text
    config.write_text(older)
    assert run("train", "--resume", "--max-steps", "5").code == 0
    assert "text   builtin:python: the run's own" in run("evaluate").err
    result = run("train", "builtin:tales", "--resume", "--max-steps", "6")
    assert "the corpus is not the one that the run 'python-nano' started with" in error_line(result)


@pytest.mark.parametrize("text", [None, "x = [", "data = 5", "[training]\nspeed = 2"])
def test_a_run_without_its_settings_names_the_remedy(
    run: Run, trained: Path, text: str | None
) -> None:
    shutil.copytree(trained / "checkpoints/tiny", "checkpoints/tiny")
    config = Path("checkpoints/tiny/config.toml")
    config.unlink() if text is None else config.write_text(text)
    result = run("train", "--resume", "--name", "tiny", "--max-steps", "6")
    assert result.code == 4
    line = error_line(result)
    assert line.startswith("the run 'tiny' cannot be resumed: ")
    assert line.endswith("or start a new run from its weights with --from tiny.")


def test_a_run_without_its_training_state_names_a_remedy_that_works(
    run: Run, trained: Path
) -> None:
    shutil.copytree(trained / "checkpoints/tiny", "checkpoints/tiny")
    [step] = Path("checkpoints/tiny").glob("step-*")
    shutil.rmtree(step / "training_state")
    line = error_line(run("train", "--resume", "--name", "tiny", "--max-steps", "6"))
    assert "training_state/optimizer.safetensors' is missing. Start a new run under" in line
    assert "manifest" not in line, "without it, no checkpoint can be resumed"
    line = error_line(run("generate", "--model", "tiny", "The"))
    assert line.endswith(
        "if you changed it on purpose, delete manifest.json there and name that folder."
    )
    (step / "manifest.json").unlink()
    assert run("generate", "--model", str(step), "The", "--max-new-tokens", "1").code == 0


@pytest.mark.integration
def test_a_run_on_standard_input_can_be_resumed(run: Run) -> None:
    text = Path("corpus.txt").read_bytes()
    assert run("train", "-", *TINY, stdin=text).code == 0
    assert Path("checkpoints/stdin-nano/step-000004").is_dir()
    assert run("train", "--resume", "--max-steps", "5", stdin=text).code == 0
    assert Path("checkpoints/stdin-nano/step-000005").is_dir()


@pytest.mark.integration
def test_a_run_that_reads_its_own_parent_folder_can_be_resumed(run: Run) -> None:
    words = ["--name", "here", *TINY]
    assert run("train", ".", *words).code == 0
    assert run("train", "--resume", "--name", "here", "--max-steps", "6").code == 0
    assert run("evaluate", "--model", "here").code == 0


def test_resume_does_not_suggest_options_that_it_refuses(run: Run, workplace: Path) -> None:
    rows = [json.dumps({"text": f"Tale {i}. " + "The king went home. " * 40}) for i in range(12)]
    Path("tales.jsonl").write_text("\n".join(rows))
    assert run("train", "tales.jsonl", "--name", "a", *TINY).code == 0
    assert 'val_split = "documents"' in Path("checkpoints/a/config.toml").read_text()
    line = error_line(run("train", "corpus.txt", "--resume", "--max-steps", "6"))
    assert "not the one that the run 'a' started with: data.paths is ['tales.jsonl']" in line
    assert "--val-split" not in line, "--val-split cannot be changed by --resume"


@pytest.mark.integration
def test_resuming_accepts_a_larger_budget_and_a_moved_text(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    Path("corpus.txt").rename("moved.txt")
    words = ["--max-steps", "6", "--eval-every", "1", "--save-every", "5", "--lr", "0.001"]
    result = run("train", "moved.txt", "--resume", *words)
    assert result.code == 0
    assert "from step 4 on" in result.err
    assert RunFolder(Path("checkpoints/a")).steps() == [4, 5, 6]


@pytest.mark.integration
def test_resuming_a_complete_run_changes_nothing(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    weights = Path("checkpoints/a/step-000004/model.safetensors")
    before = weights.read_bytes(), weights.stat().st_mtime_ns
    result = run("train", "--resume", "--name", "a")
    assert result.code == 0
    assert "already complete" in result.err
    config = Path("checkpoints/a/config.toml").read_bytes()
    assert "already complete" in run("train", "--resume", "--max-steps", "2").err
    assert config == Path("checkpoints/a/config.toml").read_bytes(), (
        "the config must not change without training"
    )
    assert before == (weights.read_bytes(), weights.stat().st_mtime_ns)


def test_a_run_name_given_as_data_is_refused_with_the_right_option(run: Run) -> None:
    assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    result = run("train", "--resume", "a")
    assert result.code == 2
    assert error_line(result) == "'a' is a run, not a text. Resume it with --name a."


def test_a_closed_stderr_does_not_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        assert run("train", "corpus.txt", "--name", "a", *TINY).code == 0
    assert RunFolder(Path("checkpoints/a")).steps() == [4]


@pytest.mark.integration
def test_resume_and_generate_default_to_the_same_run(run: Run) -> None:
    for name in ("older", "newer"):
        assert run("train", "corpus.txt", "--name", name, *TINY).code == 0
    (step,) = Path("checkpoints/older").glob("step-*")
    (step / "notes.txt").write_text("a file of the user's, which changes the folder's time")
    assert "checkpoints/newer" in run("generate", "text", "--max-new-tokens", "1").err
    assert "checkpoints/newer" in run("train", "--resume").err


@pytest.mark.integration
def test_max_epochs_is_converted_to_steps_and_resumed(run: Run) -> None:
    n_train = int(2971 * 0.9)
    at = TINY.index("--max-steps")
    words = ["train", "corpus.txt", "--name", "a", *TINY[:at], *TINY[at + 2 :]]
    result = run(*words, "--max-epochs", "0.2")
    assert result.code == 0
    n_steps = -(-n_train // 5 // 128)
    assert f"{n_steps} steps (0.2 epochs)" in result.err
    config = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (config["max_epochs"], config["max_steps"]) == (0.2, n_steps)
    assert "already complete" in run("train", "--resume").err
    assert run("train", "--resume", "--max-epochs", "0.3").code == 0
    last = RunFolder(Path("checkpoints/a")).steps()[-1]
    assert last == -(-n_train * 3 // 10 // 128)
    assert run("train", "--resume", "--max-steps", str(last + 1)).code == 0
    config = read_toml(Path("checkpoints/a/config.toml"))["training"]
    assert (config["max_epochs"], config["max_steps"]) == (0, last + 1)


@pytest.mark.integration
def test_every_score_can_be_trained_and_traced_from_the_command_line(
    run: Run, trained: Path
) -> None:
    words = ["train", str(trained / "corpus.txt"), "--name", "other", *TINY]
    plan = json.loads(run(*words, "--attention", "additive", "--dry-run", "--json").out)
    assert plan["parameters"]["attention"] == 2 * (4 * 16 * 16 + 2 * 8 + 2 * 8 * (8 + 8 + 1))
    assert run(*words, "--attention", "additive", "--max-steps", "2").code == 0
    assert 'attention = "additive"' in Path("checkpoints/other/config.toml").read_text()
    error = error_line(run("train", "--resume", "--attention", "dot"))
    assert "--resume cannot change --attention: it is 'additive' in this run" in error
    error = error_line(run("train", "--resume", "--set", "training.eval_tokens=9"))
    assert "--resume cannot change training.eval_tokens: it is " in error
    assert run("train", "--resume", "--max-steps", "3").code == 0
    ending = ["The king", "--temperature", "0", "--max-new-tokens", "5", "--json"]
    generated = json.loads(run("generate", *ending).out)
    header, *steps, footer = map(json.loads, run("attention-trace", *ending).out.splitlines())
    assert "".join(step["certain_text"] for step in steps) == generated["text"]
    assert header["n_layer"] == 2
    assert footer["worst_row_sum_error"] < 1e-5
    error = error_line(run("generate", "The king", "--compile"))
    assert "this model is of class GPT, with additive on cpu. Use --no-compile" in error
    card = Path("checkpoints/other/step-000003/README.md").read_text()
    assert "only minigpt can read this folder" in card
    assert "library_name: minigpt" in card
    assert "AutoModelForCausalLM" not in card
    shown = run("checkpoints", "show", "other").out
    assert "additive, 2 heads of 8" in shown


@pytest.mark.integration
@pytest.mark.parametrize("arch", ["lstm", "lstm-attention"])
def test_an_lstm_can_be_trained_and_sampled_from_the_command_line(
    run: Run, trained: Path, arch: str
) -> None:
    tiny = " ".join(TINY).replace("--n-head 2 ", "").replace("--set model.d_mlp=16 ", "").split()
    words = ["train", str(trained / "corpus.txt"), "--name", "other", *tiny, "--arch", arch]
    plan = json.loads(run(*words, "--dry-run", "--json").out)
    assert plan["parameters"]["LSTM"] == 2 * (2 * 4 * 16 * 16 + 2 * 4 * 16)
    assert run(*words, "--max-steps", "2").code == 0
    assert f'arch = "{arch}"' in Path("checkpoints/other/config.toml").read_text()
    assert run("train", "--resume", "--max-steps", "3").code == 0
    words = ["The king", "--temperature", "0", "--max-new-tokens", "5"]
    assert len(json.loads(run("generate", *words, "--json").out)["text"]) > 0
    assert f"minigpt, {arch}" in run("checkpoints", "show", "other").out
    trace = run("attention-trace", *words)
    if arch == "lstm":
        assert "a model of arch lstm has no attention to show" in error_line(trace)
    else:
        assert trace.code == 0
    assert arch in Path("checkpoints/other/step-000003/README.md").read_text()
    error = error_line(run("train", "--arch", arch, "--n-head", "2"))
    assert "--n-head can only be 1: it is 2. Leave it out" in error
