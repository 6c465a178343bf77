"""Named corpora: downloads, their failures, and the built-in corpora."""

import ast
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minigpt.errors import DataError, ResourceError
from minigpt.places import cache_folder
from minigpt.text import datasets
from minigpt.text.datasets import DOWNLOADS, Download, dataset_path

BODY = bytes(range(256)) * 1000


class Responder(BaseHTTPRequestHandler):
    """Responds as the path says: /good, /truncated, /wrong, /endless, /missing, /silent."""

    requests: list[str]

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path == "/missing":
            self.send_error(404)
            return
        if self.path == "/silent":
            threading.Event().wait(0.4)
            return
        self.send_response(200)
        if self.path in ("/good", "/truncated"):
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        body = {"/truncated": BODY[:1000], "/wrong": BODY[::-1], "/endless": BODY * 40}
        try:
            self.wfile.write(body.get(self.path, BODY))
        except ConnectionError:
            self.requests.append("hung up")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Start a local server that no proxy hides, and yield its address."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Responder, "requests", [], raising=False)
    monkeypatch.setattr(
        ThreadingHTTPServer, "daemon_threads", False
    )  # shutdown waits for the threads
    with ThreadingHTTPServer(("127.0.0.1", 0), Responder) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


@pytest.fixture
def register_sample(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Return a function that registers a corpus named "sample" at an address."""

    def add(url: str) -> None:
        sha256 = hashlib.sha256(BODY).hexdigest()
        monkeypatch.setitem(DOWNLOADS, "sample", Download(url, len(BODY), sha256))

    return add


def test_download_is_verified_and_cached(server: str, register_sample, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    register_sample(f"{server}/good")
    progress: list[tuple[int, int]] = []
    path = dataset_path("sample", tmp_path, lambda *n: progress.append(n))
    assert path.read_bytes() == BODY
    assert progress[-1] == (len(BODY), len(BODY))
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    assert dataset_path("sample", tmp_path) == path
    assert Responder.requests == ["/good"]
    assert list(path.parent.iterdir()) == [path]


def test_a_damaged_cached_download_is_fetched_again(
    server: str, register_sample, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    register_sample(f"{server}/good")
    path = dataset_path("sample", tmp_path)
    path.write_bytes(BODY[::-1])
    assert dataset_path("sample", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("truncated", "1000 of 256000 bytes arrived"),
        ("wrong", "its SHA-256 is not the expected one"),
        ("endless", "of 256000 bytes arrived"),
        ("missing", "the server answered 404"),
        ("silent", "timed out"),
    ],
)
def test_a_failed_download_reports_its_cause_and_leaves_no_file(
    server: str,
    register_sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    page: str,
    reason: str,  # type: ignore[no-untyped-def]
) -> None:
    monkeypatch.setattr(datasets, "TIMEOUT_S", 0.2)
    register_sample(f"{server}/{page}")
    with pytest.raises(DataError) as caught:
        dataset_path("sample", tmp_path)
    message = str(caught.value)
    assert reason in message
    assert f"could not download sample from {server}/{page}" in message
    assert "pass its path" in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_download_stops_after_the_expected_size(
    server: str, register_sample, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    register_sample(f"{server}/endless")
    done = []
    with pytest.raises(DataError):
        dataset_path("sample", tmp_path, lambda n, _: done.append(n))
    assert max(done) <= len(BODY) + datasets.BLOCK_BYTES


def test_no_network_is_a_data_error(
    register_sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    register_sample(f"http://127.0.0.1:{port}/")
    with pytest.raises(DataError, match="Connection refused"):
        dataset_path("sample", tmp_path)


def test_a_cache_that_cannot_be_written_is_a_resource_error(
    server: str, register_sample, tmp_path: Path
) -> None:  # type: ignore[no-untyped-def]
    register_sample(f"{server}/good")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="MINIGPT_CACHE_DIR"):
        dataset_path("sample", tmp_path / "file")


def test_an_unknown_corpus_is_refused_with_the_known_names(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Choose from builtin:tales, .*, shakespeare\."):
        dataset_path("shakspeare", tmp_path)


def test_the_shakespeare_corpus_equals_the_file_of_nanogpt(shared: Path) -> None:
    data = (shared / "data" / "tinyshakespeare.txt").read_bytes()
    wanted = DOWNLOADS["shakespeare"]
    assert wanted.size == len(data)
    assert wanted.sha256 == hashlib.sha256(data).hexdigest()


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINIGPT_CACHE_DIR", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.setenv("MINIGPT_CACHE_DIR", "")
    assert cache_folder().name == "minigpt"


@pytest.mark.integration
def test_the_python_corpus_is_a_megabyte_of_sentences(tmp_path: Path) -> None:
    path = dataset_path("builtin:python", tmp_path)
    prose = "\n".join(json.loads(line)["text"] for line in path.read_bytes().splitlines())
    assert 700_000 < len(prose) < 3_000_000
    assert sum(c.isalpha() or c.isspace() for c in prose) > 0.94 * len(prose)
    assert "Assert statements are a convenient way to insert debugging assertions" in prose
    assert "Utility functions for copying and archiving files and directory trees." in prose
    path.write_bytes(b"made before")
    assert dataset_path("builtin:python", tmp_path).read_bytes() == b"made before"


@pytest.mark.slow
def test_the_python_corpus_does_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    code = "import sys, pathlib, minigpt.text.datasets as d\n"
    code += "d.dataset_path('builtin:python', pathlib.Path(sys.argv[1]))"
    made = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(tmp_path / seed)]
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run(command, env=environment, check=True)
        made.append(next((tmp_path / seed).iterdir()).read_bytes())
    assert made[0] == made[1]


def test_building_the_python_corpus_imports_no_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "antigravity.py").write_text('"""Up."""\nraise SystemExit("imported")\n')
    monkeypatch.setattr(datasets.sysconfig, "get_path", lambda name: str(tmp_path))
    assert list(datasets._library_docstrings()) == ["Up."]


def test_docstrings_are_in_source_order() -> None:
    source = '"""a"""\nclass A:\n """b"""\n async def f(): "c"\nif 1:\n def h(): "no"\ndef g(): "d"'
    assert list(datasets._docstrings(ast.parse(source))) == ["a", "b", "c", "d"]
