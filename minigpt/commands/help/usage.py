"""Checks of a command line: unknown options, missing values, and options without effect."""

import itertools
import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from minigpt.commands.registry import COMMANDS
from minigpt.errors import ConfigError, cut, did_you_mean
from minigpt.fields import plain_key

_SYNONYMS = {
    # nanoGPT
    "--block-size": "--context-length",
    "--eval-interval": "--eval-every",
    "--init-from": "--from",
    "--learning-rate": "--lr",
    "--log-interval": "--log-every",
    "--max-iters": "--max-steps",
    "--n-embd": "--d-model",
    "--out-dir": "--name",
    "--vocab-size": "--tokenizer bpe:N",
    # transformers
    "--eval-steps": "--eval-every",
    "--hidden-size": "--d-model",
    "--logging-steps": "--log-every",
    "--max-grad-norm": "--grad-clip",
    "--max-length": "--max-new-tokens",
    "--num-attention-heads": "--n-head",
    "--num-hidden-layers": "--n-layer",
    "--num-return-sequences": "--num-samples",
    "--num-train-epochs": "--max-epochs",
    "--output-dir": "--name",
    "--per-device-train-batch-size": "--batch-size",
    "--save-steps": "--save-every",
    "--warmup-ratio": "--warmup-fraction",
    # llama.cpp
    "--ctx-size": "--context-length",
    "--n-predict": "--max-new-tokens",
    # several programs
    "--output": "--out",
    "--seq-len": "--context-length",
}
"""Option of other programs -> option or setting here."""

_RECURRENT = (("arch", "lstm"), ("arch", "lstm-attention"))
_NO_ROPE = (("family", "gpt2"), *_RECURRENT)
_NO_SCALING = (*_NO_ROPE, ("rope_scaling_factor", 1))
_NO_VALIDATION = (("data.val_fraction", 0),)
INEFFECTIVE_IF: dict[str, tuple[tuple[str, Any], ...]] = {
    "activation": _RECURRENT,
    **dict.fromkeys(("rope_theta", "rope_scaling_factor"), _NO_ROPE),
    **dict.fromkeys(
        ("rope_low_freq_factor", "rope_high_freq_factor"),
        (*_NO_SCALING, *(("rope_scaling", kind) for kind in ("linear", "dynamic", "yarn"))),
    ),
    **dict.fromkeys(
        ("rope_beta_fast", "rope_beta_slow", "rope_attention_factor", "rope_truncate"),
        (*_NO_ROPE, *(("rope_scaling", kind) for kind in ("llama3", "linear", "dynamic"))),
    ),
    "rope_original_context": _NO_SCALING,
    "encoding": (("format", "parquet"),),
    "val_split": (("val_fraction", 0),),
    "context_warmup_fraction": (("context_warmup_length", 0),),
    **dict.fromkeys(
        ("momentum", "momentum_warmup_steps", "newton_schulz_steps"), (("optimizer", "adamw"),)
    ),
    "decay_fraction": tuple(("schedule", kind) for kind in ("cosine", "linear", "constant")),
    "final_lr_fraction": (("schedule", "constant"),),
    **dict.fromkeys(("eval_every", "eval_tokens", "patience", "average"), _NO_VALIDATION),
    "dropout_start": (("model.dropout", 0),),
    "temperature": (("top_k", 1),),
    "top_k": (("temperature", 0),),
    **dict.fromkeys(("top_p", "min_p"), (("temperature", 0), ("top_k", 1))),
}
"""Field -> other fields, each with a value with which the field has no effect. Fields of another
table are dotted as in ``--set``."""


def check_group(ctx: Any, args: list[str]) -> None:
    """Raise ConfigError for an unknown option before the name of a command."""
    options = [name for p in ctx.command.get_params(ctx) for name in p.opts]
    if args and args[0][0:1] == "-" and args[0].partition("=")[0] not in (*options, "--"):
        near = did_you_mean(args[0], [name for name in options if name[:2] == "--"])
        raise ConfigError(
            f"unknown option {cut(args[0])}. {near or f'See {ctx.command_path} --help.'}"
        )


def check_words(ctx: Any, args: list[str]) -> None:
    """Check the words of a command.

    Raises: ConfigError for an unknown option, and for one whose value is missing, so that the next
        option would be parsed as the value.
    """
    options = {
        name: p
        for p in ctx.command.get_params(ctx)
        if p.param_type_name == "option"
        for name in (*p.opts, *p.secondary_opts)
    }
    words = iter(args)
    for word in words:
        if word == "--":
            after = list(words)
            _require_texts(ctx, args[: -1 - len(after)], after, options)
            break
        option = options.get(word.partition("=")[0])
        if option is None:
            if word.startswith("-") and word != "-":
                raise ConfigError(f"unknown option {word!r}. {_advice(ctx, word)}")
            continue
        n_values = _n_values(option, word)
        for value in itertools.islice(words, n_values):
            if value in options or re.match(r"--[a-z]", value):
                also = f", or write {word}={value}" if n_values == 1 else ""
                raise ConfigError(
                    f"{word} needs a value, and {value!r} is an option. Give a value{also}."
                )


def _require_texts(
    ctx: Any, before: list[str], after: list[str], options: Mapping[str, Any]
) -> None:
    """Raise ConfigError for an option after the first text that follows ``--``."""
    rest, moved, late = iter(after[1:]), [], ""
    texts = after[:1]
    for word in rest:
        option = options.get(word.partition("=")[0])
        if option is None:
            texts.append(word)
            continue
        late = late or word
        moved += [word, *itertools.islice(rest, _n_values(option, word))]
    if late:
        call = shlex.join([*before, *moved, "--", *texts])
        raise ConfigError(
            f"{late} is after --, where everything is text. Put options before it: "
            f"{ctx.command_path} {call}"
        )


def _n_values(option: Any, word: str) -> int:
    """Return how many of the words after an option are its values."""
    return 0 if option.is_flag or "=" in word else int(option.nargs)


def _advice(ctx: Any, word: str) -> str:
    """Return the remedy for a word that begins with a dash and is not an option."""
    name = word.partition("=")[0]
    remedy = _text_remedy(ctx, word) or _placeholder_remedy(ctx, name) or _similar(ctx, name)
    return remedy or f"See {ctx.command_path} --help."


def _text_remedy(ctx: Any, word: str) -> str:
    """Return the remedy for a word that is a file or a prompt; empty if it seems to be neither."""
    parameters = ctx.command.get_params(ctx)
    if any(p.name == "data" for p in parameters) and os.path.lexists(word):
        return f"To name the file, write {shlex.quote(f'./{word}')}."
    is_text = " " in word or not word.lstrip("-")[:1].isalpha()
    if is_text and any(p.param_type_name == "argument" for p in parameters):
        call = f"{ctx.command_path} -- {shlex.quote(word)}"
        return f"Put -- before a text that begins with a dash, after all options: {call}"
    return ""


def _placeholder_remedy(ctx: Any, name: str) -> str:
    """Return the remedy for the placeholder of a value: ``--model M``, where MODEL is --from's."""
    if not name.startswith("--"):
        return ""
    for parameter in ctx.command.get_params(ctx):
        if name[2:].upper() == parameter.metavar:
            if parameter.param_type_name == "argument":
                return f"Give it without a name: {ctx.command_path} {parameter.metavar}"
            return f"Did you mean {parameter.opts[0]} {parameter.metavar}?"
    return ""


def _similar(ctx: Any, name: str) -> str:
    """Return the remedy for the name of an option elsewhere, a setting or a misspelled option."""
    choices: list[str] = []
    for parameter in ctx.command.get_params(ctx):
        names = parameter.secondary_opts if name.startswith("--no-") else parameter.opts
        choices += [option for option in names if option.startswith("--")][:1]  # no aliases
    plain = name.replace("_", "-")
    synonym = _SYNONYMS.get(plain, plain)
    if synonym.split()[0] in choices:
        return f"Did you mean {synonym}?"
    if "--set" in choices and (setting := _setting(synonym)):
        return f"It is a setting: --set {setting}=VALUE"
    return did_you_mean(name, choices)


def _setting(name: str) -> str:
    """Return the dotted setting of a run that an option is named after; empty if there is none."""
    from minigpt.config import DataConfig, ModelConfig, TrainingConfig

    plain = name[2:].replace("-", "_")
    tables = {"training": TrainingConfig, "model": ModelConfig, "data": DataConfig}
    found = [table for table, c in tables.items() if any(f.name == plain for f in fields(c))]
    return f"{found[0]}.{plain}" if found else ""


def without_effect(config: Any, given: Mapping[str, Any]) -> list[str]:
    """Return a line for each given setting that has no effect because of another.

    A setting that equals its default, such as a limit of 0, is not reported.

    Args: given, the user's settings, nested like the config.
    """
    lines = []
    tables = {"": given} | {f.name: given.get(f.name) for f in fields(config)}
    for table, values in tables.items():
        part = getattr(config, table) if table else config
        if not is_dataclass(part) or not isinstance(values, Mapping):
            continue
        for f in fields(part):
            is_default = getattr(part, f.name) == f.default
            if is_default or values.get(plain_key(f.name)) is None:
                continue
            if reason := _disabling_setting(config, table, f.name):
                lines.append(f"{_spelled(part, table, f.name)} has no effect with {reason}")
    return lines


def _disabling_setting(config: Any, table: str, name: str) -> str:
    """Return the setting and value with which a field has no effect; empty if it has one."""
    for other, off in INEFFECTIVE_IF.get(name, ()):
        place, _, other_name = other.rpartition(".")
        place = place or table
        holder = getattr(config, place, None) if place else config
        # Another command may have a field of the same name, but not the other one.
        if is_dataclass(holder) and getattr(holder, other_name, None) == off:
            return f"{_spelled(holder, place, other_name)} {off}"
    return ""


def _spelled(part: Any, table: str, name: str) -> str:
    """Return a field as the user writes it: an option, or a dotted name."""
    if any(f.name == name and "option" in f.metadata for f in fields(part)):
        return f"--{name.replace('_', '-')}"
    return f"{table}.{name}".lstrip(".")


def note_without_effect(config: Any, given: Mapping[str, Any]) -> None:
    """Print a note for each line of ``without_effect``."""
    for line in without_effect(config, given):
        from minigpt.console import note  # rich takes a while to import

        note(line)


def with_options(message: str, ctx: Any) -> str:
    """Return a message with options as they are typed: ``--loss-on`` instead of ``loss_on``.

    Configs name their fields, as Python and TOML files do. With ``--set`` or ``--config``, only
    fields whose options were typed are renamed.
    """
    options = {p.name: p.opts[0] for p in ctx.command.get_params(ctx) if p.opts[0][:2] == "--"}
    sources = {option: ctx.get_parameter_source(name) for name, option in options.items()}
    typed = {option for option, source in sources.items() if source.name == "COMMANDLINE"}
    flags = {option[2:].replace("-", "_"): option for option in options.values()}
    # The first word of a message is its subject: a field, or a word of prose.
    if subject := re.match(r"(?:\w+\.)?(\w+)(?: and (\w+))?(?= )", message):
        named = [flags.get(word, "") for word in subject.groups() if word]
        if all(named) and typed.intersection(named):
            message = " and ".join(named) + message[subject.end() :]
    for name, option in flags.items():
        ending = r"(?![\w\-/='\"(]|\.\w)"
        if option in typed:
            dotted = rf"(?<![\w.\-/='\"])(?:model|training|data)\.{name}{ending}"
            message = re.sub(dotted, option, message)
        if "_" in name and (option in typed or not typed & {"--set", "--config"}):
            message = re.sub(rf"(?<![\w.\-/='\"]){name}{ending}", option, message)
    return message


def message(error: Any) -> str:
    """Return the message of a usage error of typer, and its remedy."""
    command = next((word for word in sys.argv[1:] if word in COMMANDS), None)
    # If a command's value is missing, the parser's error names only the program.
    paths = [f"minigpt {command}" if command else "minigpt"]
    paths += [error.ctx.command_path] if getattr(error, "ctx", None) else []
    page = f"See {max(paths, key=len)} --help."
    takes_prompt = command in ("generate", "attention-trace")
    text = str(error.format_message()).splitlines()[0].rstrip(".")
    if type(error).__name__ == "NoSuchOption":
        text = f"unknown option {error.option_name!r}"
    elif "unexpected extra argument" in text and takes_prompt:
        page = "A prompt is one argument: put it in quotes."
    return f"{text[:1].lower()}{text[1:]}. {page}"
