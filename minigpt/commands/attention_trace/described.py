"""Traces on stdout with a header, a footer and complete characters."""

import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from minigpt.commands.attention_trace.output import TraceOutput
from minigpt.commands.loading import PromptedModel
from minigpt.config import SamplingConfig
from minigpt.console import make_console, note
from minigpt.errors import cut
from minigpt.rings import ring
from minigpt.styles import print_lines
from minigpt.text.escape import token_name
from minigpt.text.joined import JoinedTokens
from minigpt.tracing.config import N_SOURCES, TraceConfig, has_prompt_rows
from minigpt.tracing.events import EndTrace
from minigpt.tracing.findings import TraceFooter, TraceHeader, TraceStep
from minigpt.tracing.lines import TraceLayout, make_layout
from minigpt.tracing.signals import delay_signals
from minigpt.tracing.summary import footer_lines, header_lines, legend


class DescribedOutput(TraceOutput):
    """Shows traces with a header and a footer, which is shown after Ctrl-C too."""

    def __init__(self, layout: TraceLayout, *, model: Path | None = None) -> None:
        super().__init__(model=model)
        self.console = make_console(is_stderr=False)
        self._layout = layout
        self._is_named = model is not None  # whether stderr shows the model before the first line
        self._compared: int | None = None  # id of the alternative token last noted on stderr
        self._joined = JoinedTokens()
        self._header: TraceHeader | None = None  # of the current trace
        self._n_rows = 0  # rows shown of the current trace
        self._waiting: list[TraceStep] = []  # steps since a character began that is not complete

    def show(self, events: Iterator[Any]) -> bool:
        """Show a trace as its events arrive; return whether it ended without Ctrl-C.

        Raises: KeyboardInterrupt for Ctrl-C before the header.
        """
        started = time.perf_counter()
        header: TraceHeader | None = None
        texts: list[str] = []
        footer: TraceFooter | None = None
        exit: SystemExit | None = None
        proceed: Callable[[], Any] = partial(next, events)
        while footer is None:
            try:
                event, proceed = proceed(), partial(next, events)
                with delay_signals():  # a row is shown completely and only once
                    match event:
                        case TraceHeader():
                            header = event
                        case TraceStep():
                            texts.append(event.text)
                        case TraceFooter():
                            footer = event
                    self.show_event(event)
            except EndTrace:  # thrown into a generator that had already ended
                footer = TraceFooter(len(texts), None, time.perf_counter() - started, None)
                self.show_event(footer)
            except (KeyboardInterrupt, SystemExit) as error:
                if header is None or footer is not None or not isinstance(events, Generator):
                    raise
                exit = error if isinstance(error, SystemExit) else exit
                proceed = partial(events.throw, EndTrace)
        self.end("".join(texts) if footer.n_tokens else None)
        if exit is not None:
            raise exit
        if footer.finish is None:
            next(events, None)  # raises the SystemExit that ended the trace
        return footer.finish is not None

    def show_event(self, event: Any) -> None:
        """Show an event of a trace, and note the token that --against compares with."""
        self.name_model()
        against = event.against if isinstance(event, TraceHeader) else None
        if against is not None and against.n_tokens > 1 and against.id != self._compared:
            self._compared = against.id  # noted once for several samples
            first = f"{token_name(against.data)}, the first of {against.n_tokens} tokens"
            note(f"--against {cut(against.text)}: compared with {first}")
        self.show_lines(event)

    def show_lines(self, event: Any) -> None:
        width = self.console.width
        if isinstance(event, TraceHeader):
            self._joined = JoinedTokens(token.data for token in event.prompt)
            self._header, self._n_rows = event, 0
            lines = header_lines(event, width, self.console.encoding)
            if self._is_named and _share_file(sys.stdout, sys.stderr):
                del lines[0]  # the model, shown already
            lines += legend(self._layout, event)
            print_lines(self.console, [*lines, [], self._layout.heading()])
        elif isinstance(event, TraceStep):
            if event.token.position == len(self._joined.names):  # generated, not in the prompt
                self._joined.add(event.token.data)
            self._n_rows += 1
            self._waiting.append(event)
            if not self._joined.is_open:
                self._show_waiting()
        elif self._header is not None:
            self._show_waiting()
            lines = footer_lines(event, self._header, width, n_rows=self._n_rows)
            print_lines(self.console, lines)

    def end(self, text: str | None) -> None:
        """End a trace. Args: text, the generated text; None if there is none."""
        if text is not None:
            print_lines(self.console, [[], [(text, "token")]], is_cut=False)

    def _show_waiting(self) -> None:
        for step in self._waiting:
            rows = (replace(r, sources=r.sources[: self._layout.n_sources]) for r in step.rows)
            shown = replace(step, rows=tuple(rows))
            print_lines(self.console, self._layout.step(shown, self._joined.names))
        self._waiting = []


def output_for(
    prompted: PromptedModel, sampling: SamplingConfig, config: TraceConfig, targets: Any
) -> tuple[DescribedOutput, TraceConfig]:
    """Return the output for the traces of a prompt, and their config with what it needs."""
    shape = prompted.model.config
    end = len(prompted.prompt) + sampling.max_new_tokens
    console = make_console(is_stderr=False)
    layout = make_layout(
        console.width,
        encoding=console.encoding,
        vocab_size=shape.vocab_size,
        n_positions=min(shape.context_length, end),
        n_sources=config.n_sources,
        measures=config.measures,
    )
    if config.n_sources is None:
        config = replace(config, n_sources=max(N_SOURCES, layout.n_sources))
    if targets.has_heads:
        config = replace(config, has_heads=True)  # type: ignore[call-arg]  # the analysis's
    if targets.are_lines:
        return DescribedOutput(layout, model=prompted.folder), config
    if targets.position is not None:  # before the first row is shown
        first = 1 if has_prompt_rows(config, sampling) else len(prompted.prompt)
        last = min(shape.context_length, end - 1)
        ring("tracing.views").require_position(targets.position, first, last)
    files = ring("commands.attention_trace.files")
    return files.FileOutput(targets, layout, model=prompted.folder), config


def _share_file(out: TextIO, err: TextIO) -> bool:
    """Return whether two streams go to the same terminal, pipe or file, as with 2>&1."""
    with suppress(OSError, ValueError):  # a stream without a descriptor
        return os.path.sameopenfile(out.fileno(), err.fileno())
    return False
