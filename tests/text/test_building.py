"""Prepared folders have the same bytes for any number of workers and after any interruption."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from minigpt import files
from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError, LockedError, ResourceError
from minigpt.text import bpe, building, byte_pairs, corpus, prepared_folders, shard_files
from minigpt.text.bpe import train_bpe
from minigpt.text.building import Encoded, Work
from minigpt.text.byte_pairs import TiktokenTokenizer
from minigpt.text.corpus import Document, PrepareProgress
from minigpt.text.prepared_folders import prepare_folder
from minigpt.text.tokens import PreparedData, TokenSpan, prepare

Prepare = Callable[..., tuple[PreparedData, Work]]

WORDS = ["the owl ", "a nest, ", "né ", "世界 ", "tree\n", "<|endoftext|> ", "42 ", "'s been\n\n"]


class Killed(BaseException):
    """Ends a preparation like SIGKILL: no cleanup runs."""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Return documents of 1 to 2,000 words."""
    draw = random.Random(5)
    lengths = [draw.choice([1, 3, 20, 100]) for _ in range(120)] + [2000, 1, 700]
    return ["".join(draw.choices(WORDS, k=length)) for length in lengths]


@pytest.fixture
def data(texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Return a config for the documents in two files, with small pieces, chunks and shards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "PIECE_CHARS", 900)
    monkeypatch.setattr(corpus, "LOOKAHEAD_CHARS", 400)
    monkeypatch.setattr(building, "CHUNK_CHARS", 1000)
    monkeypatch.setattr(shard_files, "MAX_SHARD_TOKENS", 1500)
    monkeypatch.setattr(corpus, "PROGRESS_BYTES", 1)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    Path("a.jsonl").write_text("".join(lines[:60]))
    Path("b.jsonl").write_text("".join(lines[60:]))
    return DataConfig(paths=("a.jsonl", "b.jsonl"), tokenizer="bpe:300")


@pytest.fixture
def prepared(data: DataConfig, tmp_path: Path) -> Prepare:
    """Return a function that prepares the documents in a folder."""

    def run(out: str = "out", **changes: object) -> tuple[PreparedData, Work]:
        return prepare_folder(data, tmp_path / out, tmp_path / "cache", **changes)  # type: ignore[arg-type]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except the lock, without the times in the manifest."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    if "manifest.json" in files:
        manifest = json.loads(files["manifest.json"])
        for shard in manifest["shards"]:
            del shard["mtime_ns"]
        files["manifest.json"] = json.dumps(manifest).encode()
    return files


def tokens_of(data: PreparedData) -> list[int]:
    whole = TokenSpan(data.tokens, 0, len(data.tokens), "whole")
    return whole.first_ids(len(whole))


@pytest.mark.integration
def test_tokens_equal_a_plain_loop_for_any_number_of_workers(
    prepared: Prepare, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, draw = building._encode, random.Random(1)

    def encode_with_delay(chunk: list[Document], **about: Any) -> Encoded:
        time.sleep(draw.random() / 500)  # so that later chunks often finish first
        return encode(chunk, **about)

    monkeypatch.setattr(building, "_encode", encode_with_delay)
    made = [prepared(f"out-{n}", n_workers=n)[0] for n in (1, 2, 7)]
    tokenizer = made[0].tokenizer
    expected: list[int] = []
    for text in texts:
        expected += [tokenizer.end_of_text, *tokenizer.encoding.encode_ordinary(text)]
    assert [tokens_of(data) == expected for data in made] == [True] * 3
    assert len({data.tokens.fingerprint for data in made}) == 1
    assert contents(made[0].folder) == contents(made[1].folder) == contents(made[2].folder)
    manifest = made[0].manifest
    assert len(manifest.shards) > 5
    assert manifest.n_bytes == sum(len(text.encode()) for text in texts)
    assert (manifest.n_documents, manifest.n_tokens) == (len(texts), len(expected))


@pytest.mark.integration
@pytest.mark.parametrize("val_fraction", [0.1, 0.7])
def test_no_merge_is_learned_from_validation_text(
    val_fraction: float, data: DataConfig, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(data, val_fraction=val_fraction, val_split="tail")
    n_left = int((1 - val_fraction) * sum(len(text.encode()) for text in texts))
    first = []
    for text in texts:
        first.append(text.encode()[:n_left].decode(errors="ignore"))
        n_left = max(0, n_left - len(text.encode()))
    made = prepare(config).tokenizer
    assert made.fingerprint == train_bpe(first, 300).fingerprint
    assert made.fingerprint != train_bpe(texts, 300).fingerprint
    # Only the beginning of a long corpus is read.
    monkeypatch.setattr(bpe, "BPE_TRAINING_BYTES", 1000)
    made = prepare(config, cache_dir=Path("another")).tokenizer
    assert made.fingerprint == train_bpe(texts, 300).fingerprint


def test_prepared_folder_equals_prepared_cache(
    prepared: Prepare, data: DataConfig, tmp_path: Path
) -> None:
    in_folder, work = prepared()
    in_cache = prepare(data, tmp_path / "cache")
    assert in_folder.tokens.fingerprint == in_cache.tokens.fingerprint
    assert work.n_bytes == in_folder.manifest.n_bytes
    opened = prepare(DataConfig(paths=(str(tmp_path / "out"),), tokenizer="bpe:300"))
    assert opened.tokens.fingerprint == in_cache.tokens.fingerprint
    assert opened.folder == tmp_path / "out"


def kill_at_sync(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End the process at its n-th fsync, which covers every point between two files."""
    sync, calls = os.fsync, []

    def sync_or_die(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == number:
            raise Killed
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_or_die)
    monkeypatch.setattr(files, "sync_folder", lambda folder: None)
    monkeypatch.setattr(prepared_folders, "tidy", lambda folder: None)


@pytest.mark.integration
def test_preparation_killed_at_any_fsync_resumes_with_the_same_bytes(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = prepared("whole")
    n_shards = len(whole.manifest.shards)
    n_encoded = []
    for number in range(1, 2 * n_shards + 4):  # vocabulary, record, two per shard, manifest
        out = f"out-{number}"
        with monkeypatch.context() as patch:
            kill_at_sync(number, patch)
            with pytest.raises(Killed):
                prepared(out)
        begun = {path.name: path.stat() for path in Path(out).iterdir()}
        again, work = prepared(out)
        assert contents(again.folder) == contents(whole.folder)
        n_kept = max((number - 3) // 2, 0)
        for name in [shard.name for shard in whole.manifest.shards[:n_kept]]:
            now = (again.folder / name).stat()
            assert (now.st_ino, now.st_mtime_ns) == (begun[name].st_ino, begun[name].st_mtime_ns)
        n_encoded.append(work.n_bytes)
    assert n_encoded[0] == whole.manifest.n_bytes
    assert n_encoded == sorted(n_encoded, reverse=True)
    assert len(set(n_encoded)) > n_shards - 2
    assert prepared("whole")[1] == Work(0, 0.0)


@pytest.mark.integration
def test_preparation_of_a_killed_process_is_resumed_by_another(
    prepared: Prepare, tmp_path: Path
) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from minigpt.config import DataConfig
from minigpt.text import building, corpus, shard_files
from minigpt.text.prepared_folders import prepare_folder
corpus.PIECE_CHARS, corpus.LOOKAHEAD_CHARS, building.CHUNK_CHARS = 900, 400, 1000
shard_files.MAX_SHARD_TOKENS, corpus.PROGRESS_BYTES = 1500, 1
def kill(progress):
    if progress.stage == "encode" and progress.done > progress.total / 2:
        os.kill(os.getpid(), signal.SIGKILL)
data = DataConfig(paths=("a.jsonl", "b.jsonl"), tokenizer="bpe:300")
prepare_folder(data, Path("out"), Path("cache"), kill, n_workers=3)
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "out/unfinished.json").exists()
    again, work = prepared("out", n_workers=1)
    assert 0 < work.n_bytes < 0.7 * again.manifest.n_bytes
    assert contents(again.folder) == contents(prepared("whole")[0].folder)


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing"])
def test_resumed_preparation_keeps_only_intact_shards(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    whole, _ = prepared("whole")
    with monkeypatch.context() as patch:
        kill_at_sync(11, patch)  # four shards are recorded
        with pytest.raises(Killed):
            prepared()
    paths = sorted(Path("out").glob("tokens-*.bin"))
    times = [path.stat().st_mtime_ns for path in paths]
    content = bytearray(paths[2].read_bytes())
    content[9] ^= 1
    if damage == "missing":
        paths[2].unlink()
    else:
        paths[2].write_bytes(content[:-2] if damage == "cut" else content)
        os.utime(paths[2], (1, 1))
    again, _ = prepared()
    assert contents(again.folder) == contents(whole.folder)
    now = [path.stat().st_mtime_ns for path in paths]
    assert [before == after for before, after in zip(times[:4], now, strict=False)] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.integration
def test_an_interrupted_preparation_with_another_vocabulary_starts_over(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = prepared("whole")
    with monkeypatch.context() as patch:
        kill_at_sync(9, patch)
        with pytest.raises(Killed):
            prepared()
    other = train_bpe(["zebra " * 99], 280)
    Path("out/vocabulary.json").write_text(json.dumps(other.to_dict()))
    again, work = prepared()
    assert work.n_bytes == whole.manifest.n_bytes
    assert contents(again.folder) == contents(whole.folder)


@pytest.mark.integration
def test_a_failed_preparation_leaves_only_complete_shards(
    prepared: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def interrupt(progress: PrepareProgress) -> None:
        if progress.stage == "encode" and progress.done > progress.total / 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"'.*out'.*No space left on device.*another --out"):
            prepared()
    assert contents(Path("out")) == {}
    with pytest.raises(KeyboardInterrupt):
        prepared(on_progress=interrupt)
    left = contents(Path("out"))
    record = json.loads(left["unfinished.json"])
    assert len(record["shards"]) >= 3
    names = {shard["name"] for shard in record["shards"]}
    assert left.keys() == names | {"unfinished.json", "vocabulary.json"}
    again, work = prepared()
    assert 0 < work.n_bytes < 0.7 * again.manifest.n_bytes
    assert contents(again.folder) == contents(prepared("whole")[0].folder)


def test_a_killed_preparation_in_the_cache_is_resumed(
    data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepare(data, tmp_path / "other")
    built: list[Work] = []
    build = prepared_folders.build_resumable

    def watched(*words: object) -> Work:
        built.append(build(*words))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(prepared_folders, "build_resumable", watched)
    with monkeypatch.context() as patch:
        kill_at_sync(11, patch)
        patch.setattr(prepared_folders.shutil, "rmtree", lambda *words, **more: None)
        with pytest.raises(Killed):
            prepare(data, tmp_path / "cache")
    assert prepare(data, tmp_path / "cache").tokens.fingerprint == whole.tokens.fingerprint
    assert 0 < built[0].n_bytes < whole.manifest.n_bytes
    assert not list((tmp_path / "cache").rglob(".writing-*"))


def test_a_folder_with_other_contents_is_refused_and_left_unchanged(
    prepared: Prepare, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, **changes: object) -> None:
        before = contents(tmp_path / "out")
        with pytest.raises(ConfigError, match=message):
            prepared(**changes)
        assert contents(tmp_path / "out") == before

    (tmp_path / "out").mkdir()
    (tmp_path / "out/diary.txt").write_text("dear diary")
    refused(r"contains 'diary\.txt'.*empty or new folder")
    (tmp_path / "out/diary.txt").unlink()
    with monkeypatch.context() as patch:
        kill_at_sync(11, patch)
        with pytest.raises(Killed):
            prepared()
    bpe = train_bpe(["the owl " * 99], 280)
    refused("tokens of another text, tokenizer or validation split", tokenizer=bpe)
    prepared()
    refused("tokens of another text, tokenizer or validation split", tokenizer=bpe)
    Path("a.jsonl").write_text('{"text": "another text"}\n')
    refused("tokens of another text, tokenizer or validation split")


def test_a_folder_being_prepared_by_another_process_is_refused(
    prepared: Prepare, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    with (
        FileLock(tmp_path / "out/.lock"),
        pytest.raises(LockedError, match="another process is preparing"),
    ):
        prepared()


def test_reused_tokens_are_returned_with_the_given_tokenizer(data: DataConfig) -> None:
    first = train_bpe(["the owl, the nest"], 260)
    again = byte_pairs.from_dict(first.to_dict() | {"name": "other"})
    assert (again.fingerprint, again.name) == (first.fingerprint, "other")
    made = prepare(data, tokenizer=first)
    kept = prepare(data, tokenizer=again)
    assert kept.tokens.fingerprint == made.tokens.fingerprint
    assert (kept.tokenizer.name, kept.manifest.tokenizer) == ("other", "other")
    assert made.manifest.tokenizer == first.name


def test_a_prepared_folder_must_be_complete_and_match_the_tokenizer(
    prepared: Prepare, data: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at_sync(11, patch)
        with pytest.raises(Killed):
            prepared()
    out = str(tmp_path / "out")
    with pytest.raises(DataError, match="is unfinished"):
        prepare(DataConfig(paths=(out,)))
    made, _ = prepared()
    settings = {"tokenizer": "bpe:300", "val_split": "documents", "val_fraction": 0.1}
    assert prepared_folders.prepared_settings(DataConfig(paths=(out,))) == settings
    assert prepared_folders.prepared_settings(DataConfig(paths=("a.jsonl",))) == {}
    with pytest.raises(DataError, match="cannot be combined"):
        prepare(DataConfig(paths=("a.jsonl", out)))
    with pytest.raises(ConfigError, match=r"with the tokenizer 'bpe:300', not 'bytes'\. Leave"):
        prepare(DataConfig(paths=(out,), tokenizer="bytes"))
    other = train_bpe(["zebra " * 99], 280)
    with pytest.raises(ConfigError, match="not with the model's"):
        prepare(DataConfig(paths=(out,)), tokenizer=other)
    renamed = TiktokenTokenizer("model's", made.tokenizer.encoding)
    assert prepare(DataConfig(paths=(out,)), tokenizer=renamed).tokenizer is renamed
    with pytest.raises(DataError, match="is already prepared"):
        prepare_folder(DataConfig(paths=(out,)), tmp_path / "again", tmp_path / "cache")


def test_a_damaged_prepared_folder_is_an_error_and_is_not_rebuilt(
    prepared: Prepare, tmp_path: Path
) -> None:
    prepared()
    path = tmp_path / "out/tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="is damaged"):
        prepared()
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["shards"][0]["name"] = "tokens-/../../a.jsonl"
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"it names the file 'tokens-/\.\./\.\./a\.jsonl'"):
        prepare(DataConfig(paths=(str(tmp_path / "out"),), tokenizer="bpe:300"))
    (tmp_path / "out/manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read \(JSON.*Delete that folder"):
        prepared()
