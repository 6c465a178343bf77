"""Textbook claims about attention, measured and judged.

Each claim is one module: ``measure`` trains and tests models and returns results, ``judge`` turns
results into a Verdict, ``table`` into rows of text and ``panels`` into line charts.
"""

CLAIMS = ("long-range", "explainable", "parallel")
"""Names of the claims; the module of each has underscores for hyphens."""
