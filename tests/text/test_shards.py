"""Prepared corpora: exact tokens, atomic writes and bounded memory."""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from minigpt.checkpoint.tokenizer_json import tokenizer_from_json, tokenizer_to_json
from minigpt.config import DataConfig
from minigpt.errors import ConfigError, DataError, ResourceError
from minigpt.files import locked
from minigpt.text import building, corpus, prepared_folders, shard_files
from minigpt.text.batches import window_starts
from minigpt.text.building import Work
from minigpt.text.byte_pairs import TiktokenTokenizer, make_encoding
from minigpt.text.corpus import Corpus, PrepareProgress
from minigpt.text.shard_files import open_prepared, tokenizer_from_dict
from minigpt.text.tokenizer import Tokenizer
from minigpt.text.tokens import PreparedData, TokenSpan, prepare

Prepare = Callable[..., PreparedData]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Prepare:
    """Return a function that writes texts into the working folder and prepares them."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(
        *texts: str,
        tokenizer: str = "bytes",
        vocabulary: Tokenizer | None = None,
        on_progress: Callable[[PrepareProgress], None] | None = None,
    ) -> PreparedData:
        for i, text in enumerate(texts):
            Path(f"{i}.txt").write_bytes(text.encode())
        paths = tuple(f"{i}.txt" for i in range(len(texts)))
        config = DataConfig(paths=paths, tokenizer=tokenizer)
        return prepare(config, tmp_path / "cache", on_progress=on_progress, tokenizer=vocabulary)

    return run


def tokens_of(data: PreparedData) -> list[int]:
    whole = TokenSpan(data.tokens, 0, len(data.tokens), "whole")
    return whole.first_ids(len(whole))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("tokenizer", "dtype"), [("bytes", "<u2"), ("bpe:300", "<u2")])
def test_end_of_text_precedes_each_document(prepared: Prepare, tokenizer: str, dtype: str) -> None:
    texts = ["the owl\n" * 30, "né <|endoftext|> the nest"]
    data = prepared(*texts, tokenizer=tokenizer)
    end = data.tokenizer.end_of_text
    encode = data.tokenizer.encode
    assert tokens_of(data) == [end, *encode(texts[0]), end, *encode(texts[1])]
    manifest = data.manifest
    assert manifest.n_tokens == len(data.tokens) == len(tokens_of(data))
    assert manifest.n_bytes == sum(len(text.encode()) for text in texts)
    assert (manifest.n_documents, manifest.dtype) == (2, dtype)
    assert manifest.tokenizer == data.tokenizer.name == tokenizer
    assert manifest.tokenizer_fingerprint == data.tokenizer.fingerprint
    assert manifest.sources == ("0.txt", "1.txt")


SEQUENCE = {"id": "A", "type_id": 0}


def vocabulary(specials: dict[str, int], end_of_text_ids: tuple[int, ...] = ()) -> Tokenizer:
    """Return a byte vocabulary in reverse order, so that no shortcut for ``bytes`` applies."""
    ranks = {bytes([b]): 255 - b for b in range(256)}
    encoding = make_encoding("book", r"(?s:.)", ranks, specials)
    return TiktokenTokenizer("book", encoding, end_of_text_ids)


def imported(specials: dict[str, int], end_of_text_ids: tuple[int, ...] = ()) -> Tokenizer:
    """Return the same vocabulary as an imported one whose texts begin with <s>."""
    data = tokenizer_to_json(vocabulary(specials))
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": SEQUENCE}],
        "pair": [{"Sequence": SEQUENCE}, {"Sequence": SEQUENCE}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [specials["<s>"]], "tokens": ["<s>"]}},
    }
    return tokenizer_from_json(data, "book", end_of_text_ids=end_of_text_ids)


@pytest.mark.parametrize(
    ("tokenizer", "separator"),
    [
        (vocabulary({}), []),
        (vocabulary({"<|endoftext|>": 300}), [300]),
        (imported({"<s>": 256, "</s>": 257}, (257,)), [257, 256]),
        (imported({"<s>": 256}), [256]),
        (imported({"<s>": 256}, (256,)), [256]),
    ],
    ids=["neither", "end", "end and begin", "begin", "same for both"],
)
def test_a_given_vocabulary_is_used_and_its_special_tokens_separate_documents(
    prepared: Prepare, tokenizer: Tokenizer, separator: list[int]
) -> None:
    texts = ["the owl <s> <|endoftext|>\n", "né"]
    data = prepared(*texts, tokenizer="no spec", vocabulary=tokenizer)
    expected = [[255 - b for b in text.encode()] for text in texts]
    assert tokens_of(data) == [*separator, *expected[0], *separator, *expected[1]]
    assert data.tokenizer is tokenizer
    assert (data.manifest.n_documents, data.manifest.n_bytes) == (2, 29)


def test_different_vocabularies_of_one_name_do_not_share_a_preparation(prepared: Prepare) -> None:
    one, other = vocabulary({}), vocabulary({"<|endoftext|>": 256})
    ours = prepared("a text", tokenizer="book", vocabulary=one)
    assert prepared("a text", tokenizer="book", vocabulary=other).folder != ours.folder
    renamed = TiktokenTokenizer("novel", one.encoding)
    again = prepared("a text", tokenizer="novel", vocabulary=renamed)
    assert (again.folder, again.tokenizer.name) == (ours.folder, "novel")
    assert again.tokens.fingerprint == ours.tokens.fingerprint


def test_tokens_of_pieces_equal_tokens_of_the_whole_document(
    prepared: Prepare, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SentencePiece adds a space before a text, but not before its later pieces."""
    from minigpt.checkpoint.model_folder import read_model

    tokenizer = read_model(shared / "weights/stories260K").tokenizer
    assert tokenizer is not None
    text = (shared / "data/tinyshakespeare.txt").read_text()[:20_000]
    monkeypatch.setattr(corpus, "PIECE_CHARS", 1000)
    monkeypatch.setattr(corpus, "LOOKAHEAD_CHARS", 500)
    data = prepared(text, tokenizer="stories", vocabulary=tokenizer)
    assert tokens_of(data) == [*tokenizer.separator, *tokenizer.encode(text)]


@pytest.mark.integration
def test_tokens_of_large_vocabularies_are_stored_in_four_bytes(
    prepared: Prepare, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared / "tiktoken"))
    data = prepared("hello world", tokenizer="cl100k_base")
    assert data.manifest.dtype == "<u4"
    assert tokens_of(data) == [100257, 15339, 1917]  # tiktoken's cookbook


def test_shakespeare_is_split_as_in_nanogpt(shared: Path, tmp_path: Path) -> None:
    path = shared / "data" / "tinyshakespeare.txt"
    text = path.read_bytes()
    data = prepare(DataConfig(paths=(str(path),)), tmp_path)
    assert len(data.tokens) == 1_115_395
    train, val = data.tokens.split(0.1)
    # nanoGPT: data[:int(n * 0.9)] trains, data[int(n * 0.9):] validates.
    border = int(len(text) * 0.9)
    assert bytes(val.first_ids(len(val))) == text[border:]
    assert bytes(train.windows(np.array([1]), len(train) - 1)[0].tolist()) == text[:border]


def test_windows_may_span_shards(prepared: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "MAX_SHARD_TOKENS", 10)
    text = "".join(chr(33 + i % 90) for i in range(203))
    data = prepared(text)
    assert [shard.n_tokens for shard in data.manifest.shards] == [10] * 20 + [4]
    whole = np.array([256, *text.encode()])
    span = TokenSpan(data.tokens, 7, 200, "middle")
    starts = np.array([0, 2, 3, 4, 158, 90])
    windows = span.windows(starts, 35)
    assert windows.dtype == np.int64
    assert windows.tolist() == [whole[7 + start : 42 + start].tolist() for start in starts]
    with pytest.raises(AssertionError):
        span.windows(np.array([159]), 35)


def test_a_corpus_is_prepared_once(prepared: Prepare, tmp_path: Path) -> None:
    first = prepared("a text", tokenizer="bpe:300")
    before = {path: path.stat().st_mtime_ns for path in first.folder.iterdir()}
    stages: list[PrepareProgress] = []
    again = prepared("a text", tokenizer="bpe:300", on_progress=stages.append)
    assert again.folder == first.folder
    assert again.tokens.fingerprint == first.tokens.fingerprint
    assert {path: path.stat().st_mtime_ns for path in first.folder.iterdir()} == before
    assert stages == []
    assert tokens_of(open_prepared(first.folder)) == tokens_of(first)


def test_tokens_of_a_text_that_changes_while_it_is_read_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("first " * 100)
    data = DataConfig(paths=(str(path),))
    begin = building.begin

    def change(folder: Path, corpus: Corpus) -> Tokenizer:
        path.write_text("second " * 100)
        return begin(folder, corpus)

    with monkeypatch.context() as patch:
        patch.setattr(building, "begin", change)
        with pytest.raises(DataError, match=r"a\.txt' changed while it was read\. Wait"):
            prepare(data, tmp_path / "cache")
    path.write_text("first " * 100)
    again = prepare(data, tmp_path / "cache")
    assert again.tokenizer.decode(again.tokens.split(0.0)[0].first_ids(6)).endswith("first")


def test_ranks_that_start_together_share_one_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a text " * 1000)
    data = DataConfig(paths=(str(tmp_path / "a.txt"),))
    built: list[Path] = []
    build = prepared_folders.build_resumable

    def counted(folder: Path, *rest: object) -> Work:
        built.append(folder)
        return build(folder, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(prepared_folders, "build_resumable", counted)
    with ThreadPoolExecutor(4) as ranks:
        made = list(ranks.map(lambda _: prepare(data, tmp_path / "cache"), range(4)))
    assert len(built) == 1
    assert len({prepared.tokens.fingerprint for prepared in made}) == 1


def test_another_text_or_tokenizer_gets_its_own_cache_folder(prepared: Prepare) -> None:
    made = [
        prepared("one"),
        prepared("two"),
        prepared("o", "ne"),
        prepared("one", tokenizer="bpe:300"),
    ]
    assert len({data.folder for data in made}) == 4
    assert len({data.tokens.fingerprint for data in made}) == 4


@pytest.mark.parametrize("name", ["manifest.json", "vocabulary.json", "tokens-00000.bin"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_a_damaged_cache_is_prepared_again(prepared: Prepare, name: str, damage: str) -> None:
    data = prepared("a text to damage", tokenizer="bpe:300")
    expected = tokens_of(data)
    path = data.folder / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        kept = {"cut": len(content) // 2, "empty": 0, "flipped": len(content)}[damage]
        path.write_bytes(content[:kept])
        os.utime(path, (1, 1))  # some file systems have coarse time stamps
    if damage != "flipped" or name != "manifest.json":
        with pytest.raises(DataError, match="prepared corpus"):
            open_prepared(data.folder)
    assert tokens_of(prepared("a text to damage", tokenizer="bpe:300")) == expected


def test_a_copied_cache_is_checked_by_its_hashes(prepared: Prepare, tmp_path: Path) -> None:
    data = prepared("a text to copy")
    copy = shutil.copytree(data.folder, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(copy / "tokens-00000.bin", (0, 0))
    assert tokens_of(open_prepared(copy)) == tokens_of(data)


@pytest.mark.integration
def test_killed_preparation_leaves_no_usable_files(tmp_path: Path) -> None:
    corpus = tmp_path / "a.txt"
    corpus.write_text("the owl and the nest\n" * 150_000)
    code = """
import os, signal, sys, pathlib
from minigpt.config import DataConfig
from minigpt.text.tokens import prepare
def kill(progress):
    if progress.stage == "encode":
        os.kill(os.getpid(), signal.SIGKILL)
prepare(DataConfig(paths=(sys.argv[1],)), pathlib.Path(sys.argv[2]), on_progress=kill)
"""
    cache = tmp_path / "cache"
    killed = subprocess.run([sys.executable, "-c", code, str(corpus), str(cache)])
    assert killed.returncode == -signal.SIGKILL
    assert "tokens-00000.bin" in files(cache)
    assert "manifest.json" not in files(cache)
    data = prepare(DataConfig(paths=(str(corpus),)), cache)
    assert len(data.tokens) == corpus.stat().st_size + 1
    assert not list(cache.rglob(".writing-*"))


def test_full_disk_is_a_resource_error_and_leaves_no_files(
    prepared: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResourceError, match=r"No space left on device.*MINIGPT_CACHE_DIR"):
            prepared("a text")
    assert [name for name in files(tmp_path / "cache") if not name.endswith(".lock")] == []
    assert len(prepared("a text").tokens) == 7


def test_cache_that_is_not_a_folder_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ResourceError, match=r"Not a directory.*MINIGPT_CACHE_DIR"):
        prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)), tmp_path / "file")


def test_misspelled_tokenizer_fails_before_the_corpus_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean gpt2"):
        prepare(DataConfig(paths=("/nowhere",), tokenizer="gpt3"), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_an_empty_corpus_leaves_no_cache(prepared: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the corpus is empty"):
        prepared("")
    assert [name for name in files(tmp_path / "cache") if not name.endswith(".lock")] == []


def test_standard_input_is_prepared_and_its_temporary_copy_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped text")))
        data = prepare(DataConfig(paths=("-",)), tmp_path)
        assert bytes(tokens_of(data)[1:]) == b"piped text"
    assert [name for name in files(tmp_path) if name.startswith("stream")] == []
    assert len(list((tmp_path / "prepared").glob("*/manifest.json"))) == 1


def test_copies_of_streams_that_killed_processes_left_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a text")
    left, used, new = (tmp_path / f"streams-{name}" for name in ("left", "used", "new"))
    for folder in (left, used, new):
        folder.mkdir()
        (folder / "stream-0").write_text("a copy")
    for folder in (left, used):
        os.utime(folder, (0, 0))
    with locked(used / ".lock"):
        os.utime(used, (0, 0))
        prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)), tmp_path)
    assert {path.name for path in tmp_path.glob("streams-*")} == {used.name, new.name}


@pytest.mark.integration
def test_progress_ends_with_all_bytes_in_every_stage(prepared: Prepare) -> None:
    seen: list[PrepareProgress] = []
    texts = ["the owl\n" * 200_000, "the nest\n" * 200_000]
    prepared(*texts, tokenizer="bpe:300", on_progress=seen.append)
    total = sum(map(len, texts))
    for stage in ("train tokenizer", "encode"):
        done = [progress.done for progress in seen if progress.stage == stage]
        assert len(done) >= 2
        assert done == sorted(set(done))
        assert done[-1] == total
    assert {progress.total for progress in seen} == {total}


def test_the_cache_contains_only_json_and_token_files(prepared: Prepare) -> None:
    data = prepared("a text", tokenizer="bpe:300")
    json.loads((data.folder / "manifest.json").read_text())
    vocabulary = json.loads((data.folder / "vocabulary.json").read_text())
    assert tokenizer_from_dict(vocabulary).fingerprint == data.tokenizer.fingerprint
    assert files(data.folder) == ["manifest.json", "tokens-00000.bin", "vocabulary.json"]


@pytest.mark.integration
def test_preparing_and_reading_use_bounded_memory(prepared: Prepare) -> None:
    text = "the owl and the nest and the tree\n" * 700_000  # 24 MB, 48 MB as tokens
    Path("0.txt").write_text(text)
    n_bytes = len(text)
    del text
    tracemalloc.start()
    data = prepare(DataConfig(paths=("0.txt",)), Path("cache"), n_workers=2)
    train, _ = data.tokens.split(0.1)
    for step in range(20):
        train.windows(window_starts(len(train), 256, 64, seed=1, step=step), 257)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data.tokens) == n_bytes + 1
    assert peak < 32 * 2**20  # half the size of the tokens


@pytest.mark.slow
@pytest.mark.parametrize(("tokenizer", "limit_mib"), [("bytes", 100), ("bpe:1024", 400)])
def test_a_corpus_of_128_mb_is_prepared_and_read_in_bounded_memory(
    tmp_path: Path, tokenizer: str, limit_mib: int
) -> None:
    """The limit for BPE includes its training text, which is bounded, too."""
    corpus = tmp_path / "a.txt"
    with corpus.open("w") as file:
        for i in range(128):
            file.write(f"chapter {i}: the owl and the nest and the tree\n" * (2**20 // 46))
    code = """
import resource, sys, pathlib, numpy as np
from minigpt.config import DataConfig
from minigpt.text.batches import window_starts
from minigpt.text.tokens import prepare
def anonymous_mib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
config = DataConfig(paths=(sys.argv[1],), tokenizer=sys.argv[3])
data = prepare(config, pathlib.Path(sys.argv[2]), n_workers=2)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
reading = anonymous_mib()
train, _ = data.tokens.split(0.1)
for step in range(1000):
    train.windows(window_starts(len(train), 256, 64, seed=1, step=step), 257)
print(len(data.tokens), peak, anonymous_mib() - reading)
"""
    command = [sys.executable, "-c", code, str(corpus), str(tmp_path / "cache"), tokenizer]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    n_tokens, peak_mib, reading_mib = map(float, result.stdout.split())
    assert n_tokens > 2_000_000
    assert peak_mib < limit_mib
    assert reading_mib < 10
