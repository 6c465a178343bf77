"""--help and --version: every option there, in 80 columns, with what holds without it."""

import re

import pytest
from calls import Run
from typer.testing import CliRunner

from minigpt.commands import app
from minigpt.config import SamplingConfig
from minigpt.presets import PRESETS

COMMANDS = [
    "train",
    "generate",
    "attention-trace",
    "heads",
    "evaluate",
    "plot",
    "compare",
    "claims",
    "prepare",
]


def help_of(command: str) -> str:
    result = CliRunner().invoke(
        app, [command, "--help"], env={"COLUMNS": "80"}, prog_name="minigpt"
    )
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_in_aligned_lines(command: str) -> None:
    lines = help_of(command).splitlines()
    assert all(len(line) <= 80 for line in lines)
    options = [line for line in lines if re.match(r"  (-h, )?--", line)]
    columns = {match.end() for line in options if (match := re.match(r"  \S.*?  +(?=\S)", line))}
    assert len(columns) == 1, "one column for all groups"
    assert not any(line.rstrip("]").endswith(".") for line in options)


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_sampling_options_show_the_defaults_that_hold(command: str) -> None:
    text, sampling = help_of(command), SamplingConfig()
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "num_samples"):
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag} N .*\[{re.escape(str(getattr(sampling, name)))}\]", text), flag


def test_train_shows_what_the_default_preset_holds() -> None:
    text, nano = help_of("train"), PRESETS["nano"]
    assert f"[{nano['training']['max_steps']}]" in text
    assert re.search(rf"--n-layer N +Blocks \[{nano['model']['n_layer']}\]", text)
    assert re.search(r"--preset NAME +nano, mini or small \[nano\]", text)


def test_the_convention_of_the_trace_and_its_escapes_are_in_its_help() -> None:
    text = " ".join(help_of("attention-trace").split())
    assert "the row of the query that produced it, at the position before it" in text
    assert r"␣, its line breaks as \n, bytes that are no text as \xe2." in text


def test_the_program_lists_its_commands(run: Run) -> None:
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: minigpt ")
    listed = re.findall(r"(?m)^  ([a-z-]+)  +[A-Z].*[^.]$", result.out.split("Commands:")[1])
    assert listed == [*COMMANDS, "checkpoints"]


def test_no_command_shows_the_help_and_is_a_usage_error(run: Run) -> None:
    result, asked = run(), run("--help")
    assert (result.code, result.out) == (2, "")
    assert result.err == asked.out


def test_version_names_ours_and_what_decides_results(run: Run) -> None:
    result = run("--version")
    assert result.code == 0
    assert re.fullmatch(r"minigpt .+ \(torch \d+\.\d+.*, Python \d+\.\d+\.\d+\)\n", result.out)
