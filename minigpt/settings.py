"""Read and merge settings from TOML files and ``--set``, and build configs from them."""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tomli_w

from minigpt.config import RunConfig
from minigpt.errors import ConfigError, cut, nearest, require_choice
from minigpt.fields import parts_of, plain_key
from minigpt.files import read_bytes, resource_errors

T = TypeVar("T")


def build(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a config dataclass from plain values, strictly.

    Args: values, field name -> value, nested for nested dataclasses; where, a prefix for messages.
    Raises: ConfigError for an unknown key (naming the nearest known one), a missing one, or a
        value of the wrong type.
    """
    hints = typing.get_type_hints(cls)
    fields = {plain_key(f.name): f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            remedy = _of_other_table(cls, where, key) or nearest(key[:80], fields)
            raise ConfigError(f"unknown setting {where}{key[:80]}. {remedy}")
        name = fields[key].name
        checked[name] = _checked(hints[name], value, f"{where}{key}")
    for key, f in fields.items():
        is_required = f.default is f.default_factory is dataclasses.MISSING
        if is_required and f.name not in checked:
            raise ConfigError(f"the setting {where}{key} is missing.")
    return cls(**checked)


def _of_other_table(cls: type, where: str, key: str) -> str:
    """Return a suggestion if another table of a run's settings has the key; else empty."""
    tables = typing.get_type_hints(RunConfig)
    if cls in (RunConfig, tables.get(where.rstrip("."))):
        for name, table in tables.items():
            parts = dataclasses.fields(table) if dataclasses.is_dataclass(table) else ()
            if any(part.name == key for part in parts):
                return f"Did you mean {name}.{key}?"
    return ""


def _checked(hint: Any, value: Any, name: str) -> Any:
    """Return a value in the type of its field: an int as a float, a list as a tuple.

    Raises: ConfigError for a value of another type.
    """
    words, kind, may_be_none = parts_of(hint)
    if value in words or (value is None and may_be_none):
        return value
    if kind is None:
        require_choice(name, value, words)  # raises, because the value is none of the words
    expected = f"of type {' or '.join([kind.__name__, *words])}"
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if isinstance(value, Mapping):
            return build(kind, value, f"{name}.")
        expected = "a table of settings"
    elif typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
            return tuple(value)
        expected = "a list of strings"
    elif kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(f"{name} is too large: it is {cut(value)}.") from None
    elif isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name} must be {expected}: it is {cut(value)}.")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config dataclass as plain nested values, without fields that are None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain_key(k): plain(v) for k, v in value.items() if v is not None}
        return list(value) if isinstance(value, tuple) else value

    return plain(dataclasses.asdict(config))


def to_toml(config: RunConfig) -> str:
    """Return a run's settings as TOML; ``read_toml`` and ``build`` restore them."""
    return tomli_w.dumps(to_dict(config))


def read_toml(path: Path, *, may_be_pipe: bool = False) -> dict[str, Any]:
    """Read a TOML file as plain nested values.

    Raises: ConfigError if it is missing, unreadable or not TOML; ResourceError if permission to
        read it is denied.
    """
    try:
        with resource_errors(path):
            return tomllib.loads(read_bytes(path, may_be_pipe=may_be_pipe).decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"the config file {path} does not exist.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"the config file {path} is not UTF-8 text: byte {error.start} is invalid. Convert it "
            "first, for example with iconv."
        ) from None
    except (ValueError, RecursionError) as error:  # not TOML, or nested too deeply
        raise ConfigError(f"the config file {path} is not valid TOML: {cut(str(error))}.") from None
    except OSError as error:
        raise ConfigError(f"the config file {path} cannot be read: {error.strerror}.") from None


def parse_assignment(text: str) -> dict[str, Any]:
    """Parse ``a.b=c`` into ``{"a": {"b": c}}``; c is a TOML value or plain text.

    Raises: ConfigError if there is no name or no equals sign.
    """
    name, equals, raw = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set takes name=value, as in model.n_layer=4: it is {cut(text)}.")
    try:
        (value,) = tomllib.loads(f"value = {raw}").values()  # fails if raw has a second assignment
    except (ValueError, RecursionError):
        value = raw
    return nested(keys, value)


def nested(keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a value below its keys: ``{"a": {"b": value}}`` for the keys a and b."""
    for key in reversed(keys):
        value = {key: value}
    return value


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge nested settings table by table; later values win."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            if isinstance(value, Mapping):
                below = merged.get(key)
                value = merge(below if isinstance(below, dict) else {}, value)
            merged[key] = value
    return merged


def read_config_file(path: Path | None) -> dict[str, Any]:
    """Read the ``--config`` file; {} if there is none. Call it only once: it may be a pipe."""
    return read_toml(path, may_be_pipe=True) if path else {}


def layered(
    file: Mapping[str, Any],
    given: Mapping[str, Any],
    data: Sequence[str] | None = None,
    preset: str | None = None,
    assignments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Merge the settings of a config file, the options and ``--set``; later ones win.

    Args: file, from ``read_config_file``; given, the options as nested settings.
    """
    words = {"preset": preset} if preset else {}
    paths = {"data": {"paths": data}} if data else {}
    changes = map(parse_assignment, assignments or ())
    return merge(file, words, paths, given, *changes)


def given(overrides: Mapping[str, Any], table: str, name: str) -> Any:
    """Return the user's value of a setting; None if the user did not set it."""
    values = overrides.get(table)
    return values.get(name) if isinstance(values, Mapping) else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names, as in ``--set``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
