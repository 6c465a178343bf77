"""Commands on read-only and full file systems are refused early and lose nothing.

These tests need root to mount; permissions do not restrict root.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from calls import ROOT, TINY, Run, error_line

Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Return a function that mounts a file system of 256 kB at a folder, or a folder read-only."""
    mounted: list[Path] = []

    def begin(place: Path, *, read_only: bool = False) -> None:
        place.mkdir(exist_ok=True)
        words = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
        if read_only:
            words = ["--bind", "-o", "ro", str(place), str(place)]
        done = subprocess.run(["mount", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"needs root to mount: {done.stderr.strip()}")
        mounted.append(place)

    if shutil.which("mount") is None or not hasattr(os, "geteuid") or os.geteuid():
        pytest.skip("needs root to mount")
    yield begin
    for place in reversed(mounted):
        subprocess.run(["umount", "-l", place], check=True)


@pytest.fixture
def home(trained: Path, workplace: Path, run: Run) -> Path:
    """Return the working folder with the tiny run of two checkpoints, its corpus and a disk."""
    shutil.copytree(trained / "checkpoints", workplace / "checkpoints")
    shutil.copy(trained / "corpus.txt", workplace)
    assert run("train", "--resume", "--name", "tiny", "--max-steps", "6").code == 0
    (workplace / "disk").mkdir()
    return workplace


TRACE = ["attention-trace", "The king said", "--model", "tiny", "--max-new-tokens", "12"]
COMPARE = ["compare", "corpus.txt", "--variants", "scaled_dot", "--seeds", "1", "--name", "c"]
COMMANDS = {
    "out": [*TRACE, "--out", "disk/a.jsonl"],
    "dense": [*TRACE, "--dense", "disk/a.safetensors"],
    "html": [*TRACE, "--html", "disk/a.html"],
    "svg": [*TRACE, "--svg", "disk/a.svg"],
    "png": [*TRACE, "--png", "disk/a.png"],
    "plot": ["plot", "tiny", "--out", "disk/a.svg"],
    "compare": [*COMPARE, "--budget", "steps:1", "--tokenizer", "bytes", "--out", "disk/a.png"],
    "measures": ["measures", "The king said", "--model", "tiny", "--picture", "disk/a.pdf"],
    "claims": ["claims", "--quick", "--out", "disk/new"],
    "prepare": ["prepare", "corpus.txt", "--out", "disk/new"],
    "export": ["checkpoints", "export", "tiny", "--gguf", "disk/a.gguf"],
    "average": ["checkpoints", "average", "tiny", "--last", "2", "--out", "disk/new"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_refuse_a_read_only_mount_before_working(
    name: str, home: Path, mount: Mount, run: Run
) -> None:
    mount(home / "disk", read_only=True)
    result = run(*COMMANDS[name])
    lines = result.err.splitlines()
    assert (result.code, result.out) == (6, ""), result.err
    assert "Read-only file system" in lines[-1]
    assert "disk" in lines[-1]
    assert ".writing-" not in lines[-1], "temporary files must not be mentioned"
    assert "mount it for writing" in lines[-1].lower()
    assert not any("tok/s" in line or line.startswith("step ") for line in lines)


@pytest.mark.integration
@pytest.mark.parametrize("name", [n for n in COMMANDS if n not in ("compare", "claims")])
def test_commands_on_a_full_disk_keep_the_old_file_and_leave_no_others(
    name: str, home: Path, mount: Mount, run: Run
) -> None:
    mount(home / "disk")
    target = home / COMMANDS[name][-1]
    is_new = target.name == "new" or name == "export"  # export refuses an existing file
    if not is_new:
        target.write_bytes(b"old")
    with (home / "disk" / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1024)):
                pass
        except OSError:
            pass
    result = run(*COMMANDS[name])
    assert result.code == 6, result.err
    assert "No space left on device" in result.err.splitlines()[-1]
    assert repr(COMMANDS[name][-1])[1:-1] in result.err.splitlines()[-1]
    left = {path.name for path in (home / "disk").iterdir()} - {"filler"}
    # prepare can resume from its last shard once there is space.
    assert left <= (set() if is_new and name != "prepare" else {target.name})
    assert is_new or target.read_bytes() == b"old"


@pytest.mark.integration
def test_training_in_a_read_only_folder_is_refused_by_name(
    home: Path, mount: Mount, run: Run
) -> None:
    mount(home, read_only=True)
    os.chdir(home)  # enter the mount, not the folder under it
    for words in (["corpus.txt", "--name", "new", *TINY], ["--resume", "--name", "tiny"]):
        line = error_line(run("train", *words, "--max-steps", "19"))
        assert "checkpoints" in line
        assert "Read-only file system" in line
    for words in (["generate", "--max-new-tokens", "2"], TRACE[:1], ["evaluate"]):
        prompt = ["The king"] if words[0] != "evaluate" else []
        assert run(*words, *prompt, "--model", "tiny").code == 0, "reading must not need to write"


@pytest.mark.integration
def test_a_read_only_package_can_train_generate_and_trace(
    home: Path, mount: Mount, tmp_path_factory: pytest.TempPathFactory
) -> None:
    site = tmp_path_factory.mktemp("site-packages")
    shutil.copytree(
        ROOT / "minigpt", site / "minigpt", ignore=shutil.ignore_patterns("__pycache__")
    )
    mount(site, read_only=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "HOME")}
    env |= {"PYTHONPATH": str(site), "HOME": "/nowhere", "OMP_NUM_THREADS": "1"}
    for words in (
        ["train", "corpus.txt", "--name", "new", *TINY],
        ["generate", "The king", "--max-new-tokens", "2", "--model", "new"],
        [*TRACE, "--html", "a.html", "--model", "new"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "minigpt", *words],
            cwd=home,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert "error" not in done.stderr
    assert (home / "a.html").stat().st_size > 1000
    assert not list(site.rglob("__pycache__"))
