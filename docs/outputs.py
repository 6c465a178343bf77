"""Update the command outputs in README.md and docs/, and write a page for each command.

    python docs/outputs.py            everything (make docs)
    python docs/outputs.py --commands the pages of the commands only, in seconds

The commands of each Markdown block that starts with ```console and a line `$ minigpt ...` are run,
in the order of the file and in one new folder, and their output replaces the lines below them.
A comment `<!-- show 12 lines -->` before the block limits the output of each of its commands.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
LEARNING = ("tutorial.md", "worksheet.md", "reading-a-trace.md")
PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in LEARNING)]
COMMANDS = ROOT / "docs" / "commands"
BLOCK = re.compile(r"(?:<!-- show (\d+) lines -->\n)?```console\n(\$ minigpt .*?)```\n", re.DOTALL)


def with_outputs(page: str, folder: Path) -> str:
    """Return a page whose blocks show the current output of their commands."""

    def updated(block: re.Match[str]) -> str:
        max_lines = int(block[1] or 0)
        parts = []
        for command in re.findall(r"^\$ (.*(?:\\\n.*)*)$", block[2], re.MULTILINE):
            lines = run(command, folder)
            if max_lines and len(lines) > max_lines:
                lines = [*lines[:max_lines], "..."]
            parts += [f"$ {command}", *lines]
        limit = f"<!-- show {max_lines} lines -->\n" if max_lines else ""
        return f"{limit}```console\n" + "\n".join(parts) + "\n```\n"

    return BLOCK.sub(updated, page)


def run(command: str, folder: Path) -> list[str]:
    """Run a command as in a terminal of 80 columns; return its lines on stdout and stderr."""
    before, _, ours = command.replace("\\\n", " ").rpartition("| ")
    stdin = shlex.split(before)[1] + "\n" if before else None
    words = [sys.executable, "-m", *shlex.split(ours)]
    environment = os.environ | {"COLUMNS": "80", "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    environment["MINIGPT_CACHE_DIR"] = str(folder / ".cache")  # without the user's compiled graphs
    print(f"$ {command}", file=sys.stderr, flush=True)
    done = subprocess.run(
        words,
        cwd=folder,
        env=environment,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}: {command}\n{done.stdout}")
    shown = done.stdout.replace(f"{sys.executable} -m minigpt", "minigpt").replace(f"{ROOT}/", "")
    return [line.rstrip() for line in shown.splitlines()]


def command_pages() -> dict[str, str]:
    """Return the page of each command by its file name, and their index as README.md."""
    from minigpt.commands.registry import COMMANDS as LINES

    names = [[name] for name in LINES]
    subcommands = _help(["checkpoints"]).partition("Commands:\n")[2].split("\n")
    names += [["checkpoints", line.split()[0]] for line in subcommands if re.match(r"  \w", line)]
    pages, index = {}, ["# Commands", "", "Each page shows the output of `--help`.", ""]
    for words in sorted(names):
        text = _help(words)
        title, name = " ".join(["minigpt", *words]), "-".join(words)
        line = text.split("\n\n")[1].strip().partition("\n")[0]
        pages[f"{name}.md"] = f"# {title}\n\n{line}.\n\n```text\n{text.rstrip()}\n```\n"
        index.append(f"- [{title}]({name}.md): {line[0].lower()}{line[1:]}")
    return pages | {"README.md": "\n".join(index) + "\n"}


def _help(words: list[str]) -> str:
    from minigpt.commands import app

    result = CliRunner().invoke(app, [*words, "--help"], env={"COLUMNS": "80"}, prog_name="minigpt")
    return result.stdout


def main() -> None:
    COMMANDS.mkdir(exist_ok=True)
    for name, text in command_pages().items():
        (COMMANDS / name).write_text(text, encoding="utf-8")
    if "--commands" in sys.argv:
        return
    for page in PAGES:
        with tempfile.TemporaryDirectory() as folder:
            text = with_outputs(page.read_text(encoding="utf-8"), Path(folder))
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
