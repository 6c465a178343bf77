"""Show what minigpt does: a tale and its trace from the model that ships, then from your own model.

python demo.py        in an environment that has minigpt (make demo, or install.py)
"""

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "Once upon a time"
NAME = "There was once a fox named Zilpo. One morning"
HOW_TO_READ = """
How to read this:
  Each line is a new token; prob is the probability that the model gave it.
  The rest of the line shows where its attention heads looked, 100% in total.
  sink is the first position, where heads look when nothing else matches.
  Then come the tokens with the most attention, with their position and share.
  Few bits: the attention is on few tokens. Many bits: it is spread out.
  Attention is not causation: --n-verified 2 shows the effect of hiding a token."""

AFTER_A_MINUTE = """
After one minute, the words are right, but there is no story yet. The model that
ships was trained for six hours, on more text."""


def main() -> None:
    name = time.strftime("demo-%Y%m%d-%H%M%S")
    page = f"{name}.html"
    shipped = ["--model", "storyteller", "--seed", "1", "--temperature", "0.6", "--ignore-eos"]
    copying = ["--model", "storyteller", "--heads", "4.1", "--temperature", "0"]
    own = ["--model", name, "--seed", "1", "--temperature", "0.5", "--ignore-eos"]

    say("1. The model that ships tells a tale")
    minigpt("generate", *shipped, "--max-new-tokens", "120", PROMPT)

    say("2. What each of its tokens attended to")
    minigpt("attention-trace", *shipped, "--max-new-tokens", "12", "--html", page, PROMPT)
    print(HOW_TO_READ)
    print(f"Open {page} in a browser for the interactive page.", flush=True)

    say("3. One head alone, which copies a name that it has never read")
    minigpt("attention-trace", *copying, "--max-new-tokens", "5", NAME)

    say("4. A model of your own: at most one minute on 150 tales")
    # With complete words in its vocabulary, even 40 steps on a slow core give a text of words.
    minigpt("train", "--name", name, "--tokenizer", "bpe:2048", "--max-minutes", "1")
    minigpt("generate", *own, "--max-new-tokens", "80", PROMPT)
    minigpt("attention-trace", *own, "--max-new-tokens", "12", PROMPT)
    print(AFTER_A_MINUTE, flush=True)

    activate = r".venv\Scripts\activate" if os.name == "nt" else ". .venv/bin/activate"
    say(f"Next, with your own text:\n  {activate}\n  minigpt train FILE")
    print("  minigpt train FILE --from storyteller   # English, from the model that ships")


def minigpt(*words: str) -> None:
    """Show a command and run it."""
    print("\n$ " + " \\\n    ".join(shell_lines("minigpt", *words)), flush=True)
    program = Path(sys.executable).with_name("minigpt")  # Windows adds .exe itself
    try:
        ended = subprocess.run([program, *words]).returncode
    except FileNotFoundError:
        remedy = "Activate minigpt's environment; python install.py creates one in .venv."
        sys.exit(f"error: minigpt is not installed for {sys.executable}. {remedy}")
    if ended:
        sys.exit(ended)


def shell_lines(*words: str) -> list[str]:
    """Return a command in lines that fit the terminal, with two columns left for " \\"."""
    room = shutil.get_terminal_size().columns - 6 if sys.stdout.isatty() else sys.maxsize
    lines = [""]
    for word in map(shlex.quote, words):
        if lines[-1] and len(lines[-1]) + 1 + len(word) > room:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return lines


def say(line: str) -> None:
    is_plain = not sys.stdout.isatty() or os.environ.get("NO_COLOR") or os.name == "nt"
    print(f"\n{line}" if is_plain else f"\n\033[1m{line}\033[0m", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the command has already reported it
        sys.exit(130)
