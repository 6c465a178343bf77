"""Command-line options made from config dataclasses and function signatures.

A command is a function whose parameters say what it takes:

    @command
    def sample(
        *,
        sampling: SamplingConfig,
        runs: Annotated[int, Option("Number of runs", group="Output")] = 3,
    ) -> None: ...

A config dataclass becomes one option per field that is declared with ``config.option``: named as
the field, with its type, default and choices, and the first sentence of its docstring as help. The
command gets the config, built and checked.
"""

import ast
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from minigpt.config import (
    Device,
    Dtype,
    Quantization,
    check_fields,
    choices_in,
    choices_of,
    option,
    parts_of,
    require_within,
)
from minigpt.errors import ConfigError, require_choice
from minigpt.presets import DEFAULT_PRESET, PRESETS
from minigpt.settings import build, merge, parse_assignment, plain_key, read_toml


@dataclass(frozen=True)
class Option:
    """What --help shows of an option, beyond its name, type and default."""

    text: str = ""
    """What it sets, in one line."""
    group: str = "General"
    """Heading that it is listed under."""
    metavar: str = ""
    """Placeholder of the value. Empty derives one from the type."""
    shown: str = ""
    """Text shown as the default. Empty shows the default itself."""
    aliases: tuple[str, ...] = ()
    """Other names, not listed in --help."""
    name: str = ""
    """Name. Empty derives it from the parameter."""
    choices: tuple[str, ...] = ()
    """Valid values. Empty derives them from the type."""
    bounds: str = ""
    """Interval of valid numbers, as in ``config.setting``. Fields have their own."""
    has_escapes: bool = False
    r"""Whether \n, \r, \t and \\ in the value stand for the characters."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a config dataclass become options, as an annotation of a parameter."""

    config: type | None = None
    """Dataclass of a parameter that gets only what was given, as nested plain values."""
    only: tuple[str, ...] = ()
    """Names of the fields, dotted below the dataclass. Empty for all that are options."""
    without: tuple[str, ...] = ()
    """Names of fields left out."""
    group: str = ""
    """Heading of all of them. Empty for each field's own."""
    defaults: object = None
    """Config whose values are shown as defaults. None for the dataclass's own defaults."""


@dataclass(frozen=True)
class _Declared:
    """One option of a command."""

    path: tuple[str, ...]
    """Where its value goes: the parameter, and for a config the names of table and field."""
    hint: Any
    default: Any
    choices: tuple[str, ...]
    about: Option
    is_layered: bool = False
    """Whether it goes over other settings, so that a flag needs its opposite too."""

    @property
    def flag(self) -> str:
        return "--" + (self.about.name or plain_key(self.path[-1])).replace("_", "-")

    @property
    def kind(self) -> Any:
        """The type of a value, for those that are not one of a few words."""
        kinds = [kind for kind in parts_of(self.hint)[1] if kind is not type(None)]
        return (get_origin(kinds[0]) or kinds[0]) if kinds else str

    def parameter(self) -> inspect.Parameter:
        """Return it as typer declares an option."""
        annotation: Any = str | None
        flag = self.flag
        if self.kind is bool:
            annotation = bool | None
            is_two_way = self.is_layered or self.default is not False
            flag += f"/--no-{flag[2:]}" if is_two_way else ""
        elif self.kind in (tuple, list):
            annotation = list[str] | None
        default = typer.Option(
            ... if self.default is inspect.Parameter.empty else None,
            flag,
            *self.about.aliases,
            help=self._help(),
            metavar=self._metavar(),
            show_default=False,
            rich_help_panel=self.about.group,
            parser=None if self.kind is bool else self._parse,
            autocompletion=self._complete if self.choices else None,
        )
        name = "__".join(self.path)
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(name, kind, default=default, annotation=annotation)

    def _complete(self, incomplete: str) -> list[str]:
        return [choice for choice in self.choices if choice.startswith(incomplete)]

    def _help(self) -> str:
        text, choices, shown = self.about.text, self.choices, self.about.shown
        if choices:
            words = " or ".join([*([", ".join(choices[:-1])] if choices[1:] else []), choices[-1]])
            text = f"{text}: {words}" if text else words
        is_plain = isinstance(self.default, int | float | str) and self.kind is not bool
        if is_plain and not shown:
            shown = f"{self.default:g}" if self.kind is float else str(self.default)
        return f"{text} [{shown}]" if shown else text

    def _metavar(self) -> str | None:
        kinds = {bool: None, int: "N", float: "N", Path: "FILE"}
        return self.about.metavar or ("NAME" if self.choices else kinds.get(self.kind, "TEXT"))

    def _parse(self, text: str) -> Any:
        if self.about.has_escapes:
            return _unescape(text)
        if self.choices:
            require_choice(self.flag, text, self.choices)
        words = parts_of(self.hint)[0]
        if text in words or self.kind not in (int, float, Path):
            return text
        try:
            value = self.kind(text)
        except ValueError:
            what = " or ".join(["a whole number" if self.kind is int else "a number", *words])
            raise ConfigError(f"{self.flag} takes {what}: it is {text!r}.") from None
        if self.about.bounds:
            require_within(self.flag, value, self.about.bounds)
        return value


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function's parameters into the arguments and options of a command.

    A parameter is a config dataclass, alone or with ``Fields``; ``Annotated[dict, Fields(...)]``,
    which gets only what was given; ``Annotated[type, Option(...)]``; or declared as typer does.
    """
    signature = inspect.signature(function)
    hints = typing.get_type_hints(function, include_extras=True)
    shown: list[inspect.Parameter] = []
    configs: dict[str, type] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in signature.parameters.items():
        hint, about = hints[name], None
        if get_origin(hint) is Annotated:
            hint, about = get_args(hint)[:2]
        if is_dataclass(hint):
            configs[name] = typing.cast("type", hint)
        if is_dataclass(hint) or isinstance(about, Fields):
            defaults[name] = {}
            chosen = about or Fields()
            fields_of = _declared(chosen.config or hint, (name,), chosen, chosen.defaults)
            shown += [declared.parameter() for declared in fields_of]
            continue
        defaults[name] = parameter.default
        if isinstance(about, Option):
            choices = about.choices or choices_in(hint)
            shown.append(_Declared((name,), hint, parameter.default, choices, about).parameter())
        else:
            shown.append(parameter.replace(annotation=hints[name]))
    shown.append(_DEBUG)

    @functools.wraps(function)
    def run(**typed: Any) -> None:
        given = defaults | _nested(typed)
        for name, config in configs.items():
            given[name] = build(config, given[name])
        function(**given)

    del run.__wrapped__
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _nested(typed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given, those of configs as nested settings."""
    given: dict[str, Any] = {}
    for name, value in typed.items():
        *tables, last = name.split("__")
        if value in (None, []) or name == _DEBUG.name:
            continue
        place = given
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value
    return given


def _declared(
    config: Any, path: tuple[str, ...], chosen: Fields, defaults: object
) -> Iterator[_Declared]:
    """Yield the options of a config dataclass, those of dataclasses in it included."""
    heading = config.__name__.removesuffix("Config")
    for f in fields(config):
        here = (*path, plain_key(f.name))
        default = f.default if defaults is None else getattr(defaults, f.name)
        if is_dataclass(f.type):
            yield from _declared(f.type, here, chosen, None if defaults is None else default)
        elif "option" in f.metadata and _is_chosen(".".join(here[1:]), chosen):
            about = Option(**{"group": heading} | f.metadata["option"])
            text = about.text or _first_sentence(_docstrings(config)[f.name])
            about = replace(about, text=text, group=chosen.group or about.group)
            is_layered = chosen.config is not None
            yield _Declared(here, f.type, default, choices_of(f), about, is_layered)


def _is_chosen(name: str, chosen: Fields) -> bool:
    return name not in chosen.without and (not chosen.only or name in chosen.only)


@functools.cache
def _docstrings(config: type) -> dict[str, str]:
    """Return the docstring under each field of a dataclass, read from its source."""
    body = next(c.body for c in _classes(inspect.getfile(config)) if c.name == config.__name__)
    return {
        ast.unparse(field.target): ast.literal_eval(below.value)
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


@functools.cache
def _classes(path: str) -> list[ast.ClassDef]:
    module = ast.parse(Path(path).read_text(encoding="utf-8"))
    return [node for node in module.body if isinstance(node, ast.ClassDef)]


def _first_sentence(text: str) -> str:
    return re.split(r"\.\s", " ".join(text.split()) + " ")[0]


def _unescape(text: str) -> str:
    r"""Read \n, \r, \t and \\, hard to type in a shell, as the characters that they stand for."""
    meanings = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: meanings[match[1]], text)


def argument(metavar: str, text: str) -> Any:
    """Declare a positional argument, as an annotation of a parameter."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Which model to load, and where and how it computes."""

    model: str | None = option(None, group="Model", metavar="PATH", shown="the newest run")
    """Model folder, name of a run, or org/name on the Hub."""
    device: Device = option("auto", group="Model")
    """Device."""
    dtype: Dtype = option("auto", group="Model")
    """Compute dtype. auto is float32 on a CPU."""
    quantize: Quantization | None = option(None, group="Model", shown="none")
    """Weight-only quantization."""
    compile: bool | None = option(None, group="Model", shown="on CUDA only")
    """Decode with one compiled graph, which starts more slowly."""
    threads: int | None = option(None, "[1, inf)", group="Model", shown="one per core")
    """Number of CPU threads."""

    def __post_init__(self) -> None:
        check_fields(self)


Prompt = Annotated[
    str | None, argument("PROMPT", "Text to continue, or - for standard input [empty]")
]
Data = Annotated[
    list[str] | None,
    argument(
        "DATA",
        "Files, folders, globs, - for standard input, or shakespeare [the English prose in Python]",
    ),
]
Json = Annotated[bool, Option("Print JSON, one object per line", "Output", name="json")]
Preset = Annotated[
    str | None,
    Option("Starting point", "Run", shown=DEFAULT_PRESET, choices=tuple(PRESETS)),
]
ConfigFile = Annotated[Path | None, Option("Read settings from a TOML file", "Run")]
Assignments = Annotated[
    list[str] | None,
    Option("Any setting, as in model.d_mlp=512; repeat for several", "Run", "NAME=VALUE"),
]
XAxis = Literal["steps", "tokens", "seconds"]


def layered(
    file: Path | None,
    given: Mapping[str, Any],
    data: Sequence[str] | None = None,
    preset: str | None = None,
    assignments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Return the settings of a config file, of options and of ``--set``; later ones win."""
    changes = map(parse_assignment, assignments or ())
    return merge(
        read_toml(file) if file else {},
        {"preset": preset} if preset else {},
        {"data": {"paths": data}} if data else {},
        given,
        *changes,
    )


_DEBUG = _Declared(
    ("debug",), bool, False, (), Option("Show the traceback of an error")
).parameter()
