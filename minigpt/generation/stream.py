"""Tokens -> text: complete characters only, and stop texts found across token borders."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt.generation.decoder import Step
from minigpt.text.tokenizer import Tokenizer
from minigpt.text.utf8 import Utf8Stream


@dataclass(frozen=True)
class TextStep:
    """One generated token and the text that it made certain."""

    step: Step
    text: str
    """What may be shown now: no half character, nothing that may yet turn out a stop text."""


class StopFinder:
    """Passes text through up to the first of some stop texts, which it keeps back."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.is_found = False
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what is certain to come before any stop text."""
        if self.is_found:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._held = ""
            # The one that is complete first, as if the text came character by character: where
            # tokens happen to end must not matter.
            return text[: min(found)[1]]
        n_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """Return what was held back in vain."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


def stream_text(
    steps: Iterable[Step], tokenizer: Tokenizer, stops: Sequence[str] = ()
) -> Iterator[TextStep]:
    """Turn steps into text as it becomes certain; the texts together are the result.

    The token that ends a document has no text. A step that completes a stop text is the last one
    and its finish says so.
    """
    utf8 = Utf8Stream()
    finder = StopFinder(stops)
    for step in steps:
        is_end = step.finish == "end_of_text"
        text = finder.push("" if is_end else utf8.push(tokenizer.token_bytes(step.token)))
        if step.finish and not finder.is_found:
            text += finder.push(utf8.finish()) + finder.finish()
        if finder.is_found:
            yield TextStep(replace(step, finish="stop"), text)
            return
        yield TextStep(step, text)
