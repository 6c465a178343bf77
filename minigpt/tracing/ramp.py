"""Numbers from 0 to 1 as colours, or as characters where there are none."""

# Colours of viridis, which is perceptually uniform and reads in grey too (van der Walt and Smith
# 2015, BSD); between two of them it is straight enough.
_ANCHORS = [
    bytes.fromhex(text)
    for text in (
        "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c "
        "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
    ).split()
]
N_COLOURS = 64
DENSITY = " .:-=+*#%@"
"""Characters of rising density."""


def colour(share: float) -> str:
    """Return the colour of a number, of N_COLOURS: ``#440154`` for 0 or less, yellow for 1."""
    clipped = min(max(share, 0.0), 1.0)
    place = round(clipped * (N_COLOURS - 1)) / (N_COLOURS - 1) * (len(_ANCHORS) - 1)
    low = min(int(place), len(_ANCHORS) - 2)
    part = place - low
    channels = zip(_ANCHORS[low], _ANCHORS[low + 1], strict=True)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in channels)


def density(share: float) -> str:
    """Return the character of a number: a blank for next to nothing, ``@`` for 1 or more."""
    clipped = min(max(share, 0.0), 1.0)
    return DENSITY[round(clipped * (len(DENSITY) - 1))]
