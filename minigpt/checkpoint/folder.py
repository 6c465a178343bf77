"""The run folder: checkpoints that no crash can cost, where they are, and which one is meant.

    NAME/step-000500/       one checkpoint: a Hugging Face folder, training_state/, manifest.json
    NAME/.writing-step-...  one that is being written; a kill leaves it, the next lock removes it
    NAME/latest.json        which step, and the facts that were known when it was written
    NAME/best.json          the same, of the step with the least validation loss

A step folder appears under its name by one rename, when all its bytes are on the disk, so that
a folder of that name is complete; the manifest tells if it was damaged afterwards, and the facts
of its step, so that a kill before the two pointers are written costs nothing.
"""

import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from minigpt.checkpoint.disk import (
    read_json,
    resource_errors,
    sha256,
    sync_file,
    sync_folder,
    to_json,
    write_atomically,
)
from minigpt.checkpoint.hub import download_model, is_hub_name
from minigpt.errors import CheckpointError, LockedError, MinigptError, nearest

ROOT = Path("checkpoints")
"""Where runs go, and what ships lies, seen from the project's root."""

MANIFEST = "manifest.json"
CONFIG_FILE = "config.toml"
"""A run's settings, resolved."""
METRICS_FILE = "metrics.jsonl"
"""A run's events, one a line."""

_STEP = re.compile(r"step-(\d{6,})")
_WRITING, _REPLACED, _DELETING = ".writing-", ".replaced-", ".deleting-"


@dataclass(frozen=True)
class Pointer:
    """An intact checkpoint of a run."""

    step: int
    """Optimizer steps done."""
    folder: Path
    """The complete checkpoint."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What is known of this step, such as its validation loss."""


class RunFolder:
    """One training run on the disk. Writing needs the lock; reading does not."""

    def __init__(self, path: Path) -> None:
        """Name the run's folder; nothing is read or made."""
        self.path = path

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run folder, made if need be, against every other writer; tidy what kills left.

        Raises: LockedError, at once, if another process or RunFolder holds it; ResourceError.
        """
        with resource_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock", timeout=0)
            try:
                lock.acquire()
            except Timeout:
                raise LockedError(
                    f"another run is writing {str(self.path)!r}. Wait until it ends, or give this "
                    "one another --name."
                ) from None
        try:
            with resource_errors(self.path):
                self._tidy()
            yield
        finally:
            lock.release()

    def _tidy(self) -> None:
        for path in self.path.glob(f"{_REPLACED}*"):
            final = self.path / path.name.removeprefix(_REPLACED)
            if not final.exists():  # killed between the two renames of _put_in_place
                os.rename(path, final)
        for prefix in (_WRITING, _REPLACED, _DELETING):
            for path in self.path.glob(f"{prefix}*"):
                _remove(path)

    def step_folder(self, step: int) -> Path:
        """Return where the checkpoint of a step is, or would be."""
        return self.path / f"step-{step:06d}"

    @contextmanager
    def writing_step(self, step: int, **facts: Any) -> Iterator[Path]:
        """Yield an empty folder that becomes the checkpoint of a step when the block ends well.

        After an exception nothing of it remains, and the earlier checkpoints are as they were.

        Args: facts of the step, of what JSON can hold.
        Raises: ResourceError if the disk is full or the folder is not ours to write.
        """
        final = self.step_folder(step)
        aside = self.path / f"{_WRITING}{final.name}"
        with resource_errors(self.path):
            _remove(aside)
            try:
                aside.mkdir(parents=True)
                yield aside
                _write_manifest(aside, facts)
                self._put_in_place(aside, final)
            except BaseException:
                _remove(aside)
                raise

    def _put_in_place(self, aside: Path, final: Path) -> None:
        # A folder cannot be renamed over one that has files, so an older checkpoint of the same
        # step steps aside first; _tidy brings it back if we are killed between the renames.
        replaced = self.path / f"{_REPLACED}{final.name}"
        if final.exists():
            os.rename(final, replaced)
        try:
            os.rename(aside, final)
            sync_folder(self.path)
        except BaseException:
            if final.exists():
                os.rename(final, aside)
            if replaced.exists():
                os.rename(replaced, final)
            raise
        _remove(replaced)

    def point(self, name: Literal["best", "latest"], step: int, **facts: Any) -> None:
        """Let best.json or latest.json name a complete step, with facts that JSON can hold.

        Raises: ResourceError.
        """
        assert self.step_folder(step).is_dir(), f"step {step} is not written"
        write_atomically(self.path / f"{name}.json", to_json({"step": step, **facts}))

    def steps(self) -> list[int]:
        """Return the steps that have a folder, damaged or not, in ascending order."""
        if not self.path.is_dir():
            return []
        matches = (_STEP.fullmatch(path.name) for path in self.path.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> Pointer | None:
        """Return the newest intact checkpoint, past damaged ones; None if there is none."""
        for step in reversed(self.steps()):
            if pointer := self._pointer(step, "latest"):
                return pointer
        return None

    def best(self) -> Pointer | None:
        """Return the intact checkpoint with the least validation loss that is known.

        Where none is, the one that best.json names, else the latest; None if there is none.
        """
        named = self._pointed("best").get("step")
        pointers = [pointer for step in self.steps() if (pointer := self._pointer(step, "best"))]
        best = min(pointers, key=lambda p: (_val_loss(p), p.step != named), default=None)
        is_known = best and (best.step == named or _val_loss(best) < math.inf)
        return best if is_known else self.latest()

    def _pointed(self, name: str) -> dict[str, Any]:
        try:
            return read_json(self.path / f"{name}.json")
        except CheckpointError:
            return {}

    def _pointer(self, step: int, name: str) -> Pointer | None:
        folder = self.step_folder(step)
        try:
            verify(folder)
            own = read_json(folder / MANIFEST).get("facts")
        except CheckpointError:
            return None
        facts = self._pointed(name)
        facts = facts if facts.pop("step", None) == step else {}
        return Pointer(step, folder, facts | (own if isinstance(own, dict) else {}))

    def prunable(self, keep: int) -> list[int]:
        """Return the steps of intact checkpoints but best, latest and the newest ``keep`` others.

        Damaged ones stay: something of them may be saved by hand.
        """
        protected = {pointer.step for pointer in (self.best(), self.latest()) if pointer}
        others = [step for step in self.steps() if step not in protected]
        intact = [step for step in others if self._pointer(step, "latest")]
        return intact[: max(len(intact) - keep, 0)]

    def prune(self, keep: int) -> None:
        """Delete the ``prunable`` checkpoints."""
        with resource_errors(self.path):
            for step in self.prunable(keep):
                folder = self.step_folder(step)
                doomed = self.path / f"{_DELETING}{folder.name}"
                os.rename(folder, doomed)  # first, so that no half of it is taken for a checkpoint
                _remove(doomed)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink(missing_ok=True)  # a file of that name


def _val_loss(pointer: Pointer) -> float:
    loss = pointer.facts.get("val_loss")
    return loss if isinstance(loss, float) and math.isfinite(loss) else math.inf


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    paths = sorted(folder.rglob("*"))
    files = {}
    for path in paths:
        if path.is_file():
            sync_file(path)
            name = path.relative_to(folder).as_posix()
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    for path in paths:
        if path.is_dir():
            sync_folder(path)
    manifest = {"version": 1, "facts": facts, "files": files}
    write_atomically(folder / MANIFEST, to_json(manifest))


def verify(step_folder: Path, *, hashes: bool = False) -> None:
    """Check a checkpoint against its manifest: each file's size, and its SHA-256 when asked.

    Raises: CheckpointError naming the first file that is missing or not as it was written.
    """
    files = read_json(step_folder / MANIFEST).get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"the manifest of {str(step_folder)!r} lists no files.")
    for name, facts in files.items():
        path = step_folder / name
        is_inside = path.resolve().is_relative_to(step_folder.resolve())
        if not is_inside or not isinstance(facts, dict):
            raise CheckpointError(f"the manifest of {str(step_folder)!r} is damaged at {name!r}.")
        if not path.is_file():
            problem = "is missing"
        elif path.stat().st_size != facts.get("bytes"):
            problem = f"has {path.stat().st_size} bytes, {facts.get('bytes')!r} when written"
        elif hashes and sha256(path) != facts.get("sha256"):
            problem = "is not as it was written (its SHA-256 differs)"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint {str(step_folder)!r} is damaged: {name!r} {problem}. Use another "
            f"step; if you changed it on purpose, delete {MANIFEST} there."
        )


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
        if place.name.startswith(_WRITING):
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
    """Return the run folders and the model folders in a folder, by name.

    Raises: ResourceError if it may not be read.
    """
    if not root.is_dir():
        return []
    with resource_errors(root):
        return sorted(place for place in root.iterdir() if _holds_model(place))


def _remedy(word: str, root: Path) -> str:
    names = [place.name for place in models_in(root) if place.name.isprintable()]
    return nearest(word, names) if names else "Make one with `minigpt train`."


def find_model(spec: str, root: Path = ROOT) -> Path | None:
    """Return the run or model folder of that path, or of that name under root; None: no such."""
    places = [Path(spec), root / spec] if Path(spec).name == spec else [Path(spec)]
    return next((place for place in places if _holds_model(place)), None)
