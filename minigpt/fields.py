"""Declare and check the fields of config dataclasses."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, field, fields
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from minigpt.errors import ConfigError, cut, require_choice

_MAX_FLOAT = 1e30  # well below float32's maximum


def setting(
    default: Any = MISSING, bounds: str = "", choices: Iterable[str] = (), **more: Any
) -> Any:
    """Declare a field that can be set in a TOML file or with ``--set``.

    Args: bounds, the interval of valid values, such as ``[0, 1)`` or ``(0, inf)``; choices, the
        valid values if the type does not list them; more, further metadata of the field.
    """
    metadata = {"bounds": bounds, "choices": tuple(choices)}
    return field(default=default, metadata=metadata | more)


def option(
    default: Any = MISSING, bounds: str = "", choices: Iterable[str] = (), **about: Any
) -> Any:
    """Declare a field that is also a command-line option of the same name.

    Args: bounds and choices, as in ``setting``; about, fields of ``commands.options.Option`` that
        --help shows in addition to the field's type, default and docstring.
    """
    return setting(default, bounds, choices, option=about)


def plain_key(name: str) -> str:
    """Return the setting's name for a field: ``from`` for ``from_``, which avoids the keyword."""
    return name.removesuffix("_")


def choices_in(hint: Any) -> tuple[str, ...]:
    """Return the words of a type that allows only certain words (and None); else ()."""
    words, kind, _ = parts_of(hint)
    return words if kind is None else ()


def parts_of(hint: Any) -> tuple[tuple[str, ...], Any, bool]:
    """Split a field's type: ``int | Literal["all"] | None`` gives ``("all",), int, True``.

    Returns: the words of its ``Literal[...]``; its other type, None if it has only words; whether
        it allows None.
    """
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [part for part in parts if get_origin(part) is Literal]
    words = tuple(word for literal in literals for word in get_args(literal))
    kind = next((part for part in parts if part not in (*literals, NoneType)), None)
    return words, kind, NoneType in parts


def check_fields(config: Any) -> None:
    """Check each field of a config against its choices and bounds.

    Raises: ConfigError for the first value outside them.
    """
    for f in fields(config):
        value, bounds = getattr(config, f.name), f.metadata.get("bounds")
        choices = choices_in(f.type) or f.metadata.get("choices", ())
        if choices and value != f.default:
            require_choice(f.name, value, choices)
        elif bounds and not isinstance(value, str | None):
            require_within(f.name, value, bounds)


class Checked:
    """Base class of config dataclasses that check their fields when created."""

    def __post_init__(self) -> None:
        check_fields(self)


def require_within(name: str, value: float, bounds: str) -> None:
    """Raise ConfigError if a value is outside an interval."""
    low, high = _ends(bounds)
    is_count = high == math.inf or (bounds[-1] == "]" and high > 1)
    if isinstance(value, int) and high == math.inf:  # torch's integers have 64 bits
        high, bounds = 2.0**63, bounds.replace("inf", "2**63")
    if isinstance(value, float) and _MAX_FLOAT <= value < high:
        raise ConfigError(f"{name} must be below {_MAX_FLOAT:g}: it is {value:g}.")
    is_low_enough = value < high or (value == high and bounds[-1] == "]")
    if is_low_enough and (low < value or (value == low and bounds[0] == "[")):
        return
    expected = f"in {bounds}"
    if value in (math.inf, -math.inf) or value != value or low == -math.inf:
        expected = "a finite number"
    elif is_count and value <= low:
        expected = f"at least {low:g}" if bounds[0] == "[" else f"above {low:g}"
    raise ConfigError(f"{name} must be {expected}: it is {cut(value)}.")


@cache
def _ends(bounds: str) -> tuple[float, float]:
    low, high = bounds[1:-1].split(", ")
    base, _, exponent = high.partition("**")
    return float(low), float(base) ** float(exponent or 1)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def require_divides(name: str, part: int, of: str, whole: int, remedy: str = "") -> None:
    """Raise ConfigError unless one number divides another."""
    message = f"{name} must divide {of}: {part} does not divide {whole}.{remedy}"
    require(whole % part == 0, message)


def round_up(value: float, multiple: int) -> int:
    """Return the smallest multiple of ``multiple`` that is at least ``value``."""
    return math.ceil(value / multiple) * multiple
