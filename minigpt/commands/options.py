"""Command-line options built from config dataclasses and function signatures.

A command is a function whose parameters declare its arguments and options:

    @command
    def sample(
        *,
        sampling: SamplingConfig,
        runs: Annotated[int, Option("Number of runs", group="Output")] = 3,
    ) -> None: ...

A config dataclass becomes one option per field that is declared with ``fields.option``: named as
the field, with its type, default and choices, and the first sentence of its docstring as help. The
command receives the validated config.

``commands.help.conditions`` refuses options that would have no effect in a call.
"""

import ast
import functools
import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from minigpt.errors import ConfigError, require_choice
from minigpt.fields import Checked, choices_in, option, parts_of, plain_key, require_within
from minigpt.presets import DEFAULT_PRESET, PRESETS
from minigpt.rings import find_ring
from minigpt.run_config import DataConfig, Device, Dtype, Quantization
from minigpt.settings import build, merge, nested

if typing.TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig

    Interventions = InterventionConfig
elif _configs := find_ring("intervention_config"):
    Interventions = _configs.InterventionConfig
else:
    Interventions = make_dataclass("Interventions", (), namespace={"is_any": False})

_METAVARS = {bool: None, int: "N", float: "N", Path: "FILE"}


@dataclass(frozen=True)
class Option:
    """How an option is shown and parsed, beyond its parameter's name, type and default."""

    text: str = ""
    """One-line description."""
    group: str = "General"
    """Heading that --help lists it under."""
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
    """Interval of valid numbers, as in ``fields.setting``."""
    is_listed: bool = True
    """Whether --help shows it."""
    has_escapes: bool = False
    r"""Whether \n, \r, \t and \\ in the value are escape sequences."""


@dataclass(frozen=True)
class Fields:
    """Annotation that selects which fields of a config dataclass become options."""

    config: type | None = None
    """Dataclass of a ``dict`` parameter, which receives only the given values, nested and plain."""
    only: tuple[str, ...] = ()
    """Names of the fields to include, dotted if nested. Empty for all that are options."""
    without: tuple[str, ...] = ()
    """Names of fields to leave out."""
    unlisted: tuple[str, ...] = ()
    """Names of fields that --help does not show, because the command refuses other values."""
    group: str = ""
    """Heading for all of these options. Empty for each field's own."""
    defaults: object = None
    """Config whose values are the defaults. None for the defaults of the dataclass."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Turn a function's parameters into the arguments and options of a command.

    A parameter is a config dataclass, alone or with ``Fields``; ``Annotated[dict, Fields(...)]``,
    which receives only the given values; ``Annotated[type, Option(...)]``; or a typer declaration.
    """
    signature = inspect.signature(function)
    shown: list[inspect.Parameter] = []
    configs: dict[str, tuple[Any, dict[str, Any]]] = {}
    defaults: dict[str, Any] = {}
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in signature.parameters.items():
        hint = hints[name]
        kind, about = get_args(hint)[:2] if get_origin(hint) is Annotated else (hint, None)
        defaults[name] = parameter.default
        if is_dataclass(kind) or isinstance(about, Fields):
            chosen = about or Fields()
            shown += _fields(chosen.config or kind, (name,), chosen, chosen.defaults)
            defaults[name] = {}
            if is_dataclass(kind):
                configs[name] = kind, vars(chosen.defaults) if chosen.defaults else {}
        elif isinstance(about, Option):
            shown.append(_parameter((name,), kind, parameter.default, about))
        else:
            shown.append(parameter.replace(annotation=hint))
    options = tuple(shown)
    shown.append(_parameter(("debug",), bool, False, Option("Show the traceback of an error")))

    @functools.wraps(function)
    def run(**typed: Any) -> None:
        del typed["debug"]  # main looks for it in sys.argv
        typed = {name: value for name, value in typed.items() if value not in (None, [], ())}
        given = merge(defaults, *(nested(name.split("__"), typed[name]) for name in typed))
        usage = find_ring("commands.help.usage")
        for name, (config, base) in configs.items():
            values = given[name]
            given[name] = build(config, base | values)
            if usage:
                usage.note_without_effect(given[name], values)
        if conditions := find_ring("commands.help.conditions"):
            conditions.check_modes(function.__name__, options, typed, given)
        function(**given)

    del run.__wrapped__
    run.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown}
    return run


def _fields(
    config: Any, path: tuple[str, ...], chosen: Fields, defaults: object
) -> Iterator[inspect.Parameter]:
    """Yield the options of a config dataclass and of the dataclasses nested in it."""
    heading = config.__name__.removesuffix("Config")
    for f in fields(config):
        here = (*path, plain_key(f.name))
        name = ".".join(here[1:])
        default = f.default if defaults is None else getattr(defaults, f.name)
        if is_dataclass(f.type):
            yield from _fields(f.type, here, chosen, None if defaults is None else default)
        elif "option" in f.metadata and name in (chosen.only or {name} - set(chosen.without)):
            limits = {key: f.metadata[key] for key in ("bounds", "choices")}
            about = {"group": heading, "text": _first_sentence(config, f.name), **limits}
            about |= f.metadata["option"]
            about |= {"group": chosen.group} if chosen.group else {}
            shown = Option(**about, is_listed=name not in chosen.unlisted)
            yield _parameter(here, f.type, default, shown, is_layered=chosen.config is not None)


def _first_sentence(config: Any, name: str) -> str:
    """Return the first sentence of a field's docstring, which a base class may have."""
    texts = (_docstrings(inspect.getfile(c)).get((c.__name__, name)) for c in config.__mro__)
    text = next(filter(None, texts))
    return re.split(r"\.\s", " ".join(text.split()) + " ")[0]


@functools.cache
def _docstrings(path: str) -> dict[tuple[str, str], str]:
    """Return the docstring under each field of the dataclasses in a source file."""
    return {
        (node.name, ast.unparse(line.target)): ast.literal_eval(below.value)
        for node in ast.parse(Path(path).read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
        for line, below in itertools.pairwise(node.body)
        if isinstance(line, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


def _parameter(
    path: tuple[str, ...], hint: Any, default: Any, about: Option, *, is_layered: bool = False
) -> inspect.Parameter:
    """Return an option as a parameter that typer understands.

    Args: path, names that lead to its value: the parameter, then the fields of nested configs.
        is_layered, whether it overrides other settings, so that a flag needs its negation too.
    """
    words, kind, _ = parts_of(hint)
    kind = get_origin(kind) or kind or str
    choices = choices_in(hint) or about.choices
    flag = "--" + (about.name or plain_key(path[-1])).replace("_", "-")
    metavar = about.metavar or ("NAME" if choices else _METAVARS.get(kind, "TEXT"))

    def parse(text: str) -> Any:
        if metavar in ("TEXT", "PROMPT"):
            _require_utf8(flag, text)
        if not text and metavar in ("FILE", "FOLDER", "DIR"):
            # An unset shell variable, which Path would treat as the working directory.
            raise ConfigError(f"{flag} is empty. Give a path.")
        if about.has_escapes:
            return _unescape(text)
        if choices:
            require_choice(flag, text, choices)
        return text if text in words else _convert(text, kind, flag, about.bounds, words)

    is_two_way = kind is bool and (is_layered or default is not False)
    is_list = kind in (tuple, list)
    declared = typer.Option(
        ... if default is inspect.Parameter.empty else None,
        f"{flag}/--no-{flag[2:]}" if is_two_way else flag,
        *about.aliases,
        help=_help(about, choices, default, kind),
        metavar=metavar,
        show_default=False,
        rich_help_panel=about.group,
        hidden=not about.is_listed,
        parser=None if kind is bool else parse,
        autocompletion=lambda incomplete: [c for c in choices if c.startswith(incomplete)],
    )
    return inspect.Parameter(
        "__".join(path),
        inspect.Parameter.KEYWORD_ONLY,
        default=declared,
        annotation=bool | None if kind is bool else list[str] | None if is_list else str | None,
    )


def _require_utf8(flag: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate stands for an invalid byte
        raise ConfigError(
            f"{flag} is not UTF-8 text: it is {text!r}. Convert it first, for example with iconv."
        ) from None


def _convert(text: str, kind: Any, flag: str, bounds: str, words: Sequence[str]) -> Any:
    """Convert the text of an option to a number or path. Args: words, also valid, for messages."""
    if kind not in (int, float, Path):
        return text
    try:
        value = kind(text)
    except ValueError:
        what = " or ".join(["a whole number" if kind is int else "a number", *words])
        raise ConfigError(f"{flag} takes {what}: it is {text!r}.") from None
    if bounds:
        require_within(flag, value, bounds)
    return value


def _help(about: Option, choices: Sequence[str], default: Any, kind: type) -> str:
    text, shown = about.text, about.shown
    if choices:
        text += f": {listed(choices, 'or')}"
    if not shown and kind is not bool and isinstance(default, int | float | str):
        shown = f"{default:g}" if kind is float else str(default)
    return f"{text} [{shown}]" if shown else text


def listed(words: Sequence[str], last: str) -> str:
    """Join words as a list in a sentence. Args: last, the conjunction before the last one."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _unescape(text: str) -> str:
    r"""Replace \n, \r, \t and \\, hard to type in a shell, with the characters they mean."""
    meanings = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: meanings[match[1]], text)


def argument(metavar: str, text: str) -> Any:
    """Declare a positional argument, as an annotation of a parameter."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


THREADS = "[1, 1024]"
"""Valid range of CPU threads; far more threads than cores crash OpenMP."""


@dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
    """Which model to load, and how to run it."""

    model: str | None = option(None, group="Model", metavar="PATH", shown="the newest run")
    """Model folder, name of a run, or org/name on the Hub."""
    device: Device = option("auto", group="Model")
    """Device."""
    dtype: Dtype = option("auto", group="Model", shown="auto, float32 on a CPU")
    """Compute dtype."""
    quantize: Quantization | None = option(None, group="Model", shown="none")
    """Weight-only quantization."""
    compile: bool | None = option(None, group="Model", shown="on CUDA, or once compiled")
    """Decode with one compiled graph, which starts more slowly."""
    threads: int | None = option(None, THREADS, group="Model", shown="one per core")
    """Number of CPU threads."""


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How a prompt is converted to tokens."""

    special: bool = option(False, group="Prompt")
    """Parse special tokens in the prompt, such as <|endoftext|>."""
    chat: bool = option(False, group="Prompt")
    """Apply the model's chat template: the prompt is a user message."""
    system: str | None = option(None, group="Prompt", shown="none")
    """System message at the start of the chat."""
    chat_template: str | None = option(None, group="Prompt", metavar="FILE", shown="the model's")
    """Chat template: a Jinja file, or the name of one of several in the model folder."""


Prompt = Annotated[
    str | None, argument("PROMPT", "Text to continue, or - for standard input [empty]")
]
(_DEFAULT_TEXT,) = DataConfig().paths or ("none",)
CORPORA = "builtin:tales, builtin:python, shakespeare"
Data = Annotated[
    list[str] | None,
    argument(
        "DATA",
        f"Files, folders, globs, - for standard input, or {CORPORA} [{_DEFAULT_TEXT}]",
    ),
]
Json = Annotated[bool, Option("Print JSON, one object per line", "Output", name="json")]
Preset = Annotated[
    str | None, Option("Starting point", "Run", shown=DEFAULT_PRESET, choices=tuple(PRESETS))
]
ConfigFile = Annotated[Path | None, Option("Read settings from a TOML file", "Run")]
Assignments = Annotated[
    list[str] | None,
    Option("Any setting, as in model.d_mlp=512; repeat for several", "Run", "NAME=VALUE"),
]
Threads = Annotated[
    int | None, Option("Number of CPU threads", "Run", shown="one per core", bounds=THREADS)
]
XAxis = Literal["steps", "tokens", "seconds"]
