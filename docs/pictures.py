"""Draw the pictures of the README and of tracing.md from a real trace.

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
from minigpt.console import THEME, spans_to_text
from minigpt.tracing import lines as terminal
from minigpt.tracing.events import Trace
from minigpt.tracing.spans import Line
from minigpt.tracing.views.heads import heads_view
from minigpt.tracing.views.matrix import matrix_view
from minigpt.tracing.views.pictures import draw_matrix, draw_strip
from minigpt.tracing.views.text import text_view

WIDTH, HEIGHT = 100, 40
N_TOKENS, SEED = 24, 4
DOCS = Path(__file__).parent


def draw(name: str, theme: TerminalTheme, lines: list[Line]) -> None:
    """Write lines as an SVG that fetches nothing: the reader's own monospaced font serves."""
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
    """Return what a terminal shows while the text is generated."""
    layout = terminal.TraceLayout(
        WIDTH,
        vocab_size=1 + max(token.id for token in trace.tokens),
        n_positions=len(trace.tokens),
        measures=trace.header.measures,
        n_sources=3,
    )
    lines = [*terminal.header_lines(trace.header, WIDTH), layout.heading()]
    for step in trace.steps:
        lines += layout.step(step)
    return [*lines, *terminal.footer_lines(trace.footer, WIDTH)]


def main() -> None:
    model, prompt = sys.argv[1:3]
    options = {"max_new_tokens": N_TOKENS, "seed": SEED, "device": "cpu"}
    trace = minigpt.trace(model, prompt, n_sources=3, **options)
    draw("trace-dark", DIMMED_MONOKAI, streamed(trace))
    draw("trace-light", DEFAULT_TERMINAL_THEME, streamed(trace))
    checked = minigpt.trace(
        model, prompt, n_sources=3, n_verified=2, has_roles=True, **options | {"max_new_tokens": 8}
    )
    draw("trace-verify", DIMMED_MONOKAI, streamed(checked))
    draw("trace-text", DIMMED_MONOKAI, list(text_view(trace, WIDTH)))
    draw("trace-matrix", DIMMED_MONOKAI, list(matrix_view(trace, WIDTH, HEIGHT)))
    draw("trace-heads", DIMMED_MONOKAI, list(heads_view(trace, WIDTH)))
    draw_matrix(trace, DOCS / "trace-map.svg")
    draw_strip(trace, DOCS / "trace-strip.svg")


if __name__ == "__main__":
    main()
