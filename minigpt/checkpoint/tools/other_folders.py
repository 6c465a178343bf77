"""Folders of other training programs that are not models: adapters, training states, shards."""

import os
import re
import shlex
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from minigpt.checkpoint.resolve import models_in
from minigpt.errors import CheckpointError, MinigptError, MinigptWarning
from minigpt.files import read_json

_ADAPTER = "adapter_config.json"
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
# The states that transformers' Trainer and accelerate save besides the weights.
_STATE = re.compile(
    r"(optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|training_args)"
    r"[\w-]*\.(pt|pth|bin|pkl)"
)
_MOST_NAMED = 3


def may_be_weights(path: Path) -> bool:
    """Return whether a file may be a pickle of weights, judged by its name."""
    return path.suffix in _PICKLES and not _STATE.fullmatch(path.name)


def adapter(folder: Path) -> str:
    """Return the error for a folder with an adapter instead of a model; "" if it has none."""
    if not (folder / _ADAPTER).is_file():
        return ""
    return (
        f"{str(folder)!r} is an adapter (LoRA) of another model. Merge the two with PEFT's "
        "merge_and_unload, save the result, and name that."
    )


def check_adapter(folder: Path, names: Iterable[str]) -> None:
    """Warn of an adapter in a model's folder.

    Args: names, the model's tensors.
    Raises: CheckpointError if they are those of the adapter.
    """
    if what := adapter(folder):
        if any(name.startswith("base_model.") for name in names):  # PEFT's prefix
            raise CheckpointError(what)
        warnings.warn(
            f"the adapter (LoRA) in {str(folder)!r} is not applied. Merge it into the model with "
            "PEFT's merge_and_unload, save the result, and name that.",
            MinigptWarning,
            stacklevel=2,
        )


def not_a_model(place: Path) -> str:
    """Return the error for an adapter, a training state or sharded weights; "" for others."""
    if place.is_file():
        if _STATE.fullmatch(place.name):
            return f"{str(place)!r} is a training state, not weights. Name the model's folder."
        return adapter(place.parent) if place.name.startswith("adapter_") else ""
    if what := adapter(place):
        return what
    folder = shlex.quote(str(place))
    if shards := _folders(place, "pytorch_model_fsdp_*"):
        command = f"accelerate merge-weights {shlex.quote(str(shards[0]))} {folder}"
        return f"{str(place)!r} has its weights in FSDP's shards. Merge them: `{command}`."
    if _folders(place, "global_step*"):
        script = shlex.quote(str(place / "zero_to_fp32.py"))
        command = f"python {script} {folder} {folder} --safe_serialization"
        return f"{str(place)!r} has its weights in DeepSpeed's shards. Merge them: `{command}`."
    return ""


def inner_folder(folder: Path) -> str:
    """Return the error for a folder of models, such as a Trainer's or the Hub's; "" for others."""
    places = [folder, *_folders(folder, "snapshots"), *_folders(folder, "models--*/snapshots")]
    models = [model for place in places for model in models_in(place) if _is_model(model)]
    if names := [str(model) for model in _newest_first(models) if str(model).isprintable()]:
        more = ", ..." if len(names) > _MOST_NAMED else "."
        shown = ", ".join(map(shlex.quote, names[:_MOST_NAMED]))
        return f"{str(folder)!r} contains models. Name one of its folders: {shown}{more}"
    adapters = [path for path in _folders(folder, "*") if (path / _ADAPTER).is_file()]
    return adapter(_newest_first(adapters)[0]) if adapters else ""


def _folders(place: Path, pattern: str) -> list[Path]:
    return sorted(path for path in place.glob(pattern) if path.is_dir())


def _is_model(folder: Path) -> bool:
    """Return whether a folder is a run, or has a model's config.json and not another program's."""
    if not os.path.lexists(folder / "config.json"):
        return True
    with suppress(MinigptError):
        return "model_type" in read_json(folder / "config.json")
    return False


def _newest_first(folders: Iterable[Path]) -> list[Path]:
    def age(folder: Path) -> tuple[int, float]:
        # A copied folder has another date, but a Trainer's has its step in its name.
        step = re.fullmatch(r"checkpoint-(\d{1,12})", folder.name)
        return int(step[1]) if step else -1, folder.stat().st_mtime

    return sorted(folders, key=age, reverse=True)
