"""Read a trace file with the standard library only.

    minigpt attention-trace --out king.jsonl "The king"
    python examples/read_a_trace.py king.jsonl

Prints each generated token with its probability, the share of the attention sink, and the earlier
token that it attended to most. docs/trace-format.md describes the file.
"""

import json
import sys


def main(path: str) -> None:
    """Print one line per generated token of a trace file."""
    with open(path, encoding="ascii") as file:
        header, *records = map(json.loads, file)
    print(f"model {header['model']}, {header['n_layer']} layers of {header['n_head']} heads")
    steps = [record for record in records if record["type"] == "step"]
    for step in steps:
        row = step["rows"][0]  # one row per measure; the first one is the attention weight
        line = f"{step['text']!r:12} {step['probability']:6.1%}  sink {row['sink']:4.0%}"
        if row["sources"]:
            strongest = row["sources"][0]
            line += f"  most from {strongest['text']!r} ({strongest['weight']:.0%})"
        print(line)
    sink = sum(step["rows"][0]["sink"] for step in steps) / max(1, len(steps))
    print(f"mean share of the sink: {sink:.0%}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
