"""Which model is meant: a run, a step, a folder, a name of one of them, or one of the hub's."""

import os
from contextlib import suppress
from pathlib import Path

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.checkpoint.tools.hub import download_model, is_hub_name
from minigpt.errors import CheckpointError, MinigptError, nearest
from minigpt.files import WRITING, resource_errors

ROOT = Path("checkpoints")
"""Where runs go, and what ships lies, seen from the project's root."""


def resolve_model(spec: str | None, root: Path = ROOT) -> Path:
    """Return the model folder that is meant, ready for ``read_model``.

    Args: spec, a run folder (its best step, else its latest), a step folder, any Hugging Face
        folder, the name of one of these under root, or, where there is no such path, a model of
        the Hugging Face hub (org/name or org/name@revision), which is downloaded. None: the newest
        run under root that has a checkpoint, else what ships there.
    Raises: CheckpointError if there is none, it is half-written or damaged, or cannot be
        downloaded; ResourceError if there is no room for it.
    """
    if spec is None:
        return _newest(root)
    is_name = Path(spec).name == spec
    places = [Path(spec), root / spec] if is_name else [Path(spec)]
    for place in places:
        if _holds_model(place):
            return _model_in(place)
    for place in places:
        if os.path.exists(place):  # unlike Path.exists, False for impossible names
            raise CheckpointError(
                f"{str(place)!r} holds no checkpoint: no step folder, no config.json. "
                f"{_remedy(place.name, root)}"
            )
    if is_hub_name(spec) and not Path(spec).is_relative_to(root):
        return download_model(spec)
    where = f" in {str(root)!r}" if is_name else ""
    shown = spec if len(spec) <= 120 else f"{spec[:120]}..."
    raise CheckpointError(f"there is no model {shown!r}{where}. {_remedy(places[0].name, root)}")


def _holds_model(place: Path) -> bool:
    try:
        return (place / "config.json").is_file() or bool(RunFolder(place).steps())
    except (OSError, ValueError):  # not ours to read, a name too long, a NUL in it
        return False


def _model_in(place: Path) -> Path:
    if (place / "config.json").is_file():
        if place.name.startswith(WRITING):
            raise CheckpointError(f"{str(place)!r} was only half written. Use another step.")
        if (place / MANIFEST).is_file():
            verify(place)
        return place
    run = RunFolder(place)
    pointer = run.best()
    if pointer is None:
        verify(run.step_folder(run.steps()[-1]))  # raises, and says what is wrong with it
        raise AssertionError("a step that verifies was not found")
    return pointer.folder


def _newest(root: Path) -> Path:
    runs = {}
    for place in models_in(root):
        if not (place / "config.json").is_file() and (pointer := RunFolder(place).latest()):
            runs[place] = (pointer.folder / MANIFEST).stat().st_mtime_ns
    if runs:
        return _model_in(max(runs, key=lambda place: (runs[place], place.name)))
    for place in models_in(root):
        with suppress(MinigptError):
            return _model_in(place)
    raise CheckpointError(
        f"there is no checkpoint in {str(root)!r} yet. Make one with `minigpt train`, or name a "
        "model folder with --model."
    )


def models_in(root: Path) -> list[Path]:
    """Return the run folders and the model folders in a folder, by name; no half-written ones.

    Raises: ResourceError if it may not be read.
    """
    if not root.is_dir():
        return []
    with resource_errors(root):
        places = (place for place in root.iterdir() if not place.name.startswith(WRITING))
        return sorted(place for place in places if _holds_model(place))


def _remedy(word: str, root: Path) -> str:
    names = [place.name for place in models_in(root) if place.name.isprintable()]
    return nearest(word, names) if names else "Make one with `minigpt train`."


def find_model(spec: str, root: Path = ROOT) -> Path | None:
    """Return the run or model folder of that path, or of that name under root; None: no such."""
    places = [Path(spec), root / spec] if Path(spec).name == spec else [Path(spec)]
    return next((place for place in places if _holds_model(place)), None)
