"""Record the first minutes with a fresh clone in a terminal, and write docs/first-minutes.md.

    python docs/first_minutes.py

Clones this repository, without uncommitted changes, into a new folder and runs make demo in a tmux
window of 80 columns. Then it types the commands that the demo suggests next. Needs git, make and
tmux; packages come from the caches of pip and uv if they are there.
"""

import itertools
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-minutes.md"
COLUMNS, ROWS = 80, 40
CAPTURES = {20: "20 s", 40: "40 s", 60: "60 s", 120: "2 minutes"}
# Name and pattern of each timed event, in this order.
MARKS = {
    "make starts the installation": r"^Installing minigpt",
    "the packages are installed": r"^1\. The model that ships",
    "the tale is generated": r"^120 tokens",
    "its trace and the page are written": r"^Open demo-\S+ in a browser",
    "training begins": r"^run    checkpoints/",
    "the model is trained": r"^best   checkpoints/",
    "the trained model's text and trace are shown": r"^Next, with your own text",
}
AFTER = [
    ". .venv/bin/activate",
    "minigpt attention-trace --model storyteller --seed 1 --n-verified 2 --max-new-tokens 6 "
    "'The king had three sons. The king'",
]
HEAD = """# The first minutes

What a terminal of {columns} columns shows in the first minutes after `git clone` and `make demo`
in a new folder. Recorded by `python docs/first_minutes.py` on {machine}, with the
packages in uv's cache.

| after | event |
| --- | --- |
{marks}

After the demo, these lines were typed: {after}.
"""


class Terminal:
    """A tmux terminal whose screen can be read."""

    def __init__(self, folder: Path) -> None:
        self.tmux = ["tmux", "-L", f"first-minutes-{os.getpid()}", "-f", os.devnull]
        environment = {"HISTFILE": os.devnull, "LC_ALL": "C.UTF-8"}
        variables = [word for item in environment.items() for word in ("-e", "=".join(item))]
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        shell = "PS1='$ ' exec bash --norc --noprofile"
        self._run("new-session", "-d", *size, *variables, "-c", str(folder), shell)
        while "$" not in self.screen():
            time.sleep(0.1)

    def type(self, line: str) -> None:
        self._run("send-keys", "-l", line)
        self._run("send-keys", "Enter")

    def screen(self, *, with_history: bool = False) -> str:
        return self._run("capture-pane", "-p", *(["-S", "-"] if with_history else []))

    def close(self) -> None:
        self._run("kill-server")

    def _run(self, *words: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        return subprocess.run(
            [*self.tmux, *words], check=True, capture_output=True, text=True, env=clean
        ).stdout


def film(terminal: Terminal, marks: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the name and the screen of each capture; record when each mark appears."""
    started = time.monotonic()
    captures = list(CAPTURES.items())
    typed = False
    while captures:
        seconds = time.monotonic() - started
        if seconds >= captures[0][0]:
            yield captures.pop(0)[1], terminal.screen()
        text = terminal.screen(with_history=True)
        for name, pattern in MARKS.items():
            if name not in marks and re.search(pattern, text, re.MULTILINE):
                marks[name] = seconds
        if len(marks) == len(MARKS) and not typed:
            typed = True
            for line in AFTER:
                terminal.type(line)
        time.sleep(0.25)
    if missing := [name for name in MARKS if name not in marks]:
        raise SystemExit(f"after five minutes, this had not appeared: {missing}\n{text}")


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    n = len(os.sched_getaffinity(0))
    cores = "one core" if n == 1 else f"{n} cores"
    return f"{cores} of an {model[1] if model else 'unknown processor'}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder))
        marks: dict[str, float] = {}
        try:
            terminal.type(f"git clone -q {ROOT} minigpt && cd minigpt && make demo")
            shots = list(film(terminal, marks))
        finally:
            terminal.close()
    rows = "\n".join(f"| {seconds:.0f} s | {name} |" for name, seconds in marks.items())
    page = HEAD.format(
        columns=COLUMNS,
        machine=machine(),
        marks=rows,
        after=", ".join(f"`{line}`" for line in AFTER),
    )
    for shot, same in itertools.groupby(shots, key=lambda named: named[1]):
        *names, last = [name for name, _ in same]
        names_in_words = f"{', '.join(names)} and {last}" if names else last
        text = shot.replace(str(ROOT), "https://.../minigpt").rstrip()
        text = re.sub(r"file:///\S+/minigpt", "file:///.../minigpt", text)
        page += f"\n## After {names_in_words}\n\n```text\n{text}\n```\n"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
