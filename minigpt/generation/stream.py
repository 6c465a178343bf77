"""Tokens -> text: complete characters only, and stop strings found across token boundaries."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from minigpt.config import SamplingConfig
from minigpt.generation.decoder import Decoder, Step
from minigpt.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TextStep:
    """One generated token, and the text that it completes."""

    step: Step
    text: str
    """Text completed by this token: without a partial character, or the possible start of a stop
    string."""
    sample: int = 0
    """Index of the sample."""


class StopFinder:
    """Passes text through up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.is_found = False
        self._held = ""

    def push(self, text: str) -> str:
        """Append text; return the part that cannot be in a stop string."""
        if self.is_found:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found = True
            self._held = ""
            # The stop string that ends first, as if characters arrived one by one: the result
            # must not depend on token boundaries.
            return text[: min(found)[1]]
        n_held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def finish(self) -> str:
        """Return the text that was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)


class TextStream:
    """Turns the steps of one continuation into text, holding back what is not final yet."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), sample: int = 0) -> None:
        self._tokenizer, self._sample = tokenizer, sample
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._finder = StopFinder(stops)

    def push(self, step: Step) -> TextStep:
        """Take the next step; if it completes a stop string, its finish becomes "stop"."""
        finder = self._finder
        data = b"" if step.finish == "end_of_text" else self._tokenizer.token_bytes(step.token)
        text = finder.push(self._utf8.decode(data))
        if step.finish and not finder.is_found:
            # A limit may be reached inside a character, which is left out.
            is_cut = step.finish in ("length", "context")
            rest = "" if is_cut else self._utf8.decode(b"", final=True)
            text += finder.push(rest) + finder.finish()
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


def stream_samples(
    decoder: Decoder,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    *,
    seed: int,
    forced: Sequence[int] = (),
) -> Iterator[TextStep]:
    """Yield the steps of all samples, decoded in batches of ``decoder.n_rows``.

    Sample i has the seed ``seed + i``.

    Args: forced, the token ids of ``sampling.force``.
    Raises: CheckpointError for NaN or inf in the logits.
    """
    for first in range(0, sampling.num_samples, decoder.n_rows):
        numbers = range(first, min(first + decoder.n_rows, sampling.num_samples))
        streams = [TextStream(tokenizer, sampling.stop, number) for number in numbers]
        stopped: set[int] = set()
        for row, step in decoder.batch(
            sampling,
            seeds=[seed + number for number in numbers],
            end_of_text=tokenizer.end_of_text_ids,
            stopped=stopped,
            forced=forced,
        ):
            item = streams[row].push(step)
            if item.step.finish:
                stopped.add(row)
            yield item
