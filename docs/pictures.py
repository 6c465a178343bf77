"""Draw the pictures of the README from a real trace.

    python docs/pictures.py MODEL "PROMPT"

Writes docs/trace-dark.svg and docs/trace-light.svg.
"""

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme

from minigpt.commands.loading import load
from minigpt.config import SamplingConfig
from minigpt.console import THEME, spans_to_text
from minigpt.tracing import terminal
from minigpt.tracing.events import TraceHeader, TraceStep
from minigpt.tracing.tracer import TraceConfig, trace

WIDTH = 100
DOCS = Path(__file__).parent


def draw(name: str, theme: TerminalTheme, lines: list[terminal.Line]) -> None:
    """Write lines as an SVG that fetches nothing: the reader's own monospaced font serves."""
    console = Console(
        record=True, width=WIDTH, theme=THEME, file=io.StringIO(), force_terminal=True
    )
    for line in lines:
        console.print(spans_to_text(line))
    svg = console.export_svg(title="minigpt attention-trace", theme=theme, unique_id=name)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)
    svg = svg.replace("Fira Code", "DejaVu Sans Mono")
    (DOCS / f"{name}.svg").write_text(svg)


def main() -> None:
    model, prompt = sys.argv[1:3]
    ready = load(model, prompt, "cpu", "float32")
    config = ready.model.config
    sampling = SamplingConfig(max_new_tokens=24, seed=4)
    layout = terminal.TraceLayout(
        WIDTH, vocab_size=config.vocab_size, n_positions=len(ready.prompt) + 24
    )
    lines: list[terminal.Line] = []
    for event in trace(
        ready.model,
        ready.tokenizer,
        ready.prompt,
        sampling,
        TraceConfig(n_sources=layout.n_sources),
        seed=4,
        model_name=model,
    ):
        if isinstance(event, TraceHeader):
            lines += [*terminal.header_lines(event, WIDTH), layout.heading()]
        elif isinstance(event, TraceStep):
            lines += layout.step(event)
        else:
            lines += terminal.footer_lines(event)
    draw("trace-dark", DIMMED_MONOKAI, lines)
    draw("trace-light", DEFAULT_TERMINAL_THEME, lines)


if __name__ == "__main__":
    main()
