"""Which options have an effect in each mode of a command; others are refused by name."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_args, get_origin

from minigpt.commands.options import listed
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError

_PROMPT_NEEDS = {"--system": ("--chat",), "--chat-template": ("--chat",)}
_PROMPT_REFUSES = {"--chat": ("--special",)}
# Models with these interventions decode with their own forward pass.
_NOT_COMPILED = {"--ablate": ("--compile",), "--patch-from": ("--compile",)}


@dataclass(frozen=True)
class Mode:
    """One way to call a command, and the options that have an effect in it.

    A condition is an option, as in ``--out``, or an option and a value that it must or must not
    have, as in ``--view text`` and ``--view other than text``.
    """

    flag: str = ""
    """Option that chooses this mode. Empty for the mode without any such option."""
    takes: tuple[str, ...] | None = None
    """Options that may be given with ``flag``. None for all of the command."""
    why: str = ""
    """Sentence that explains why other options are refused."""
    needs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Option -> conditions; it has no effect unless one of them holds."""
    refuses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Condition -> options that have no effect when it holds."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Option -> value that its default of None means."""


_PICTURE_NEEDS = {"--picture": ("--svg", "--png"), "--position": ("--view text", "--picture strip")}
_SUMMED = ("logit", "gradient", "integrated")  # measures that sum over heads or have none
_SAMPLING = tuple(  # options of sampled tokens
    f"--{f.name.replace('_', '-')}"
    for f in fields(SamplingConfig)
    if f.name not in ("max_new_tokens", "force")
)
_DRAWN = ("--json", "--out", "--html")

_LIVE = Mode(
    needs={
        **_PROMPT_NEEDS,
        **dict.fromkeys(("--knockout", "--verify-layers", "--verify-heads"), ("--n-verified",)),
        "--n-verified": ("--view lines", *_DRAWN),
        "--n-sources": ("--view lines", *_DRAWN),
        "--explain": ("--html", "--out", "--json"),
        "--candidates": ("--view lines", "--view text", *_DRAWN),
        "--lens": ("--view lines", "--view lens", *_DRAWN),
        "--n-steps": ("--measure integrated",),
        "--roles": ("--view lines", "--view heads", *_DRAWN),
        **dict.fromkeys(
            ("--layers", "--heads", "--reduce"),
            ("--view other than heads", "--svg", "--png", *_DRAWN),
        ),
        **_PICTURE_NEEDS,
    },
    refuses={
        "--json": ("--view",),
        **dict.fromkeys((f"--measure {m}" for m in _SUMMED), ("--reduce",)),
        "--max-new-tokens 0": _SAMPLING,
        **_PROMPT_REFUSES,
        **_NOT_COMPILED,
        # Roles are measured on other tokens, which have no position to patch.
        "--patch-from": ("--compile", "--roles"),
    },
    defaults={"--view": "lines"},
)
_REPLAY = Mode(
    "--replay",
    takes=(
        *("--view", "--position", "--n-sources", "--json"),
        *("--html", "--svg", "--png", "--picture"),
        *("--dense", "--layers", "--heads", "--reduce"),
    ),
    why="It shows a file that --out wrote: there is no model and no prompt to continue.",
    needs={
        "--n-sources": ("--view lines",),
        **dict.fromkeys(("--layers", "--heads", "--reduce"), ("--dense",)),
        **_PICTURE_NEEDS,
    },
    refuses={"--json": ("--view", "--n-sources")},
    defaults={"--view": "lines"},
)
_DIFF = Mode(
    "--diff",
    takes=("--json",),
    why="It compares two files that --out wrote: there is no model and no prompt to continue.",
)
MODES: Mapping[str, tuple[Mode, ...]] = {
    "train": (
        Mode(
            needs={"--json": ("--dry-run",)},
            refuses={"--resume": ("--from",), "--dry-run": ("--report-to",)},
        ),
    ),
    "generate": (
        Mode(
            needs=_PROMPT_NEEDS,
            refuses={
                "--json": ("--stream",),
                "--interactive": (
                    *("--num-samples", "--force"),
                    *("--ablate-mean", "--patch-from", "--patch", "--patch-position"),
                ),
                "--overflow slide": ("--patch-from",),
                **_NOT_COMPILED,
                **_PROMPT_REFUSES,
            },
        ),
    ),
    "attention_trace": (_DIFF, _REPLAY, _LIVE),
    "measures": (Mode(needs=_PROMPT_NEEDS, refuses=_PROMPT_REFUSES),),
    "heads": (Mode(refuses={"--json": ("--view",)}),),
    "plot": (Mode("--out"), Mode(refuses={"--json": ("--x",)})),
    "compare": (Mode(needs={"--x": ("--out",)}),),
    "prune": (Mode(refuses={"--dry-run": ("--yes",)}),),
}
"""Modes of each command, by the name of its function. The first whose flag is given is checked."""


def check_modes(
    function: str,
    options: Iterable[inspect.Parameter],
    typed: Mapping[str, Any],
    given: Mapping[str, Any],
) -> None:
    """Check the options of a call against the command's first mode whose flag was given.

    Args: function, the name of the command's function; options, as typer declares them; typed,
        those that were given; given, all arguments of the command.
    Raises: ConfigError for an option that would have no effect.
    """
    flags = {parameter.name: _flag(parameter) for parameter in options}
    words = [
        flags[name].replace("--", "--no-") if value is False else flags[name]
        for name, value in typed.items()
    ]
    modes = MODES.get(function, ())
    mode = next((mode for mode in modes if not mode.flag or mode.flag in words), None)
    if mode:
        _check_mode(mode, words, {flag: _value(given, name) for name, flag in flags.items()})


def _flag(parameter: inspect.Parameter) -> str:
    """Return an option's name, or an argument's placeholder."""
    about = parameter.default
    if get_origin(parameter.annotation) is Annotated:  # a typer declaration
        about = get_args(parameter.annotation)[1]
        if isinstance(about.default, str):
            return about.default
    return str(about.param_decls[0].split("/")[0] if about.param_decls else about.metavar)


def _value(given: Mapping[str, Any], name: str) -> Any:
    """Return the value of an option, or its default if it was not given."""
    value: Any = given
    for key in name.split("__"):
        value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
    return value


def _check_mode(mode: Mode, given: Collection[str], values: Mapping[str, Any]) -> None:
    """Check the given options' names against the mode and the values of all options."""

    def holds(condition: str) -> bool:
        name, _, word = condition.partition(" ")
        value = values.get(name)
        value = mode.defaults.get(name) if value is None else value
        if not word:
            return bool(value)
        if word.startswith("other than "):
            return str(value) != word.removeprefix("other than ")
        return str(value) == word

    for name in given:
        if mode.takes is not None and name not in (mode.flag, *mode.takes):
            others = f"It takes {listed(mode.takes, 'and')}."
            raise ConfigError(f"{name} cannot be used with {mode.flag}. {mode.why} {others}")
        conditions = mode.needs.get(name)
        if conditions and not any(map(holds, conditions)):
            added = conditions[0] if len(conditions) == 1 else "one of them"
            raise ConfigError(
                f"{name} has no effect without {listed(conditions, 'or')}. Add {added}, or leave "
                f"{name} out."
            )
        for condition, refused in mode.refuses.items():
            if name in refused and holds(condition):
                raise ConfigError(f"{name} has no effect with {condition}. Leave one of them out.")
