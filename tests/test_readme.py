"""The README tells the truth: every minigpt command that it shows runs, in its order."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from minigpt.commands import app

ROOT = Path(__file__).resolve().parents[1]

# The same commands on a model that trains in a second: only the size is another.
TINY = shlex.split(
    "--max-steps 2 --context-length 32 --batch-size 2 --set model.d_model=16 "
    "--set model.n_head=4 --set model.d_mlp=16 --set training.micro_batch_size=2"
)
TINY_COMPARED = shlex.split(
    "--budget steps:2 --seeds 1 --tokenizer bytes --set model.context_length=32 "
    "--set training.batch_size=2 --set model.d_model=32 --set model.n_head=4"
)
TINY_FROM = shlex.split("--max-steps 2 --context-length 32 --batch-size 2")


def shown_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if "minigpt " in line]


def run(line: str) -> tuple[int, str]:
    before, _, command = line.rpartition("| ")
    given = shlex.split(before)[1] + "\n" if before else None
    arguments = shlex.split(command)[1:]
    if arguments[0] == "train" and "--resume" not in arguments:
        arguments += TINY_FROM if "--from" in arguments else TINY
        if "--arch" in arguments:
            # A recurrent model has one head and no MLP.
            arguments += ["--set", "model.n_head=1", "--set", "model.d_mlp=0"]
    elif arguments[0] == "train":
        arguments[arguments.index("--max-steps") + 1] = "4"
    elif arguments[0] == "compare":
        arguments += TINY_COMPARED
    elif "prune" in arguments:
        arguments.append("--yes")
    elif arguments[0] in ("generate", "attention-trace") and not (
        {"--max-new-tokens", "--replay", "--diff"} & {*arguments}
    ):
        arguments += ["--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input=given)
    return result.exit_code, f"{line}\n{result.output}\n{result.exception!r}"


def test_every_command_that_the_readme_shows_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MINIGPT_CACHE_DIR", str(tmp_path / "cache"))
    text = "The king said: once upon a time there was a book. To be, or not to be!\n" * 60
    for name in ("my-book.txt", "my-letters.txt"):
        (tmp_path / name).write_text(text)
    commands = shown_commands()
    assert len(commands) >= 13, "the README shows the three jobs and what came of them"
    for line in commands:
        code, output = run(line)
        assert code == 0, output


def test_the_first_two_commands_are_demo_and_test() -> None:
    first_block = re.search(r"```console\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert first_block is not None
    targets = [line.split("#")[0].strip() for line in first_block[1].splitlines()]
    assert targets == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target.split()[1]}: $(INSTALLED)" in makefile for target in targets)


def test_the_reading_order_names_the_core_with_its_line_counts() -> None:
    script = [sys.executable, str(ROOT / "docs" / "reading_order.py")]
    now = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    readme = (ROOT / "README.md").read_text()
    shown = readme.split("reading order: begin -->\n")[1].split("<!-- reading order: end")[0]
    number = re.compile(r"([\d,]+) \|$", re.MULTILINE)
    assert number.sub("", shown) == number.sub("", now), "run docs/reading_order.py --write"
    counts = [[int(n.replace(",", "")) for n in number.findall(text)] for text in (shown, now)]
    # Exact counts would make every change edit the README; `make format` writes them.
    assert counts[0] == pytest.approx(counts[1], rel=0.05), "run docs/reading_order.py --write"
