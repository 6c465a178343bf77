"""Errors for names that are not models, such as URLs and pickles, and for damaged checkpoints."""

import os
import re
import shlex
import warnings
from collections.abc import Sequence
from pathlib import Path

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.resolve import SHIPPED, names_in, remedy, shipped_model
from minigpt.checkpoint.tools.hub import HUB_NAME
from minigpt.errors import CheckpointError, MinigptWarning, did_you_mean
from minigpt.files import open_regular, resource_errors

_URL = re.compile(r"[a-z][a-z0-9+.-]*://(?P<host>[^/]*)/?")


def other_format(path: Path) -> str:
    """Describe a weight file in an unsupported format, with the remedy; "" for any other file."""
    try:
        with open_regular(path) as file:
            start = file.read(9)
    except OSError:
        return ""
    if start.startswith(b"GGUF"):
        return (
            "is a GGUF file, which minigpt writes but does not read. Use the Hugging Face folder "
            "it was made from, or create one with transformers: from_pretrained(FOLDER, "
            "gguf_file=NAME) of AutoModelForCausalLM and AutoTokenizer, then save_pretrained."
        )
    if path.suffix == ".safetensors" and start[8:] == b"{":
        return (
            "contains only weights. Name a folder that has it as model.safetensors, with its "
            "config.json and tokenizer.json."
        )
    if path.suffix in (".h5", ".msgpack", ".onnx", ".tflite"):
        return (
            "has weights for another framework. Download the model.safetensors of this model, or "
            "save it with transformers."
        )
    return ""


def no_model(spec: str, places: Sequence[Path], root: Path) -> CheckpointError:
    """Return the error for a name that is not a model.

    Args: places, paths where it was looked up; root, the folder of runs.
    Raises: ResourceError if there is no permission to read one of them.
    """
    if not spec:
        return CheckpointError(f"the name of a model is empty. {remedy('', names_in(root))}")
    if url := _URL.match(spec):
        name = spec[url.end() :]
        advice = "Download the model's files into a folder, and name that."
        if url["host"] == "huggingface.co" and (found := HUB_NAME.match(name)):
            advice = f"Name the model as the Hub does: {found['repository']}."
        return CheckpointError(f"{spec[:120]!r} is a URL, not a folder or a name. {advice}")
    is_name = Path(spec).name == spec
    advice = ""
    if is_name:
        nearby = [*names_in(Path()), *([SHIPPED] if shipped_model() else [])]
        advice = did_you_mean(spec, [*names_in(root), *nearby])
    if not advice:
        advice = remedy(Path(spec).name, names_in(root))
        if is_name:
            advice += " Models on the Hugging Face Hub have names such as openai-community/gpt2."
    for place in places:
        if os.path.exists(place):  # False for invalid names, where Path.exists raises
            return _not_a_model_folder(place, advice)
    where = f" in {str(root)!r}" if is_name else ""
    shown = spec if len(spec) <= 120 else f"{spec[:120]}..."
    return CheckpointError(f"there is no model {shown!r}{where}. {advice}")


def _not_a_model_folder(place: Path, advice: str) -> CheckpointError:
    """Return the error for a file or folder that is not a model folder.

    Args: advice, the remedy if nothing better is known.
    Raises: ResourceError if there is no permission to read it.
    """
    is_folder = os.path.isdir(place)
    if is_folder:
        with resource_errors(place):
            os.listdir(place)
    pickles = [place] if place.is_file() else sorted(place.glob("*.pt"))
    if pickles and pickles[0].suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        return CheckpointError(
            f"{str(pickles[0])!r} is a pickle, which can run any code. Convert it without "
            "running code: `minigpt checkpoints import "
            f"{shlex.quote(str(pickles[0]))} NEW_FOLDER`."
        )
    if place.is_file() and (place.parent / "config.json").is_file():
        advice = f"Name the model's folder: {str(place.parent)!r}."
        return CheckpointError(f"{str(place)!r} is not a folder. {advice}")
    others = sorted(place.glob("*.gguf")) if is_folder else [place]
    if others and (what := other_format(others[0])):
        return CheckpointError(f"{str(others[0])!r} {what}")
    if not is_folder:
        return CheckpointError(f"{str(place)!r} is not a folder. {advice}")
    if (place / "adapter_config.json").is_file():
        return CheckpointError(
            f"{str(place)!r} is an adapter (LoRA) of another model. Merge the two with "
            "PEFT's merge_and_unload, save the result, and name that."
        )
    return CheckpointError(
        f"{str(place)!r} contains no checkpoint: no step folder, no config.json. {advice}"
    )


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
