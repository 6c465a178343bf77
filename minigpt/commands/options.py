"""How options are declared, and those that several commands share, as typer annotations.

Every option says its default in its help, and checks its own value: what typer says of a bad one
changes from version to version.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any

import typer

from minigpt.config import DEVICES, DTYPES, OVERFLOWS, QUANTIZATIONS, SamplingConfig
from minigpt.errors import ConfigError, nearest
from minigpt.settings import build

_DEFAULTS = {f.name: f.default for f in fields(SamplingConfig)}


def option(
    flag: str,
    text: str,
    *,
    group: str,
    metavar: str | None = None,
    default: object = None,
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """Declare an option under a heading of --help; ``default`` is shown, and not applied."""
    shown = text if default is None else f"{text} [{default}]"
    return typer.Option(
        flag, help=shown, metavar=metavar, show_default=False, rich_help_panel=group, parser=parse
    )


def number(
    flag: str, kind: type[int] | type[float], text: str, *, group: str, default: object = None
) -> Any:
    """Declare an option that takes a number."""

    def parse(given: str) -> int | float:
        try:
            return kind(given)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{flag} takes {what}: it is {given!r}.") from None

    return option(flag, text, group=group, metavar="N", default=default, parse=parse)


def choice(flag: str, choices: tuple[str, ...], *, group: str, default: object = None) -> Any:
    """Declare an option that takes one of a few words."""

    def parse(given: str) -> str:
        if given not in choices:
            raise ConfigError(f"there is no {flag} {given!r}. {nearest(given, choices)}")
        return given

    text = " or ".join([*([", ".join(choices[:-1])] if choices[1:] else []), choices[-1]])
    return option(flag, text, group=group, metavar="NAME", default=default, parse=parse)


def _sampling(flag: str, kind: type[int] | type[float], text: str) -> Any:
    default = _DEFAULTS[flag.removeprefix("--").replace("-", "_")]
    return number(flag, kind, text, group="Sampling", default=default)


def _unescape(text: str) -> str:
    r"""Read \n, \r, \t and \\, hard to type in a shell, as the characters that they stand for."""
    meanings = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nrt\\])", lambda match: meanings[match[1]], text)


Prompt = Annotated[
    str | None,
    typer.Argument(
        metavar="PROMPT",
        help="Text to continue, or - for standard input [none]",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    option(
        "--model",
        "Model folder, name of a run, or org/name on the hub",
        group="Model",
        metavar="PATH",
        default="the newest run",
    ),
]
Device = Annotated[str | None, choice("--device", DEVICES, group="Model", default="auto")]
Dtype = Annotated[
    str | None, choice("--dtype", DTYPES, group="Model", default="auto, float32 on a CPU")
]
Quantize = Annotated[
    str | None,
    choice("--quantize", QUANTIZATIONS, group="Model", default="the weights as they are"),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Decode by one compiled graph: slower to begin [only on CUDA]",
        show_default=False,
        rich_help_panel="Model",
    ),
]
Threads = Annotated[
    int | None,
    number("--threads", int, "Of the CPU, at most", group="Model", default="one a core"),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print JSON, an object a line", rich_help_panel="Output"),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")]

MaxNewTokens = Annotated[
    int | None, _sampling("--max-new-tokens", int, "Stop after so many generated tokens")
]
Temperature = Annotated[
    float | None, _sampling("--temperature", float, "Above 1 flattens, below sharpens; 0 is greedy")
]
TopK = Annotated[int | None, _sampling("--top-k", int, "Draw from the N most probable; 0 is off")]
TopP = Annotated[float | None, _sampling("--top-p", float, "Draw from the fewest that sum to N")]
MinP = Annotated[
    float | None, _sampling("--min-p", float, "Draw from those at least N times the best")
]
RepetitionPenalty = Annotated[
    float | None,
    _sampling("--repetition-penalty", float, "Above 1 makes tokens already there rarer"),
]
PresencePenalty = Annotated[
    float | None,
    _sampling("--presence-penalty", float, "Less for tokens that were generated"),
]
FrequencyPenalty = Annotated[
    float | None,
    _sampling("--frequency-penalty", float, "Less for each time they were"),
]
IgnoreEos = Annotated[
    bool,
    typer.Option("--ignore-eos", help="Never draw the end of the text", rich_help_panel="Sampling"),
]
Overflow = Annotated[
    str | None,
    choice("--overflow", OVERFLOWS, group="Sampling", default=_DEFAULTS["overflow"]),
]
Seed = Annotated[
    int | None,
    number("--seed", int, "Of the draws", group="Sampling", default="a fresh one, printed"),
]
Stop = Annotated[
    list[str] | None,
    option(
        "--stop",
        r"End before this text (\n: line break); repeat for more",
        group="Sampling",
        metavar="TEXT",
        parse=_unescape,
    ),
]
NumSamples = Annotated[
    int | None, _sampling("--num-samples", int, "Continuations, decoded together")
]
Logprobs = Annotated[
    int | None,
    number(
        "--logprobs",
        int,
        "Show the model's N most probable tokens at each",
        group="Output",
        default=_DEFAULTS["logprobs"],
    ),
]


def sampling_config(given: Mapping[str, Any]) -> SamplingConfig:
    """Build a SamplingConfig of those options in ``given`` that are its fields and were set.

    Raises: ConfigError for a value out of range.
    """
    values = {name: given[name] for name in _DEFAULTS if given.get(name) is not None}
    return build(SamplingConfig, values)
