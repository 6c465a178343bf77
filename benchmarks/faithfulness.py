"""Compare how well measures predict exact knockout effects: the tables of docs/faithfulness.md.

    python benchmarks/faithfulness.py    the model that ships
    python benchmarks/faithfulness.py stories260K=../shared/weights/stories260K nano=shakespeare

Each NAME=MODEL compares the measures on a model and writes the table between the lines
<!-- NAME --> and <!-- end NAME --> of docs/faithfulness.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "faithfulness.md"
PROMPTS = {"nano": "First Citizen:\nBefore we proceed"}
COLUMNS = ("rank_correlation", "top_1", "top_3", "top_5", "deletion")


def compared(model: str, prompt: str, words: list[str]) -> dict[str, Any]:
    """Return the result of ``minigpt measures --json``."""
    command = [sys.executable, "-m", "minigpt", "measures", "--model", model, "--json", *words]
    run = subprocess.run([*command, prompt], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def table(facts: dict[str, Any]) -> str:
    """Return a Markdown table; in bold the best measure of each column, excluding controls."""
    controls = ("distance", "random", "exact")
    results = facts["results"]
    lines = [
        "| measure | rank correlation | top 1 | top 3 | top 5 | deletion |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    best = {
        column: max(
            one["metrics"][column]["mean"]
            for one in results
            if one["name"] not in controls and one["metrics"][column]
        )
        for column in COLUMNS
    }
    for one in results:
        is_control = one["name"] in controls
        cells = [f"*{one['name']}*" if is_control else f"`{one['name']}`"]
        for column in COLUMNS:
            value = one["metrics"][column]
            if value is None:
                cells.append("-")
                continue
            is_best = not is_control and value["mean"] == best[column]
            mean = f"**{value['mean']:.2f}**" if is_best else f"{value['mean']:.2f}"
            cells.append(f"{mean} [{value['low']:.2f}, {value['high']:.2f}]")
        lines.append(f"| {' | '.join(cells)} |")
    about = (
        f"{facts['n_tokens']} tokens, {facts['mean_positions']:.0f} positions each on average, "
        f"{facts['n_knockouts']:,} knockouts."
    )
    return "\n".join([*lines, "", about])


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", default=["shipped=storyteller"])
    parser.add_argument("--max-new-tokens", default="60")
    parser.add_argument("--num-samples", default="2")
    arguments = parser.parse_args()
    words = ["--seed", "0", "--max-new-tokens", arguments.max_new_tokens]
    words += ["--num-samples", arguments.num_samples]
    models = [pair.partition("=")[::2] for pair in arguments.models]
    for name, model in models:  # before minutes of work
        if not model or f"<!-- end {name} -->\n" not in PAGE.read_text(encoding="utf-8"):
            parser.error(f"{name}={model}: give NAME, of a table in {PAGE.name}, and MODEL")
    for name, model in models:
        found = compared(model, PROMPTS.get(name, "Once upon a time"), words)
        text = PAGE.read_text(encoding="utf-8")
        first, last = f"<!-- {name} -->\n", f"<!-- end {name} -->\n"
        before, _, rest = text.partition(first)
        _, _, after = rest.partition(last)
        PAGE.write_text(f"{before}{first}\n{table(found)}\n\n{last}{after}", encoding="utf-8")
        print(f"{name}\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
