"""Format numbers for people: three digits, SI prefixes, durations."""


def short(number: float) -> str:
    """Return a number with three digits: 987, 12.3k, 1.05M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            digits = f"{number / size:.3g}"
            return f"{float(digits):.0f}{letter}" if "e" in digits else f"{digits}{letter}"
    return f"{number:.3g}"


def with_unit(number: float, unit: str) -> str:
    """Return a number with three digits, an SI prefix and a unit: 10.4 MB, 987 B."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:#.3g}".rstrip(".") + f" {prefix}{unit}"
    return f"{number:.0f} {unit}"


def duration(seconds: float) -> str:
    """Return a duration in words: 42 s, 3 min 05 s, 2 h 10 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def count(number: float, noun: str) -> str:
    """Return a number with its noun: 1 step, 4,096 tokens, 14.7 epochs."""
    is_whole = isinstance(number, int) or number >= 100
    shown = f"{number:,.0f}" if is_whole else f"{number:.3g}"
    return f"{shown} {noun}" if number == 1 else f"{shown} {noun}s"
