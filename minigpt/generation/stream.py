"""Tokens -> text: complete characters only, up to a stop string."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt.generation.decoder import Step
from minigpt.rings import ring
from minigpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextStep:
    """One generated token, and the text that it completes."""

    step: Step
    text: str
    """Text completed by this token: no partial character, no possible start of a stop string."""
    sample: int = 0
    """Index of the sample."""


class TextStream:
    """Turns the steps of one continuation into text, holding back text that is not final yet."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), sample: int = 0) -> None:
        self._tokenizer, self._sample = tokenizer, sample
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._finder = ring("generation.stops").StopFinder(stops) if stops else None

    def push(self, step: Step) -> TextStep:
        """Add the next step; if it completes a stop string, its finish becomes "stop"."""
        is_end = step.finish == "end_of_text"
        data = b"" if is_end else self._tokenizer.token_bytes(step.token)
        # A limit may be reached inside a character, which is then dropped.
        text = self._utf8.decode(data, final=is_end)
        if finder := self._finder:
            text = finder.push(text) + (finder.finish() if step.finish else "")
            if finder.is_found:
                step = replace(step, finish="stop")
        return TextStep(step, text, self._sample)


def stream_text(
    steps: Iterable[Step], tokenizer: Tokenizer, stops: Sequence[str] = ()
) -> Iterator[TextStep]:
    """Turn steps into text, up to an end-of-text token or a stop string."""
    stream = TextStream(tokenizer, stops)
    for step in steps:
        item = stream.push(step)
        yield item
        if item.step.finish:
            return
