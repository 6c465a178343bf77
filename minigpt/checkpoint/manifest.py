"""The manifest of a checkpoint: sizes and hashes of its files, to detect damage."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minigpt.errors import CheckpointError
from minigpt.files import read_json, sha256, sync_file, sync_folder, to_json, write_atomically

MANIFEST = "manifest.json"


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Sync a folder's files to disk, then write their sizes and hashes, and the facts."""
    paths = sorted(folder.rglob("*"))
    files = {}
    for path in paths:
        if path.is_file():
            with path.open("rb+") as file:
                sync_file(file)
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for path in paths:
        if path.is_dir():
            sync_folder(path)
    manifest = {"version": 1, "facts": facts, "files": files}
    write_atomically(folder / MANIFEST, to_json(manifest))


def read_facts(step_folder: Path) -> dict[str, Any]:
    """Return the facts in the manifest of a checkpoint.

    Raises: CheckpointError if the manifest is missing or damaged.
    """
    facts = read_json(step_folder / MANIFEST).get("facts")
    return facts if isinstance(facts, dict) else {}


def verify(step_folder: Path, *, hashes: bool = False) -> None:
    """Check the size of each file of a checkpoint against its manifest.

    Args: hashes, whether to compare SHA-256 hashes too.
    Raises: CheckpointError naming the first file that is missing or changed.
    """
    files = read_json(step_folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"the manifest of {str(step_folder)!r} lists no files.")
    for name, facts in files.items():
        path = step_folder / name
        # realpath does not raise on a symbolic link to itself.
        is_inside = Path(os.path.realpath(path)).is_relative_to(os.path.realpath(step_folder))
        if not is_inside or not isinstance(facts, dict):
            raise CheckpointError(f"the manifest of {str(step_folder)!r} is damaged at {name!r}.")
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != facts.get("bytes"):
            problem = f"has {path.stat().st_size} bytes instead of {facts.get('bytes')!r}"
        elif hashes and sha256(path) != facts.get("sha256"):
            problem = "has changed (its SHA-256 differs)"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint {str(step_folder)!r} is damaged: {name!r} {problem}. Use another "
            f"step; if you changed it on purpose, delete {MANIFEST} there and name that "
            "folder."
        )
