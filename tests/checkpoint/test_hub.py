"""Downloads from a local server that imitates the Hub; each client is a separate process."""

import errno
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import Hub, handler_of
from layout_models import make_model

from minigpt.checkpoint.model_folder import read_model, save_tensors, write_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.checkpoint.tools.hub import download_model, is_hub_name
from minigpt.checkpoint.weights import tensors_to_hf
from minigpt.commands.loading import load
from minigpt.commands.options import ModelSource, PromptForm
from minigpt.errors import CheckpointError, ResourceError
from minigpt.text.tokenizer import BytesTokenizer

ROOT = Path(__file__).resolve().parents[2]
PICKLE = b"\x80\x04 what would run any code"
FALSE_INDEXES = {
    "a": "pytorch_model.bin",
    "b": "old/a.safetensors",
    "c": "../../a.safetensors",
    "d": [1],
}
RESOLVER = """
import json, sys
from minigpt.checkpoint.resolve import resolve_model
from minigpt.errors import MinigptError
for spec in sys.argv[1:]:
    try:
        print(json.dumps({"folder": str(resolve_model(spec))}))
    except MinigptError as error:
        print(json.dumps({"error": str(error), "code": error.exit_code}))
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders of a model in one file and of another one in two shards with an index."""
    places = {name: tmp_path_factory.mktemp(name) for name in ("one", "sharded")}
    for place, layout in zip(places.values(), ("qwen3", "gpt2-tied"), strict=True):
        write_model(place, make_model(257, layout), BytesTokenizer())
    sharded = places["sharded"]
    model = read_model(sharded).model
    tensors = tensors_to_hf(model.config, model.state_dict())
    (sharded / "model.safetensors").unlink()
    shards = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for shard in set(shards.values()):
        save_tensors(sharded / shard, {n: t for n, t in tensors.items() if shards[n] == shard})
    index = {"metadata": {}, "weight_map": shards}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    return places


@pytest.fixture(scope="module")
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    one, half = files_of(models["one"]), files_of(models["sharded"])
    del half["model-00002-of-00002.safetensors"]
    hub = Hub()
    hub.repositories = {
        "tiny/story": {
            "main": one
            | {
                "README.md": b"# A model",
                "pytorch_model.bin": PICKLE,
                "training_args.pt": PICKLE,
                "tokenizer.pickle": PICKLE,
                "modeling_tiny.py": b"raise SystemExit('remote code ran')",
                "consolidated.safetensors": one["model.safetensors"],
                "onnx/config.json": b"{}",
                "fp16/model.safetensors": one["model.safetensors"],
            },
            "v2.0": one | {"generation_config.json": b'{"eos_token_id": [7, 8]}'},
            "refs/pr/1": one,
        },
        "tiny/sharded": {"main": files_of(models["sharded"])},
        "tiny/pickled": {"main": {"config.json": one["config.json"], "pytorch_model.bin": PICKLE}},
        "tiny/half": {"main": half},
        "tiny/lying": {
            "main": {
                "config.json": one["config.json"],
                "model.safetensors.index.json": json.dumps({"weight_map": FALSE_INDEXES}).encode(),
                "pytorch_model.bin": PICKLE,
                "old/a.safetensors": PICKLE,
            }
        },
        "tiny/bad": {"main": one | {"model.safetensors": PICKLE}},
        "tiny/gated": {"main": one},
        "tiny/down": {"main": one},
        "tiny/slow": {"main": one},
    }
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield hub
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module", autouse=True)
def installed() -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "HF_HOME": str(home),
        "HF_ENDPOINT": url,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def resolve(cwd: Path, env: dict[str, str], *specs: str) -> list[dict[str, Any]]:
    """Resolve each spec in one process, and check that its stderr is empty."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RESOLVER, *specs],
        cwd=cwd,
        env=env,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.stderr == b"", done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class Downloads:
    """Downloads made by one process."""

    home: Path
    """Folder of the Hub cache."""
    folders: dict[str, Path]
    """Result of each model name."""
    asked: tuple[str, ...]
    """Paths that the server received."""


@pytest.fixture(scope="module")
def downloads(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Downloads:
    home = tmp_path_factory.mktemp("huggingface")
    tagged = hub.files("tiny/story", "v2.0")
    assert tagged
    revisions = ["main", "v2.0", "refs/pr/1", tagged[0]]
    specs = ["tiny/story", "tiny/sharded", "tiny/bad"]
    specs += [f"tiny/story@{revision}" for revision in revisions]
    hub.asked.clear()
    answers = resolve(home, environment(home, hub.url), *specs)
    folders = [Path(answer["folder"]) for answer in answers]
    return Downloads(home, dict(zip(specs, folders, strict=True)), tuple(hub.asked))


@pytest.mark.integration
def test_only_the_files_of_the_model_are_downloaded(
    downloads: Downloads, models: dict[str, Path]
) -> None:
    for spec, original in {"tiny/story": "one", "tiny/sharded": "sharded"}.items():
        found = downloads.folders[spec]
        assert files_of(found) == files_of(models[original])
        ours, theirs = read_model(found), read_model(models[original])
        assert ours.tokenizer is not None
        assert ours.model.config == theirs.model.config
        for name, tensor in theirs.model.state_dict().items():
            assert torch.equal(ours.model.state_dict()[name], tensor)
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in downloads.asked} - {""}
    assert fetched == {name for place in models.values() for name in files_of(place)}
    stored = [path.read_bytes() for path in (downloads.home / "hub").rglob("*") if path.is_file()]
    assert sum(data == PICKLE for data in stored) == 2  # from tiny/bad: the blob and the link to it


@pytest.mark.integration
def test_a_revision_is_a_branch_a_tag_or_a_commit(downloads: Downloads) -> None:
    default, *_, main, tagged, proposed, by_commit = downloads.folders.values()
    assert default == main
    assert by_commit == tagged
    assert len({main, tagged, proposed}) == 3
    tokenizers = [read_model(place).tokenizer for place in (main, tagged)]
    assert [t.end_of_text_ids for t in tokenizers if t] == [(256,), (7, 8)]


@pytest.mark.integration
def test_ctrl_c_stops_a_download_at_once(hub: Hub, tmp_path: Path) -> None:
    hub.asked.clear()
    started = subprocess.Popen(
        [sys.executable, "-c", RESOLVER, "tiny/slow"],
        cwd=tmp_path,
        env=environment(tmp_path, hub.url),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not any(re.match("GET .*/model.safetensors", asked) for asked in hub.asked):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    assert started.wait(30) == -signal.SIGINT  # the server would wait twice as long
    hub.goes_on.set()


@pytest.mark.integration
def test_a_downloaded_folder_is_checked_as_strictly_as_a_local_one(downloads: Downloads) -> None:
    with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
        read_model(downloads.folders["tiny/bad"])


@pytest.mark.integration
def test_an_index_of_files_elsewhere_is_refused(hub: Hub, tmp_path: Path) -> None:
    (answer,) = resolve(tmp_path, environment(tmp_path, hub.url), "tiny/lying")
    assert answer["code"] == 4
    assert "does not map tensors to files of its folder" in answer["error"]
    stored = [path.read_bytes() for path in (tmp_path / "hub").rglob("*") if path.is_file()]
    assert stored
    assert PICKLE not in stored


ERRORS = {
    "tiny/none": "has no such repository. Check the name; if it is private, log in with",
    "tiny/story@v3": "its repository has no revision 'v3'. Name a branch, a tag or a commit.",
    "tiny/gated": "its repository is gated. Accept the terms at http://127.0.0.1:",
    "tiny/down": "answered 503. Try again later",
    "tiny/a--b": "not a valid repository name",
    "tiny/pickled": "convert them with `hf download tiny/pickled --local-dir OLD` and `minigpt",
    "tiny/half": "its repository has no model.safetensors, or not all of its parts. Weights in",
}


@pytest.mark.integration
def test_each_failed_download_has_a_one_line_error(hub: Hub, tmp_path: Path) -> None:
    answers = resolve(tmp_path, environment(tmp_path, hub.url), *ERRORS)
    for (spec, says), answer in zip(ERRORS.items(), answers, strict=True):
        assert answer["code"] == 4
        assert answer["error"].startswith(f"{spec!r} ")
        assert says in answer["error"]
        assert answer["error"].isprintable()


@pytest.mark.integration
@pytest.mark.parametrize("is_offline", [True, False], ids=["HF_HUB_OFFLINE", "no network"])
def test_offline_uses_the_cache_and_a_missing_file_is_a_one_line_error(
    hub: Hub, downloads: Downloads, is_offline: bool
) -> None:
    nowhere = "http://127.0.0.1:9"  # a port without a server
    offline = {"HF_HUB_OFFLINE": "1"} if is_offline else {}
    env = environment(downloads.home, hub.url if is_offline else nowhere, **offline)
    hub.asked.clear()
    *cached, absent = resolve(downloads.home, env, *downloads.folders, "tiny/pickled")
    assert [Path(answer["folder"]) for answer in cached] == list(downloads.folders.values())
    assert absent["code"] == 4
    says = (
        "HF_HUB_OFFLINE allows only the Hub's cache, where some of its files are missing."
        if is_offline
        else f"the Hugging Face Hub ({nowhere}) cannot be reached ("
    )
    assert absent["error"].startswith(f"'tiny/pickled' is not a folder here, and {says}")
    assert hub.asked == []


def test_an_existing_path_is_not_looked_up_on_the_hub(
    hub: Hub, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "story").symlink_to(models["one"])
    (tmp_path / "tiny" / "sharded").mkdir()
    hub.asked.clear()
    monkeypatch.chdir(tmp_path)
    for name in ("huggingface_hub", "huggingface_hub.utils"):
        monkeypatch.setitem(sys.modules, name, None)  # makes importing it fail
    assert resolve_model("tiny/story") == Path("tiny/story")
    for spec, says in {
        "tiny/sharded": "'tiny/sharded' contains no checkpoint",
        "checkpoints/tiny": "there is no model 'checkpoints/tiny'",
        "./tiny/none": "there is no model",
        "tiny/none/step-000001": "there is no model",
        "tiny/gated": r"'tiny/gated' is not a folder here\..*'minigpt-attention\[hub\]'\.$",
    }.items():
        with pytest.raises(CheckpointError, match=says):
            resolve_model(spec)
    assert hub.asked == []


def test_hub_names_are_recognized() -> None:
    for spec in ("a/b", "Qwen/Qwen3-0.6B", "a_b/c.d@v1.0", "a/b@refs/pr/1", "0/_@main"):
        assert is_hub_name(spec), spec
    for spec in (
        *("gpt2", "/a/b", "./a", "../a/b", "a/b/c", "a/b/", "a//b", "a/", "/b", "", "a b/c", "é/b"),
        *("a/b@", "a@v/b", "a/b@v 1", "a/\x1b[2J", "a/b\n", f"a/{'b' * 97}", "a\\b", "~/a"),
    ):
        assert not is_hub_name(spec), spec


def test_a_full_disk_is_a_resource_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*words: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "blob"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fill)
    with pytest.raises(ResourceError, match=r"blob': No space left on device\. Free some space"):
        download_model("tiny/story")


@pytest.mark.integration
def test_progress_is_shown_only_if_stderr_is_a_terminal(hub: Hub, tmp_path: Path) -> None:
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (24, 80))
    done = subprocess.run(
        [sys.executable, "-c", RESOLVER, "tiny/story"],
        cwd=tmp_path,
        env=environment(tmp_path, hub.url),
        stdout=subprocess.PIPE,
        stderr=stderr,
        check=True,
        timeout=60,
    )
    os.close(stderr)
    drawn = b""
    with suppress(OSError):  # Linux raises it once the other end is closed
        while block := os.read(terminal, 2**16):
            drawn += block
    os.close(terminal)
    assert b"100%" in drawn
    assert b"words" not in drawn  # from the server's warning
    assert len(done.stdout.splitlines()) == 1


def test_commands_accept_a_hub_name_as_model(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "minigpt.checkpoint.tools.hub.download_model",
        lambda spec: asked.append(spec) or models["one"],
    )
    ready = load(ModelSource(model="tiny/story@main", device="cpu"), "ab", PromptForm())
    assert asked == ["tiny/story@main"]
    assert (ready.folder, ready.prompt) == (models["one"], [97, 98])
