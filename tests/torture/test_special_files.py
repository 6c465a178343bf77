"""FIFOs, devices, sockets, folders, links and unreadable files in place of regular files."""

import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_models import small_model
from small_runs import config_of, data_of, run_until, text, trainer_of
from small_traces import small_trace

from minigpt.checkpoint.folder import RunFolder
from minigpt.checkpoint.manifest import verify
from minigpt.checkpoint.model_folder import read_model, save_tensors, write_model
from minigpt.checkpoint.resolve import resolve_model
from minigpt.commands.attention_trace.files import weights_sha256
from minigpt.config import DataConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, MinigptError, ResourceError
from minigpt.settings import read_toml
from minigpt.text.chat import read_chat_template
from minigpt.text.shard_files import open_prepared
from minigpt.text.sources import find_files
from minigpt.text.tokenizer import BytesTokenizer
from minigpt.text.tokens import prepare
from minigpt.tracing.analysis.dense import with_rows_of
from minigpt.tracing.analysis.reader import read_traces
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.file import to_json_line
from minigpt.training.metrics import MetricsLog
from minigpt.training.reports.curves import read_curves
from minigpt.training.state import STATE_FOLDER, read_state, restore

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is limited to about 100 bytes
        try:
            one.bind(path.name)
        finally:
            os.chdir(here)


KINDS: dict[str, Callable[[Path], None]] = {
    "FIFO": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nothing"),
}
WORDS = {"loop": "symbolic links", "dangling": "missing|No such file|there is no file"}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def put(kind: str, path: Path) -> str:
    """Replace a path by a special file; return the pattern of the expected error."""
    path.unlink(missing_ok=True)
    KINDS[kind](path)
    return WORDS.get(kind, f"(?i)it is a {kind}")


MODEL_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "sp_vocab.json",
]


@pytest.mark.parametrize("name", MODEL_FILES)
def test_a_model_with_a_special_file_is_refused(name: str, kind: str, model_folder: Path) -> None:
    hides = {
        "model.safetensors.index.json": ["model.safetensors"],
        "vocab.json": ["tokenizer.json"],
        "merges.txt": ["tokenizer.json"],
        "added_tokens.json": ["tokenizer.json"],
        "sp_vocab.json": ["tokenizer.json"],
    }
    for hidden in hides.get(name, []):
        (model_folder / hidden).unlink()
    if name in ("merges.txt", "added_tokens.json"):
        (model_folder / "vocab.json").write_text('{"a": 0}')
    if name in ("vocab.json", "added_tokens.json"):
        (model_folder / "merges.txt").write_text("#version: 0.2\n")
    put(kind, model_folder / name)
    with pytest.raises(CheckpointError) as caught:
        read_model(model_folder)
    assert name in str(caught.value)


def test_a_chat_template_that_is_a_special_file_is_refused(kind: str, model_folder: Path) -> None:
    says = put(kind, model_folder / "chat_template.jinja")
    with pytest.raises(CheckpointError, match=says):
        read_chat_template(model_folder)


def test_a_shard_of_the_weights_that_is_a_special_file_is_refused(
    kind: str, model_folder: Path
) -> None:
    (model_folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    says = put(kind, model_folder / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=says):
        read_model(model_folder)
    with pytest.raises((CheckpointError, OSError)):
        weights_sha256(model_folder)


def test_a_trace_that_is_a_special_file_is_refused(kind: str, tmp_path: Path) -> None:
    says = put(kind, tmp_path / "t.jsonl")
    with pytest.raises(DataError, match=says):
        read_traces(tmp_path / "t.jsonl")


def test_a_dense_file_that_is_a_special_file_is_refused(kind: str, tmp_path: Path) -> None:
    says = put(kind, tmp_path / "rows")
    with pytest.raises(DataError, match=says):
        with_rows_of(small_trace(), tmp_path / "rows", AnalysisConfig(), n_kept=8)


def test_settings_in_a_special_file_are_refused(kind: str, tmp_path: Path) -> None:
    says = put(kind, tmp_path / "c.toml").replace("missing", "does not exist")
    with pytest.raises(ConfigError, match=says):
        read_toml(tmp_path / "c.toml")


def test_metrics_in_a_special_file_are_refused(kind: str, tmp_path: Path) -> None:
    put(kind, tmp_path / "metrics.jsonl")
    with pytest.raises((OSError, ResourceError)):
        MetricsLog(tmp_path / "metrics.jsonl", from_step=3)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl' cannot be read: "):
        read_curves(tmp_path)


@pytest.mark.parametrize("name", ["progress.json", "optimizer.safetensors"])
def test_a_training_state_in_a_special_file_is_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    data = data_of(text(400), tmp_path)
    trainer = trainer_of(config_of(max_steps=1), data, tmp_path / "run")
    list(trainer.run())
    latest = RunFolder(tmp_path / "run").latest()
    assert latest is not None
    put(kind, latest.folder / STATE_FOLDER / name)
    with pytest.raises(CheckpointError, match="cannot resume"):
        restore(trainer, latest.folder)
    if name == "progress.json":
        with pytest.raises(CheckpointError, match="cannot resume"):
            read_state(latest.folder)


@pytest.mark.parametrize("name", ["manifest.json", "vocabulary.json", "tokens-00000.bin"])
def test_a_prepared_corpus_with_a_special_file_is_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text(text(400))
    data = prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)), cache_dir=tmp_path / "cache")
    put(kind, data.folder / name)
    with pytest.raises(DataError, match="cannot be read"):
        open_prepared(data.folder)


def test_a_manifest_that_is_a_special_file_is_refused(kind: str, tmp_path: Path) -> None:
    put(kind, tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify(tmp_path)


def test_a_folder_of_text_is_read_without_its_special_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    os.mkfifo(tmp_path / "b.txt")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    [found] = find_files([str(tmp_path)], tmp_path / "cache", tmp_path, DataConfig())
    assert found.path == tmp_path / "a.txt"


@pytest.mark.integration
def test_generate_with_a_fifo_as_weights_fails_at_once_in_one_line(
    model_folder: Path, program: dict[str, str]
) -> None:
    put("FIFO", model_folder / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-m", "minigpt", "generate", "--model", model_folder, "a"],
        env=program,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (4, "")
    [line] = done.stderr.splitlines()
    assert "it is a FIFO" in line


@pytest.fixture
def other_user() -> Iterator[None]:
    """Run the test as a user who does not own the files."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_model_files_have_the_permissions_of_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_model(tmp_path / "model", small_model(vocab_size=257), BytesTokenizer())
        save_tensors(tmp_path / "again.safetensors", {"a": torch.zeros(2)})
        save_tensors(tmp_path / "again.safetensors", {"a": torch.zeros(3)})
    finally:
        os.umask(before)
    paths = [*(tmp_path / "model").iterdir(), tmp_path / "again.safetensors"]
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
    assert modes == dict.fromkeys(modes, oct(0o666 & ~mask))


def test_run_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    data = data_of(text(400), tmp_path)
    before = os.umask(0o027)
    try:
        run = RunFolder(tmp_path / "run")
        with run.lock():
            log = MetricsLog(run.path / "metrics.jsonl")
            for event in run_until(trainer_of(config_of(max_steps=2), data, run.path), 2):
                log.write(event)
    finally:
        os.umask(before)
    paths = [path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"]
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in paths}
    assert modes == dict.fromkeys(modes, "0o640")


UNREADABLE: dict[str, Callable[[Path], object]] = {
    "model/config.json": lambda top: read_model(top / "model"),
    "model/model.safetensors": lambda top: read_model(top / "model"),
    "model/tokenizer.json": lambda top: read_model(top / "model"),
    "model/tokenizer_config.json": lambda top: read_model(top / "model"),
    "model/generation_config.json": lambda top: read_model(top / "model"),
    "model/chat_template.jinja": lambda top: read_chat_template(top / "model"),
    "t.jsonl": lambda top: read_traces(top / "t.jsonl"),
    "c.toml": lambda top: read_toml(top / "c.toml"),
    "model": lambda top: read_model(top / "model"),
    "model/": lambda top: resolve_model(str(top / "model")),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_permission_denied_is_a_resource_error_that_names_the_file(
    name: str, model_folder: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (tmp_path / "t.jsonl").write_text(to_json_line(small_trace().header) + "\n")
    (tmp_path / "c.toml").write_text("")
    (model_folder / "chat_template.jinja").write_text("")
    (tmp_path / name).chmod(0)
    for folder in [p for p in (tmp_path, *tmp_path.parents) if "pytest-of-" in str(p)]:
        folder.chmod(folder.stat().st_mode | 0o055)
    request.getfixturevalue("other_user")
    with pytest.raises(ResourceError, match="Permission denied") as caught:
        UNREADABLE[name](tmp_path)
    assert name.strip("/").rpartition("/")[2] in str(caught.value)
    assert isinstance(caught.value, MinigptError)
    assert caught.value.exit_code == 6


def test_the_time_limit_of_these_tests_works() -> None:
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
