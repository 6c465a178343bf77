"""Output of traces: lines or a view on stdout, and files."""

import os
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from minigpt.commands.attention_trace.targets import LINES, Targets
from minigpt.commands.loading import show_model
from minigpt.commands.output import note
from minigpt.console import make_console, print_lines, write_result
from minigpt.errors import cut
from minigpt.files import resource_errors, write_atomically, writing_aside
from minigpt.rings import ring
from minigpt.text.escape import JoinedTokens, visible
from minigpt.tracing.events import Trace, TraceEvent, TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.file import to_json_line
from minigpt.tracing.lines import TraceLayout, footer_lines, header_lines

_LINES_BELOW = 3  # the seed, and the shell's next prompt


class TraceOutput:
    """Shows traces on stdout and writes their files, one trace after another."""

    def __init__(
        self,
        targets: Targets,
        layout: TraceLayout,
        *,
        model: Path | None = None,
        is_quiet: bool = False,
    ) -> None:
        """Args: model, named on stderr when the first trace begins; is_quiet, for no stdout."""
        self._model = model
        self._targets, self._layout = targets, layout
        is_quiet |= targets.is_stdout  # the lines of --out are the result
        self._view = "" if is_quiet else "json" if targets.as_json else targets.view or LINES
        self._console = make_console(is_stderr=False)
        self._files = ExitStack()
        self._out: BinaryIO | None = None
        self._joined = JoinedTokens()
        self._is_all = False  # whether every position in view is knocked out
        self._waiting: list[TraceStep] = []  # steps whose token may be part of a character

    def __enter__(self) -> "TraceOutput":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rename the file of --out into place, unless there was an error."""
        path = self._targets.out
        if self._out is None or path is None:
            return
        is_kept = kind is None or kind is SystemExit  # a signal: the rows so far are worth keeping
        with resource_errors(path):
            self._files.__exit__(*((None, None, None) if is_kept else (kind, error, trace)))
        if is_kept:
            note(f"wrote {path}")

    def show(self, events: Iterator[TraceEvent]) -> bool:
        """Show a trace as its events come; return whether it ended without Ctrl-C.

        Raises: ConfigError if the trace lacks what a view needs; ResourceError if a file cannot be
            written; KeyboardInterrupt for Ctrl-C before the header.
        """
        started = time.perf_counter()
        is_kept = bool(self._targets.files) or self._view not in ("", "json", LINES)
        header: TraceHeader | None = None
        steps: list[TraceStep] = []
        texts: list[str] = []
        tally: Any = None
        footer: TraceFooter | None = None
        signal: SystemExit | None = None
        while footer is None:
            try:
                event = next(events)
                match event:
                    case TraceHeader():
                        header = event
                    case TraceStep():
                        steps += [event] if is_kept else []
                        texts.append(event.text)
                        if event.effects:
                            tally = tally or ring("tracing.analysis.tally").CauseTally()
                            tally.add(event)
                    case TraceFooter():
                        footer = event
                self._show_event(event)
            except (KeyboardInterrupt, SystemExit) as error:
                if header is None or footer is not None or not isinstance(events, Generator):
                    raise
                signal = error if isinstance(error, SystemExit) else None
                try:
                    footer = events.throw(KeyboardInterrupt)
                except KeyboardInterrupt:  # it had ended
                    seconds = time.perf_counter() - started
                    footer = TraceFooter(
                        len(texts), None, seconds, None, cause=tally and tally.check()
                    )
                self._show_event(footer)
        assert header is not None
        if self._view == LINES and footer.n_tokens:
            print_lines(self._console, [[], [("".join(texts), "token")]], is_cut=False)
        if is_kept:
            self._show_views(Trace(header, tuple(steps), footer))
        if signal is not None:
            raise signal
        return footer.finish is not None

    def _show_event(self, event: TraceEvent) -> None:
        width = self._console.width
        if self._model is not None:
            show_model(self._model)
            self._model = None
        against = event.against if isinstance(event, TraceHeader) else None
        if against is not None and against.n_tokens > 1:
            first = f"{visible(against.data)}, the first of {against.n_tokens} tokens"
            note(f"--against {cut(against.text)}: compared with {first}")
        if self._targets.out is not None:
            self._write(to_json_line(event) + "\n", self._targets.out)
        if self._view == "json":
            write_result(to_json_line(event) + "\n")
        elif self._view != LINES:
            return
        elif isinstance(event, TraceHeader):
            self._joined = JoinedTokens(token.data for token in event.prompt)
            self._is_all = event.n_verified == "all"
            lines = header_lines(event, width) + self._layout.legend(event)
            print_lines(self._console, [*lines, [], self._layout.heading()])
        elif isinstance(event, TraceStep):
            if event.token.position == len(self._joined.names):  # generated, not of the prompt
                self._joined.add(event.token.data)
            self._waiting.append(event)
            if not self._joined.is_open:
                self._show_waiting()
        else:
            self._show_waiting()
            print_lines(self._console, footer_lines(event, width, is_all=self._is_all))

    def _show_waiting(self) -> None:
        for step in self._waiting:
            rows = (replace(r, sources=r.sources[: self._layout.n_sources]) for r in step.rows)
            lines = self._layout.step(replace(step, rows=tuple(rows)), self._joined.names)
            print_lines(self._console, lines)
        self._waiting = []

    def _write(self, line: str, path: Path) -> None:
        """Write a line of --out: aside, to be renamed at the end; or to a device or a pipe."""
        if self._targets.is_stdout:
            write_result(line)
            return
        with resource_errors(path):
            if self._out is None:
                is_new = not path.exists() or path.is_file()
                # realpath, as a link stays one; but a link to a pipe leads nowhere.
                place = Path(os.path.realpath(path))
                file = writing_aside(place) if is_new else path.open("wb")
                self._out = self._files.enter_context(file)
            self._out.write(line.encode())
            self._out.flush()

    def _show_views(self, trace: Trace) -> None:
        targets = self._targets
        if self._view not in ("", "json", LINES):
            print_lines(self._console, self._drawn(self._view, trace))
        for path in targets.files:
            if path == targets.html:
                data = self._drawn("page", trace)
            else:
                format = path.suffix.lower().removeprefix(".")
                data = self._drawn("pictures", trace, format=format)
                if format == "png":
                    _note_missing(ring("tracing.views.pictures").missing_characters(trace))
            write_atomically(path, data)
            note(f"wrote {path}")

    def _drawn(self, view: str, trace: Trace, **more: Any) -> Any:
        options = ring("tracing.views").ViewOptions(
            position=self._targets.position,
            width=self._console.width,
            height=self._console.height - _LINES_BELOW if sys.stdout.isatty() else None,
            has_colour=self._console.color_system in ("256", "truecolor")
            and not self._console.no_color,
            picture=self._targets.picture,
            **more,
        )
        return ring(f"tracing.views.{view}").show(trace, options)


def _note_missing(characters: str) -> None:
    """Say once which characters a picture has only as escapes."""
    if characters:
        shown = " ".join(characters[:8]) + (" ..." if len(characters) > 8 else "")
        note(
            f"no installed font has {shown}: the picture has escapes instead. Install a font that "
            "has them, such as Noto, or write --svg"
        )
