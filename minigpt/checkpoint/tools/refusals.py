"""Errors for names that are not models, such as URLs and pickles, and of damaged checkpoints."""

import os
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.resolve import names_in, remedy
from minigpt.checkpoint.tools.hub import HUB_NAME
from minigpt.errors import CheckpointError, MinigptWarning
from minigpt.files import resource_errors

_URL = re.compile(r"[a-z][a-z0-9+.-]*://(?P<host>[^/]*)/?")


def no_model(spec: str, places: Sequence[Path], root: Path) -> CheckpointError:
    """Return the error for a name that is not a model.

    Args: places, where it was looked for; root, the folder of runs.
    Raises: ResourceError if one of the places may not be read.
    """
    if not spec:
        return CheckpointError(f"the name of a model is empty. {remedy('', names_in(root))}")
    if url := _URL.match(spec):
        name = spec[url.end() :]
        advice = "Download the model's files into a folder, and name that."
        if url["host"] == "huggingface.co" and (found := HUB_NAME.match(name)):
            advice = f"Name the model as the Hub does: {found['repository']}."
        return CheckpointError(f"{spec[:120]!r} is a URL, not a folder or a name. {advice}")
    advice = remedy(Path(spec).name, names_in(root))
    if Path(spec).name == spec and not advice.startswith("Did"):
        advice += " A model of the Hugging Face Hub is named org/name, as openai-community/gpt2."
    for place in places:
        if os.path.exists(place):  # unlike Path.exists, False for impossible names
            if os.path.isdir(place):
                with resource_errors(place):
                    os.listdir(place)
            pickles = [place] if place.is_file() else sorted(place.glob("*.pt"))
            if pickles and pickles[0].suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
                return CheckpointError(
                    f"{str(pickles[0])!r} is a pickle, which can run any code. Make a model folder "
                    "from it, which runs none: `minigpt checkpoints import "
                    f"{shlex.quote(str(pickles[0]))} NEW_FOLDER`."
                )
            if not os.path.isdir(place):
                if (place.parent / "config.json").is_file():
                    advice = f"Name the model's folder: {str(place.parent)!r}."
                return CheckpointError(f"{str(place)!r} is not a folder. {advice}")
            if (place / "adapter_config.json").is_file():
                return CheckpointError(
                    f"{str(place)!r} is an adapter (LoRA) of another model. Merge the two with "
                    "PEFT's merge_and_unload, save the result, and name that."
                )
            return CheckpointError(
                f"{str(place)!r} holds no checkpoint: no step folder, no config.json. {advice}"
            )
    where = f" in {str(root)!r}" if Path(spec).name == spec else ""
    shown = spec if len(spec) <= 120 else f"{spec[:120]}..."
    return CheckpointError(f"there is no model {shown!r}{where}. {advice}")


def warn_of_damage(run: RunFolder, chosen: int, *, hashes: bool = False) -> None:
    """Warn of a damaged step that is newer than the chosen one; see ``manifest.verify``."""
    for step in reversed(run.steps()):
        if step <= chosen:
            return
        try:
            verify(run.step_folder(step), hashes=hashes)
        except CheckpointError as error:
            warnings.warn(f"{error} Step {chosen} is used.", MinigptWarning, stacklevel=2)
            return
