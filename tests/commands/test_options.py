"""Config dataclasses become command options, and their values are validated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from calls import Run, error_line
from typer.testing import CliRunner

from minigpt.commands import app as program
from minigpt.commands.help.pages import Command
from minigpt.commands.options import Fields, Option, command
from minigpt.commands.registry import COMMANDS
from minigpt.errors import ConfigError
from minigpt.fields import check_fields, option, setting


@dataclass(frozen=True, kw_only=True)
class BrewConfig:
    """How tea is made."""

    minutes: int = option(3, "[1, inf)", group="Time", aliases=("--steep",))
    """Minutes of steeping; 1 for green tea. Not shown."""
    kind: Literal["green", "black"] = option("black")
    """Kind of leaf."""
    sugar: float | Literal["auto"] = option(0.0, shown="none")
    """Grams of sugar, or auto."""
    with_milk: bool = option(False)
    """Add milk."""
    notes: tuple[str, ...] = option((), metavar="TEXT", has_escapes=True)
    """Note; repeat for several."""
    water: str = setting("tap")
    """Water, which is not an option."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrayConfig:
    """What is served."""

    brew: BrewConfig
    cups: int = option(1)
    """Number of cups."""


def call(function: Callable[..., None], *words: str) -> str:
    app = typer.Typer(rich_markup_mode=None, add_completion=False)
    app.command(cls=Command)(function)
    result = CliRunner().invoke(app, words, env={"COLUMNS": "80"}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def brewed() -> tuple[Callable[..., None], list[BrewConfig]]:
    got: list[BrewConfig] = []

    @command
    def brew(*, config: BrewConfig) -> None:
        got.append(config)

    return brew, got


def test_a_config_is_built_from_its_options(
    brewed: tuple[Callable[..., None], list[BrewConfig]],
) -> None:
    brew, got = brewed
    call(brew)
    words = r"--minutes 4 --kind green --sugar 2 --with-milk --notes a\nb --notes c"
    call(brew, *words.split())
    call(brew, "--steep", "5", "--sugar", "auto")
    assert got == [
        BrewConfig(),
        BrewConfig(minutes=4, kind="green", sugar=2.0, with_milk=True, notes=("a\nb", "c")),
        BrewConfig(minutes=5, sugar="auto"),
    ]


def test_help_shows_first_sentence_choices_default_and_group_but_no_alias(
    brewed: tuple[Callable[..., None], list[BrewConfig]],
) -> None:
    text = call(brewed[0], "--help")
    time, brew = text.split("Time:\n")[1].split("Brew:\n")
    assert time.strip() == "--minutes N   Minutes of steeping; 1 for green tea [3]"
    lines = [line.strip() for line in brew.split("\n\n")[0].splitlines()]
    assert lines == [
        "--kind NAME   Kind of leaf: green or black [black]",
        "--sugar N     Grams of sugar, or auto [none]",
        "--with-milk   Add milk",
        "--notes TEXT  Note; repeat for several",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--minutes 0", "--minutes must be at least 1: it is 0."),
        ("--minutes two", "--minutes takes a whole number: it is 'two'."),
        ("--sugar much", "--sugar takes a number or auto: it is 'much'."),
        ("--kind grean", "unknown --kind 'grean'. Did you mean green?"),
        (
            "--notes a\udcff",
            "--notes is not UTF-8 text: it is 'a\\udcff'. Convert it first, for example with "
            "iconv.",
        ),
    ],
)
def test_a_bad_value_is_a_config_error(
    brewed: tuple[Callable[..., None], list[BrewConfig]], words: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        call(brewed[0], *words.split())
    assert str(caught.value) == message


def test_an_empty_path_is_refused_instead_of_meaning_the_working_directory(run: Run) -> None:
    for words in (["prepare", "--out"], ["claims", "--out"], ["checkpoints", "import", "ckpt.pt"]):
        result = run(*words, "")
        assert result.code == 2
        assert error_line(result).endswith(" is empty. Give a path.")


def test_fields_contains_only_typed_options_nested_like_the_config() -> None:
    got: list[dict[str, Any]] = []

    @command
    def serve(
        *,
        settings: Annotated[
            dict[str, Any],
            Fields(
                TrayConfig,
                without=("brew.kind",),
                group="Tray",
                defaults=TrayConfig(brew=BrewConfig(minutes=7)),
            ),
        ],
        sweep: Annotated[int, Option("Number of sweeps")] = 2,
    ) -> None:
        got.append(settings | {"sweep": sweep})

    call(serve)
    call(serve, "--minutes", "4", "--cups", "2", "--sweep", "3")
    assert got == [{"sweep": 2}, {"brew": {"minutes": 4}, "cups": 2, "sweep": 3}]
    text = call(serve, "--help")
    assert "Minutes of steeping; 1 for green tea [7]" in text
    assert "--kind" not in text
    assert text.count("Tray:") == 1


def test_a_shell_completes_commands_options_and_values() -> None:
    def completed(words: str, position: int) -> list[str]:
        env = {
            "_MINIGPT_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(position),
        }
        return CliRunner().invoke(program, [], env=env, prog_name="minigpt").stdout.split()

    assert completed("minigpt c", 1) == ["compare", "claims", "checkpoints"]
    assert completed("minigpt generate --dev", 2) == ["--device"]
    assert completed("minigpt generate --device c", 3) == ["cpu", "cuda"]


def test_a_command_of_a_deleted_ring_is_not_listed_and_reports_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(COMMANDS, "no-such", "A command of a ring that is not there")
    listed = run("--help").out.split("Commands:")[1]
    assert "heads" in listed
    assert "no-such" not in listed
    result = run("no-such")
    assert result.code == 2
    assert error_line(result).startswith("this installation lacks minigpt.commands.no_such.")
