"""Stop strings, found across token boundaries."""

from collections.abc import Sequence


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
    """Return the length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if stop.startswith(text[-n:])), 0)
