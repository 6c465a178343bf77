"""A terminal that replaces stdout and stderr, and characters that could control it."""

import os
import re
import sys
import termios
import threading

import pytest

pty = pytest.importorskip("pty", reason="needs pseudo-terminals")

HOSTILE = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\r\x7f"
# Sequences written by rich: colours, and cursor movements that redraw the live line.
OURS = re.compile(r"\x1b\[[\d;]*[mKA]|\x1b\[\?25[lh]|\r\n|\r")


class Screen:
    """A terminal that replaces stdout and stderr and records everything written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, width: int = 80) -> None:
        self.master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, width))
        self.received = b""
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, self.stream)
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 4096):
                self.received += data
        except OSError:  # Linux raises it once the other end is closed
            pass

    def text(self) -> str:
        """Close the terminal and return its contents."""
        self.stream.close()
        self.reader.join()
        os.close(self.master)
        return self.received.decode("utf-8")


def control_characters(shown: str) -> set[str]:
    """Return control characters that rich did not write."""
    return {c for c in OURS.sub("", shown) if not c.isprintable()} - {"\n", "\t"}
