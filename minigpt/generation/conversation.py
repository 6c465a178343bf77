"""A decoder whose prompt can grow or change between answers."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from minigpt.errors import DataError
from minigpt.generation.sliding import SlidingDecoder, Window


class Conversation(SlidingDecoder):
    """A decoder that keeps its cache from one answer to the next."""

    @property
    def is_full(self) -> bool:
        """Whether the window has no room for another token."""
        return len(self._window) > self.context_length

    def replace(self, prompt: Sequence[int]) -> None:
        """Switch to another prompt; the prefix that is already in the cache is not fed again.

        Raises: DataError if it is longer than the context.
        """
        if len(prompt) > self.context_length:
            raise DataError(self._full(len(prompt)))
        pairs = zip(self._window.rows[0], prompt, strict=False)
        n_same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        n_cached = min(n_same, self.cache.length, len(prompt) - 1)
        self._continue(Window({0: list(prompt)}), n_cached)

    def extend(self, tokens: Sequence[int], *, overflow: str = "stop") -> None:
        """Extend the prompt by its latest continuation, without end-of-text, and then by tokens.

        Only tokens that are not in the cache are fed.

        Args: overflow, as in SamplingConfig.
        Raises: DataError if the context window is full and overflow is "stop".
        """
        window = replace(self._window, rows={0: [*self._window.rows[0], *tokens]})
        n_cached = min(self.cache.length, len(window) - 1)
        if len(window) > self.context_length:
            if overflow == "stop":
                raise DataError(self._full(len(window)))
            window.slide(self.context_length)
            n_cached = 0
        self._continue(window, n_cached)

    def _continue(self, window: Window, n_cached: int) -> None:
        """Use a window as the prompt; its first ``n_cached`` tokens are in the cache."""
        if self.cache.n_rows > 1:
            self.forward.keep([0])
        self._start = self._window = window
        self.prompt = window.rows[0]
        self.n_prompt = window.n_forgotten + len(window)
        self.prefill(n_cached)

    def _full(self, n_tokens: int) -> str:
        return (
            f"the context window is full: the conversation has {n_tokens} tokens, but the model "
            f"sees {self.context_length}. Start again, or use --overflow slide."
        )
