"""The files of weights that were saved in several parts, or as a pickle."""

import os
import re
import shlex
from pathlib import Path

from minigpt.checkpoint.model_folder import WEIGHTS
from minigpt.errors import CheckpointError
from minigpt.files import read_json

INDEX = "model.safetensors.index.json"
"""Files of a sharded model's tensors."""


def shards_in(folder: Path) -> list[str]:
    """Return the names of the files of a sharded model.

    Raises: CheckpointError if there is none; for a pickle, it names the command that reads it.
    """
    if os.path.lexists(folder / INDEX):
        return shard_names(folder / INDEX)
    if pickled := [*sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pt*"))]:
        raise CheckpointError(
            f"{str(folder)!r} has its weights in {pickled[0].name!r}, a pickle, which can run any "
            "code. Make a model folder from it, which runs none: `minigpt checkpoints import "
            f"{shlex.quote(str(folder))} NEW_FOLDER`."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    why, remedy = "", "Write or download it again."
    if others and "-of-" in others[0]:
        why = f", and {INDEX}, which names the parts such as {others[0]!r}"
    elif others:
        why = f": its weights are in {others[0]!r}"
        remedy = f"Rename that file to {WEIGHTS}."
    raise CheckpointError(f"{WEIGHTS} is missing in {str(folder)!r}{why}. {remedy}")


def shard_names(index: Path) -> list[str]:
    """Return the files that an index of weights names, all of them in its folder.

    Raises: CheckpointError if it names others, or none.
    """
    shards = read_json(index).get("weight_map")
    names = list(shards.values()) if isinstance(shards, dict) else []
    if names and all(isinstance(n, str) and re.fullmatch(r"[\w.-]+", n) for n in names):
        return sorted(set(names))
    raise CheckpointError(
        f"{str(index)!r} does not map tensors to files of its folder. Download it again."
    )
