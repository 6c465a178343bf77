"""Numbers from 0 to 1 as colours, or as characters where there are none."""

# Colours of viridis, which is perceptually uniform and reads in grey too (van der Walt and Smith
# 2015, BSD); between two of them it is straight enough.
_ANCHORS = bytes.fromhex(
    "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
    "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
N_COLOURS = 64
DENSITY = " .:-=+*#%@"
"""Characters of rising density."""


def colour(share: float) -> str:
    """Return the colour of a number, of N_COLOURS: ``#440154`` for 0 or less, yellow for 1."""
    clipped = min(max(share, 0.0), 1.0)
    n_gaps = len(_ANCHORS) // 3 - 1
    place = round(clipped * (N_COLOURS - 1)) / (N_COLOURS - 1) * n_gaps
    low = min(int(place), n_gaps - 1)
    below, above = _ANCHORS[3 * low : 3 * low + 3], _ANCHORS[3 * low + 3 : 3 * low + 6]
    mixed = (round(a + (b - a) * (place - low)) for a, b in zip(below, above, strict=True))
    return f"#{bytes(mixed).hex()}"


def density(share: float) -> str:
    """Return the character of a number: a blank for next to nothing, ``@`` for 1 or more."""
    clipped = min(max(share, 0.0), 1.0)
    return DENSITY[round(clipped * (len(DENSITY) - 1))]
