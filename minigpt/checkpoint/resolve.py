"""Find the model or run that a user names: by path, by name, or on the Hugging Face Hub."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import minigpt
from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import MANIFEST, verify
from minigpt.errors import CheckpointError, MinigptError, nearest
from minigpt.files import WRITING, resource_errors
from minigpt.rings import find_ring

ROOT = Path("checkpoints")
"""Folder of runs, relative to the working directory."""
SHIPPED = "storyteller"
"""Name of the model that ships with minigpt."""
MAKE_ONE = "Make one with `minigpt train`."
"""Remedy if there is no run or model at all."""


def resolve_model(spec: str | None, root: Path = ROOT) -> Path:
    """Return the model folder that a user names, ready for ``read_model``.

    Args: spec, a run folder (its best step, else its latest), a step folder, any Hugging Face
        folder, the name of one of these under root (also NAME/step-N), or a model on the Hugging
        Face hub (org/name or org/name@revision), which is downloaded. None means the newest run
        under root, else a model folder there, else the shipped model.
    Raises: CheckpointError if there is no such model, or it is damaged or cannot be downloaded;
        ConfigError if this installation cannot download; ResourceError.
    """
    if spec is None:
        return _newest(root)
    if place := find_model(spec, root):
        return _model_in(place)
    places = _places(spec, root)
    # False for invalid names, where Path.exists raises.
    is_here = any(os.path.exists(place) or _holds_model(place.parent) for place in places)
    hub = None if is_here or Path(spec).is_relative_to(root) else find_ring("checkpoint.tools.hub")
    if hub and hub.is_hub_name(spec):
        return hub.download_model(spec)
    if refusals := find_ring("checkpoint.tools.refusals"):
        raise refusals.no_model(spec, places, root)
    raise CheckpointError(f"there is no model {spec!r}. {remedy(spec, names_in(root))}")


def find_model(spec: str, root: Path = ROOT) -> Path | None:
    """Find a run folder or model folder by path, or by name under root; None if there is none."""
    return next((place for place in _places(spec, root) if _holds_model(place)), None)


def models_in(root: Path) -> list[Path]:
    """Return the finished run folders and model folders in a folder, sorted by name.

    Raises: ResourceError if it cannot be read.
    """
    if not root.is_dir():
        return []
    with resource_errors(root):
        places = (place for place in root.iterdir() if not place.name.startswith(WRITING))
        return sorted(place for place in places if _holds_model(place))


def names_in(root: Path) -> list[str]:
    """Return the printable names of the runs and models in a folder."""
    return [place.name for place in models_in(root) if place.name.isprintable()]


def remedy(word: str, names: Iterable[str]) -> str:
    """Return the remedy for an unknown name: the nearest known one, else to train a model."""
    return nearest(word, known) if (known := list(names)) else MAKE_ONE


def shown_name(folder: Path) -> str:
    """Return the path of a model folder, or the name of the shipped model."""
    shipped = shipped_model()
    is_shipped = shipped is not None and folder.exists() and folder.samefile(shipped)
    return SHIPPED if is_shipped else str(folder)


def shipped_model() -> Path | None:
    """Return the folder of the shipped model in a clone or a wheel; None if it is absent."""
    package = Path(minigpt.__file__).parent
    places = (package.parent / ROOT / SHIPPED, package / SHIPPED)
    return next((place for place in places if _holds_model(place)), None)


def _places(spec: str, root: Path) -> list[Path]:
    if not spec:  # an unset shell variable, which Path would treat as the working directory
        return []
    if Path(spec).name != spec:
        return [Path(spec)] if ".." in Path(spec).parts else [Path(spec), root / spec]
    shipped = shipped_model() if spec == SHIPPED else None
    return [Path(spec), root / spec, *([shipped] if shipped else [])]


def _holds_model(place: Path) -> bool:
    try:
        return (place / "config.json").is_file() or bool(RunFolder(place).steps())
    except (OSError, ValueError):  # no permission, or a name with a NUL or too many characters
        return False


def _model_in(place: Path) -> Path:
    if (place / "config.json").is_file():
        if place.name.startswith(WRITING):
            raise CheckpointError(f"{str(place)!r} was not finished. Use another step.")
        if (place / MANIFEST).is_file():
            verify(place)
        return place
    run = RunFolder(place)
    pointer = run.best()
    if pointer is None:
        verify(run.step_folder(run.steps()[-1]))  # raises, naming the damage
        raise AssertionError("best() missed an intact step")
    if refusals := find_ring("checkpoint.tools.refusals"):
        refusals.warn_of_damage(run, pointer.step)
    return pointer.folder


def newest_run(root: Path = ROOT) -> Path | None:
    """Return the run under root whose latest checkpoint was written last; None if there is none."""
    runs = {}
    for place in models_in(root):
        if not (place / "config.json").is_file() and (pointer := RunFolder(place).latest()):
            runs[place] = (pointer.folder / MANIFEST).stat().st_mtime_ns
    return max(runs, key=lambda place: (runs[place], place.name), default=None)


def _newest(root: Path) -> Path:
    if run := newest_run(root):
        return _model_in(run)
    for place in [*models_in(root), *([shipped] if (shipped := shipped_model()) else [])]:
        with suppress(MinigptError):
            return _model_in(place)
    raise CheckpointError(
        f"there is no checkpoint in {str(root)!r} yet. {MAKE_ONE[:-1]}, or name a model folder "
        "with --model."
    )
