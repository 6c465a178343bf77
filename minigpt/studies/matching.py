"""Find the width at which a model has a given number of parameters."""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from minigpt.config import ModelConfig
from minigpt.model.cost import parameter_count


def closest_in_size(
    with_width: Callable[[int], ModelConfig], widths: Sequence[int], n_parameters: int
) -> ModelConfig:
    """Return the config whose parameter count is closest to ``n_parameters``.

    Args: with_width builds the config of a width; widths, ascending.
    """

    def count(width: int) -> int:
        return parameter_count(with_width(width))

    place = bisect_right(widths, n_parameters, key=count)
    neighbours = widths[max(place - 1, 0) : place + 1]
    return with_width(min(neighbours, key=lambda width: abs(count(width) - n_parameters)))
