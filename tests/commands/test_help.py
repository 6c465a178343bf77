"""--help and --version: golden pages in 80 columns, with the actual defaults."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
from calls import Run
from typer.testing import CliRunner

from minigpt.commands import app
from minigpt.commands.registry import COMMANDS
from minigpt.config import SamplingConfig
from minigpt.presets import PRESETS
from minigpt.tracing.config import SAMPLING

PAGES = Path(__file__).parent / "help"
"""Every --help page. To regenerate: UPDATE_HELP=1 pytest tests/commands/test_help.py"""
SUBCOMMANDS = ["list", "show", "verify", "prune", "average", "export", "import"]
CALLS = [[], *([name] for name in COMMANDS), *(["checkpoints", name] for name in SUBCOMMANDS)]


def help_of(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="minigpt")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_help_pages_equal_the_golden_files(words: list[str]) -> None:
    path = PAGES / f"{'-'.join(['minigpt', *words])}.txt"
    if os.environ.get("UPDATE_HELP"):
        path.write_text(help_of(*words), encoding="utf-8")
    assert help_of(*words) == path.read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_command() -> None:
    named = {f"{'-'.join(['minigpt', *words])}.txt" for words in CALLS}
    assert {path.name for path in PAGES.iterdir()} == named


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_help_fits_80_columns_in_aligned_lines(words: list[str]) -> None:
    lines = help_of(*words).splitlines()
    assert all(len(line) <= 80 for line in lines)
    first = next(i for i, line in enumerate(lines) if re.fullmatch("[A-Z][a-z]+:", line))
    options = [line for line in lines[first:] if re.match(r"  (-h, )?--", line)]
    columns = {match.end() for line in options if (match := re.match(r"  \S.*?  +(?=\S)", line))}
    assert len(columns) == 1, "all groups must be aligned in one column"
    assert not any(line.rstrip("]").endswith(".") for line in options)


@pytest.mark.parametrize("columns", [80, 60, 50])
@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_no_line_of_help_ends_within_the_name_of_an_option(words: list[str], columns: int) -> None:
    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": str(columns)})
    assert not re.search(r"\w-\n", result.stdout)
    assert "\N{NON-BREAKING HYPHEN}" not in result.stdout


@pytest.mark.parametrize("command", ["generate", "attention-trace"])
def test_sampling_options_show_their_defaults(command: str) -> None:
    text = " ".join(help_of(command).split())
    sampling = SAMPLING if command == "attention-trace" else SamplingConfig()
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "num_samples"):
        flag, default = f"--{name.replace('_', '-')}", f"{getattr(sampling, name):g}"
        assert re.search(rf"{flag} N [^\[]*(\[0, 1\]|\(0, 1\])? *\[{re.escape(default)}\]", text), (
            flag
        )


def test_train_shows_the_values_of_the_default_preset() -> None:
    text, nano = help_of("train"), PRESETS["nano"]
    assert f"[{nano['training']['max_steps']}]" in text
    assert re.search(rf"--n-layer N +Number of blocks \[{nano['model']['n_layer']}\]", text)
    assert re.search(r"--preset NAME +Starting point: nano, mini or small \[nano\]", text)


def test_every_option_of_a_config_has_the_name_and_docstring_of_its_field() -> None:
    text = " ".join(help_of("generate").split())
    for field in dataclasses.fields(SamplingConfig):
        assert f"--{field.name.replace('_', '-')} " in text.replace("[no-]", ""), field.name
    assert "Seed of the sampling RNG" in text


def test_help_of_attention_trace_explains_its_conventions_and_escapes() -> None:
    text = " ".join(help_of("attention-trace").split())
    assert "the row of the query that produced it, at the position before it" in text
    assert r"␣ is a space, \n a line break, and \xe2 a byte that is not valid text." in text


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_help_of_commands_that_draw_says_how_to_install_matplotlib(
    words: list[str],
) -> None:
    text = help_of(*words)
    draws = re.search(r"\.svg|--svg|[Pp]icture", text) is not None
    assert ("pip install 'minigpt-attention[plot]'" in " ".join(text.split())) == draws


def test_the_program_lists_its_commands(run: Run) -> None:
    result = run("--help")
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Usage: minigpt ")
    listed = re.findall(r"(?m)^  ([a-z-]+)  +[A-Z].*[^.]$", result.out.split("Commands:")[1])
    assert listed == list(COMMANDS)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "attention-trace"])
def test_the_program_lists_a_command_with_the_first_line_of_its_help(command: str) -> None:
    assert help_of(command).splitlines()[2].strip() == COMMANDS[command]


def test_calling_without_a_command_shows_the_help_and_is_a_usage_error(run: Run) -> None:
    result, asked = run(), run("--help")
    assert (result.code, result.out) == (2, "")
    assert result.err == asked.out


def test_version_names_minigpt_torch_and_python(run: Run) -> None:
    result = run("--version")
    assert result.code == 0
    assert re.fullmatch(r"minigpt .+ \(torch \d+\.\d+.*, Python \d+\.\d+\.\d+\)\n", result.out)
