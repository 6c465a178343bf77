"""Errors for names that are not models, such as URLs and pickles, and for damaged checkpoints."""

import os
import re
import shlex
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.resolve import SHIPPED, names_in, remedy, shipped_model
from minigpt.checkpoint.tools.hub import HUB_NAME
from minigpt.checkpoint.tools.other_folders import inner_folder, may_be_weights, not_a_model
from minigpt.errors import CheckpointError, MinigptWarning, did_you_mean
from minigpt.files import open_regular, resource_errors

_URL = re.compile(r"[a-z][a-z0-9+.-]*://(?P<host>[^/]*)/?")
_TOKENIZER = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}


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
    elif steps := [step for place in places for step in _steps_beside(place)]:
        advice = f"That run has {', '.join(steps)}."
    if not advice:
        advice = remedy(Path(spec).name, names_in(root))
        if is_name:
            advice += " Models on the Hugging Face Hub have names such as openai-community/gpt2."
    for place in places:
        if os.path.exists(place):  # False for invalid names, where Path.exists raises
            refused = _refused_folder if os.path.isdir(place) else _refused_file
            return CheckpointError(refused(place, advice))
    where = f" in {str(root)!r}" if is_name else ""
    shown = spec if len(spec) <= 120 else f"{spec[:120]}..."
    return CheckpointError(f"there is no model {shown!r}{where}. {advice}")


def _steps_beside(place: Path) -> list[str]:
    """Return the names of a run's steps if a place would be a step of it, else nothing."""
    run = RunFolder(place.parent)
    with suppress(OSError, ValueError):  # no permission, or an impossible name
        return [run.step_folder(step).name for step in run.steps()]
    return []


def _refused_file(path: Path, advice: str) -> str:
    """Return the error for a file that is named as a model."""
    if what := not_a_model(path):
        return what
    if may_be_weights(path):
        return _pickle(path)
    if (path.parent / "config.json").is_file():
        advice = f"Name the model's folder: {str(path.parent)!r}."
    elif what := other_format(path):
        return f"{str(path)!r} {what}"
    return f"{str(path)!r} is not a folder. {advice}"


def _refused_folder(folder: Path, advice: str) -> str:
    """Return the error for a folder that is named as a model, but has no config.json.

    Raises: ResourceError if there is no permission to read it.
    """
    with resource_errors(folder):
        names = sorted(os.listdir(folder))
    if what := not_a_model(folder):
        return what
    paths = [folder / name for name in names]
    if pickles := [path for path in paths if path.suffix == ".pt" and may_be_weights(path)]:
        return _pickle(pickles[0])
    gguf = [path for path in paths if path.suffix == ".gguf"]
    if gguf and (what := other_format(gguf[0])):
        return f"{str(gguf[0])!r} {what}"
    if what := inner_folder(folder):
        return what
    if any(path.suffix == ".safetensors" for path in paths):
        return f"{str(folder)!r} has weights but no config.json. Add the model's config.json."
    if not _TOKENIZER.isdisjoint(names):
        return (
            f"{str(folder)!r} has a tokenizer but no model. Name a folder that has config.json and "
            "model.safetensors too."
        )
    return f"{str(folder)!r} contains no checkpoint: no step folder, no config.json. {advice}"


def _pickle(path: Path) -> str:
    return (
        f"{str(path)!r} is a pickle, which can run any code. Convert it without running code: "
        f"`minigpt checkpoints import {shlex.quote(str(path))} NEW_FOLDER`."
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
