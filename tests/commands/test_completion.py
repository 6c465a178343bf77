"""Completion in real shells, set up by the lines in docs/guide.md."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from calls import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
# Commands with which each shell prints the completions of $LINE.
COMPLETION_COMMANDS = {
    "bash": "COMP_WORDS=($LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); "
    '_minigpt_completion minigpt; printf "%s\\n" "${COMPREPLY[@]}"',
    "fish": 'complete -C "$LINE"',
    # zsh completes only at a prompt, so the arguments of its completion function are printed.
    "zsh": 'whence -w _minigpt_completion >&2; env _TYPER_COMPLETE_ARGS="$LINE" '
    "_MINIGPT_COMPLETE=complete_zsh minigpt",
}


@pytest.mark.integration
@pytest.mark.parametrize("shell", COMPLETION_COMMANDS)
def test_the_setup_line_of_the_guide_enables_completion(shell: str, tmp_path: Path) -> None:
    if os.name == "nt" or shutil.which(shell) is None:
        pytest.skip(f"needs {shell}, not on Windows")
    found = re.search(rf"^\| {shell} \|.*\| `(.*)` \|$", GUIDE, re.MULTILINE)
    assert found, "the guide has no setup line for this shell"
    setup = found[1].replace("\\|", "|")  # as Markdown escapes it in a table
    program = tmp_path / "minigpt"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m minigpt "$@"\n')
    program.chmod(0o755)
    begin = "autoload -U compinit; compinit -u -d $HOME/dump; " if shell == "zsh" else ""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    env["PATH"] = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    for line, expected in (
        ("minigpt gen", "generate"),
        ("minigpt checkpoints ver", "verify"),
        ("minigpt generate --dev", "--device"),
    ):
        done = subprocess.run(
            [shell, "-c", f"{begin}{setup}; {COMPLETION_COMMANDS[shell]}"],
            env=env | {"LINE": line},
            capture_output=True,
            text=True,
        )
        assert expected in re.split(r"[^\w-]+", done.stdout), done
