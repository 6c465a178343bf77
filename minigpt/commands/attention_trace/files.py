"""Traces as JSON, in other views, and in files (--json, --view, --out, --html, --dense etc.)."""

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from minigpt.checkpoint.stored_tensors import weight_files
from minigpt.commands.attention_trace.described import DescribedOutput
from minigpt.commands.attention_trace.targets import LINES, Targets
from minigpt.console import note, outlive_reader, write_result
from minigpt.errors import ConfigError
from minigpt.files import open_regular, resource_errors, write_atomically, writing_aside
from minigpt.places import require_writable
from minigpt.rings import ring
from minigpt.styles import print_lines
from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.config import TraceConfig
from minigpt.tracing.file import to_json_line
from minigpt.tracing.findings import Trace, TraceEvent, TraceHeader
from minigpt.tracing.lines import TraceLayout

_PICTURES = ("svg", "png")
_FILES = ("dense", "out", "html", *_PICTURES)
_LINES_BELOW = 3  # the seed, and the shell's next prompt


def check_files(
    targets: Targets,
    n_samples: int,
    config: TraceConfig | None = None,
    *,
    replayed: Path | None = None,
) -> None:
    """Check the view and the files before any long work.

    Args: config, of a trace to generate; replayed, the file to show, which must not be overwritten.
    Raises: ConfigError for a view of heads with a measure that has none, a lens view without a
        lens, a missing folder, a suffix of another format, a picture without matplotlib, one file
        for several traces, or one file named by several options; ResourceError for a file that
        cannot be written.
    """
    if config is not None:
        _check_view(targets.view, config)
    options: dict[str, str] = {}  # by the file that each names
    if replayed is not None:
        options[os.path.realpath(replayed)] = "--replay"
    for name in _FILES:
        path: Path | None = getattr(targets, name)
        if path is None:
            continue
        if name != "out" and n_samples > 1:
            what, remedy = "writes one trace, but there are", "Leave --num-samples out"
            if replayed is not None:
                what = f"takes one trace, but {str(replayed)!r} has"
                remedy = "Trace without --num-samples"
            raise ConfigError(f"--{name} {what} {n_samples}. {remedy}.")
        _check_name(name, path)
        if name == "dense" and replayed is not None:  # it is read
            options[os.path.realpath(path)] = "--dense"
            continue
        other = options.setdefault(os.path.realpath(path), f"--{name}")
        if other != f"--{name}":
            raise ConfigError(f"{other} and --{name} name the same file {str(path)!r}.")
        _check_place(name, path, targets)


def _check_view(view: str | None, config: TraceConfig) -> None:
    """Refuse a view of what the trace does not measure."""
    measure = config.measures[0]
    if view == "lens" and not getattr(config, "lens", False):
        raise ConfigError("--view lens shows what --lens measures. Add --lens.")
    if view == "heads" and not facts_of(measure).has_heads:
        raise ConfigError(
            f"--view heads shows the rows of single heads, but --measure {measure} is of the "
            "entire model. Use --measure logit, or another view."
        )


def _check_name(name: str, path: Path) -> None:
    """Refuse a dash, and a suffix of another picture format."""
    if str(path) == "-":
        raise ConfigError(f"--{name} takes the name of a file. Standard output is /dev/stdout.")
    suffix = path.suffix[1:].lower()
    if name in _PICTURES and suffix in _PICTURES and suffix != name:
        raise ConfigError(
            f"--{name} writes {name.upper()}, but {str(path)!r} has another suffix. Give "
            f"--{suffix}, or another name."
        )


def _check_place(name: str, path: Path, targets: Targets) -> None:
    """Refuse a place that cannot be written, and standard output if it shows something else."""
    if not path.parent.is_dir():
        raise ConfigError(f"--{name}: there is no folder {str(path.parent)!r}. Create it first.")
    if name == "out" and _is_stdout(targets):
        if targets.view is not None or targets.as_json:
            other = "--json" if targets.as_json else "--view"
            raise ConfigError(
                f"--out {str(path)!r} is standard output, where {other} writes too. Leave one of "
                "them out."
            )
        return
    if path.is_dir() or (name != "out" and path.exists() and not path.is_file()):
        # These files are written under another name and renamed, which would replace a device.
        raise ConfigError(f"--{name}: {str(path)!r} is not a file. Choose another name.")
    if name in _PICTURES:
        ring("figures").require_matplotlib(path)
    else:
        require_writable(path)


def _is_stdout(targets: Targets) -> bool:
    """Return whether --out is standard output, such as /dev/stdout."""
    try:
        return targets.out is not None and os.path.samestat(os.stat(targets.out), os.fstat(1))
    except OSError:
        return False


def weights_sha256(folder: Path) -> str:
    """Return the SHA-256 of a folder's concatenated weight files.

    Raises: CheckpointError if there are none; ResourceError if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with resource_errors(path), open_regular(path) as file:
            hashlib.file_digest(file, lambda: digest)
    return digest.hexdigest()


def _check_model(targets: Targets, model: Path) -> None:
    """Refuse files that would overwrite one of the model's folder."""
    model_files = {os.path.realpath(path) for path in model.iterdir()}
    for name in _FILES:
        path: Path | None = getattr(targets, name)
        if path is not None and os.path.realpath(path) in model_files:
            raise ConfigError(f"--{name}: {str(path)!r} is a file of the model. Choose another.")


@contextmanager
def _noting(path: Path) -> Iterator[None]:
    """Note on stderr that a file was written, unless there was an error."""
    yield
    note(f"wrote {path}")


class FileOutput(DescribedOutput):
    """Shows traces as lines, as JSON or in a view, and writes their files."""

    def __init__(
        self,
        targets: Targets,
        layout: TraceLayout,
        *,
        model: Path | None = None,
        is_quiet: bool = False,
    ) -> None:
        """Args: model, named on stderr when the first trace begins; is_quiet, for empty stdout.

        Raises: ConfigError for a file that would overwrite one of the model.
        """
        super().__init__(layout, model=model)
        if model is not None:
            _check_model(targets, model)
        if targets.drawings or targets.dense or (targets.out and not _is_stdout(targets)):
            outlive_reader()
        is_quiet |= _is_stdout(targets)  # the lines of --out are the result
        self._targets = targets
        self._digest = weights_sha256(model) if model is not None and targets.out else None
        self._view = "" if is_quiet else "json" if targets.as_json else targets.view or LINES
        self._is_kept = bool(targets.drawings) or self._view not in ("", "json", LINES)
        self._events: list[TraceEvent] = []  # of the current trace, if a view or file needs them
        self._files = ExitStack()
        self._out: BinaryIO | None = None
        self._rows = ExitStack()
        if targets.dense is not None:
            self.dense = lambda weights_LHS: self._add(weights_LHS)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
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

    def show(self, events: Iterator[Any]) -> bool:
        """Show a trace as its events arrive; return whether it ended without Ctrl-C.

        Raises: as in the base class; ConfigError if the trace has no data for a view; ResourceError
            if a file cannot be written.
        """
        self._events = []
        is_complete = False
        stopped: SystemExit | None = None
        with self._rows:
            try:
                is_complete = super().show(events)
            except SystemExit as error:  # a signal: the rows so far are worth keeping
                stopped = error
        if stopped is not None:
            raise stopped
        return is_complete

    def show_lines(self, event: Any) -> None:
        """Show an event as lines or JSON, if stdout shows those, and write it to --out."""
        if isinstance(event, TraceHeader):
            if self._digest is not None:
                event = replace(event, model_sha256=self._digest)
            if self._targets.dense is not None:
                writing = ring("tracing.analysis.dense").writing_rows(
                    self._targets.dense,
                    n_layer=event.n_layer,
                    n_head=event.n_head,
                    metadata={"model": event.model[-1000:], "seed": str(event.seed)},
                )
                self._rows.enter_context(_noting(self._targets.dense))
                self._add = self._rows.enter_context(writing)
        if self._is_kept:
            self._events.append(event)
        if self._targets.out is not None:
            self._write(to_json_line(event) + "\n", self._targets.out)
        if self._view == "json":
            write_result(to_json_line(event) + "\n")
        elif self._view == LINES:
            super().show_lines(event)

    def end(self, text: str | None) -> None:
        """Show the view of a trace and write its page and pictures."""
        if self._view == LINES:
            super().end(text)
        if self._is_kept:
            self._show_views(Trace.of(self._events))

    def _write(self, line: str, path: Path) -> None:
        """Write a line of --out to a file that is renamed at the end, or to a device or pipe."""
        if _is_stdout(self._targets):
            write_result(line)
            return
        with resource_errors(path):
            if self._out is None:
                is_new = not path.exists() or path.is_file()
                # realpath keeps a symbolic link in place, but cannot resolve one to a pipe.
                place = Path(os.path.realpath(path))
                file = writing_aside(place) if is_new else path.open("wb")
                self._out = self._files.enter_context(file)
            self._out.write(line.encode())
            self._out.flush()

    def _show_views(self, trace: Trace) -> None:
        if self._view not in ("", "json", LINES):
            print_lines(self.console, self._drawn(self._view, trace))
        for path in self._targets.drawings:
            is_page = path == self._targets.html
            data = self._drawn("page", trace) if is_page else self._picture(path, trace)
            write_atomically(path, data)
            note(f"wrote {path}")

    def _picture(self, path: Path, trace: Trace) -> bytes:
        """Return a picture in the format of its path; note the characters that no font has."""
        format = path.suffix.lower().removeprefix(".")
        data: bytes = self._drawn("pictures", trace, format=format)
        missing = ring("tracing.views.pictures").missing_characters(trace)
        if format == "png" and missing:
            shown = " ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
            note(
                f"no installed font has {shown}: the picture has escapes instead. Install a font "
                "that has them, such as Noto, or write --svg"
            )
        return data

    def _drawn(self, view: str, trace: Trace, **more: Any) -> Any:
        options = ring("tracing.views").ViewOptions(
            position=self._targets.position,
            width=self.console.width,
            encoding=self.console.encoding,
            height=self.console.height - _LINES_BELOW if sys.stdout.isatty() else None,
            has_colour=self.console.color_system in ("256", "truecolor")
            and not self.console.no_color,
            picture=self._targets.picture,
            **more,
        )
        return ring(f"tracing.views.{view}").show(trace, options)
