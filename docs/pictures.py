"""Draw the pictures in README.md and docs/tracing.md from a real trace.

    python docs/pictures.py MODEL "PROMPT"

Writes docs/trace-dark.svg and trace-light.svg (the lines, with knockouts), trace-text.svg,
trace-matrix.svg and trace-heads.svg (the views), trace-map.svg and trace-strip.svg (for a paper).
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme

import minigpt
from minigpt.styles import THEME, spans_to_text
from minigpt.tracing.findings import Trace
from minigpt.tracing.lines import make_layout
from minigpt.tracing.spans import Line
from minigpt.tracing.summary import footer_lines, header_lines
from minigpt.tracing.views import ViewOptions, heads, matrix, pictures, text

WIDTH, HEIGHT = 100, 40
N_TOKENS, SEED = 24, 2
DOCS = Path(__file__).parent


def draw(name: str, theme: TerminalTheme, lines: list[Line]) -> None:
    """Write lines as an SVG that loads no font: it uses a monospaced one of the reader's system."""
    console = Console(
        record=True,
        width=WIDTH,
        theme=THEME,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    for line in lines:
        console.print(spans_to_text(line))
    svg = console.export_svg(title="minigpt attention-trace", theme=theme, unique_id=name)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    (DOCS / f"{name}.svg").write_text(svg)


def streamed(trace: Trace) -> list[Line]:
    """Return the lines that a terminal shows while the text is generated."""
    layout = make_layout(
        WIDTH,
        vocab_size=1 + max(token.id for token in trace.tokens),
        n_positions=len(trace.tokens),
        measures=trace.header.measures,
        n_sources=3,
    )
    lines = [*header_lines(trace.header, WIDTH), layout.heading()]
    for step in trace.steps:
        lines += layout.step(step, trace.joined.names)
    return [*lines, *footer_lines(trace.footer, trace.header, WIDTH)]


def main() -> None:
    model, prompt = sys.argv[1:3]
    options = {"max_new_tokens": N_TOKENS, "seed": SEED, "device": "cpu"}
    trace = minigpt.trace(model, prompt, n_sources=3, **options)
    draw("trace-dark", DIMMED_MONOKAI, streamed(trace))
    draw("trace-light", DEFAULT_TERMINAL_THEME, streamed(trace))
    checked = minigpt.trace(
        model, prompt, n_sources=3, n_verified=2, roles=True, **options | {"max_new_tokens": 8}
    )
    draw("trace-verify", DIMMED_MONOKAI, streamed(checked))
    options = ViewOptions(width=WIDTH, height=HEIGHT)
    for name, view in (("text", text), ("matrix", matrix), ("heads", heads)):
        draw(f"trace-{name}", DIMMED_MONOKAI, view.show(trace, options))
    (DOCS / "trace-map.svg").write_bytes(pictures.show(trace))
    (DOCS / "trace-strip.svg").write_bytes(pictures.show(trace, ViewOptions(picture="strip")))


if __name__ == "__main__":
    main()
