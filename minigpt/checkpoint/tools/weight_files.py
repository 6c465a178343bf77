"""Find the shards of a model's weights, or report why a folder has none."""

import os
import re
import shlex
from pathlib import Path

from minigpt.checkpoint.model_folder import WEIGHTS
from minigpt.checkpoint.tools.other_folders import may_be_weights, not_a_model
from minigpt.errors import CheckpointError
from minigpt.files import read_json

INDEX = "model.safetensors.index.json"
"""Index of a sharded model: the file of each tensor."""
BIN = "pytorch_model.bin"
"""Pickle of a model's weights, which only ``checkpoints import`` reads."""
BIN_INDEX = "pytorch_model.bin.index.json"


def shards_in(folder: Path) -> list[str]:
    """Return the file names of a sharded model.

    Raises: CheckpointError if there are none; for a pickle, it names the command that converts it.
    """
    if os.path.lexists(folder / INDEX):
        return shard_names(folder / INDEX)
    paths = sorted(folder.glob("*"))
    pickles = [path for path in paths if path.suffix in (".bin", ".pt", ".pth")]
    pickles = [path for path in pickles if may_be_weights(path)]
    if (folder / BIN).is_file() or (folder / BIN_INDEX).is_file():
        names = (path.name for path in pickles if path.name.startswith("pytorch_model"))
        raise CheckpointError(_pickled(folder, next(names, BIN), folder))
    if what := not_a_model(folder):
        raise CheckpointError(what)
    others = [path.name for path in paths if path.suffix == ".safetensors"]
    why, remedy = "", "Write or download it again."
    if others and "-of-" in others[0]:
        why = f", and so is {INDEX}, which lists shards such as {others[0]!r}"
    elif others:
        why = f": its weights are in {others[0]!r}"
        remedy = f"Rename that file to {WEIGHTS}."
    elif pickles and "-of-" in pickles[0].name:
        why = f", and so is {BIN_INDEX}, which lists shards such as {pickles[0].name!r}"
    elif pickles:
        raise CheckpointError(_pickled(folder, pickles[0].name, pickles[0]))
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}{why}. {remedy}")


def _pickled(folder: Path, name: str, source: Path) -> str:
    """Return the error for weights in a pickle. Args: source, what ``checkpoints import`` reads."""
    return (
        f"{str(folder)!r} has its weights in {name!r}, a pickle, which can run any code. Convert "
        f"it without running code: `minigpt checkpoints import {shlex.quote(str(source))} "
        "NEW_FOLDER`."
    )


def shard_names(index: Path) -> list[str]:
    """Return the files, all in the same folder, that an index of weights lists.

    Raises: CheckpointError if it lists none, or files elsewhere.
    """
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if names and all(isinstance(n, str) and re.fullmatch(r"[\w.-]+", n) for n in names):
        return sorted(set(names))
    raise CheckpointError(
        f"{str(index)!r} does not map tensors to files of its folder. Download it again."
    )
