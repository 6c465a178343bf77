"""Numbers from 0 to 1 as colours, or as characters where there are none."""

# Nine colours of viridis, which is perceptually uniform and reads in grey too (van der Walt and
# Smith 2015); between them it is straight enough.
_ANCHORS = (
    (68, 1, 84),
    (71, 45, 123),
    (59, 82, 139),
    (44, 114, 142),
    (33, 145, 140),
    (40, 174, 128),
    (94, 201, 98),
    (173, 220, 48),
    (253, 231, 37),
)
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
