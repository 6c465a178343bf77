"""Find the shards of a model's weights, or report why a folder has none."""

import os
import re
import shlex
from pathlib import Path

from minigpt.checkpoint.model_folder import WEIGHTS
from minigpt.errors import CheckpointError
from minigpt.files import read_json

INDEX = "model.safetensors.index.json"
"""Index of a sharded model: the file of each tensor."""


def shards_in(folder: Path) -> list[str]:
    """Return the file names of a sharded model.

    Raises: CheckpointError if there are none; for a pickle, it names the command that converts it.
    """
    if os.path.lexists(folder / INDEX):
        return shard_names(folder / INDEX)
    if pickled := [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*"))]:
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {pickled[0].name!r}, a pickle, which can run any "
            "code. Convert it without running code: `minigpt checkpoints import "
            f"{shlex.quote(str(folder))} NEW_FOLDER`."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    why, remedy = "", "Write or download it again."
    if others and "-of-" in others[0]:
        why = f", and so is {INDEX}, which lists shards such as {others[0]!r}"
    elif others:
        why = f": its weights are in {others[0]!r}"
        remedy = f"Rename that file to {WEIGHTS}."
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}{why}. {remedy}")


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
