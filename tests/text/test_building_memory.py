"""Memory used while preparing folders."""

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from minigpt.config import DataConfig
from minigpt.text.prepared_folders import prepare_folder


@pytest.mark.integration
def test_memory_of_many_workers_on_a_long_jsonl_is_bounded(tmp_path: Path) -> None:
    """Prepare 32 MB of documents of 8 kB each, 64 MB as tokens."""
    line = json.dumps({"text": "the owl and the nest and the tree\n" * 240}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 4000)
    data = DataConfig(paths=(str(tmp_path / "a.jsonl"),))
    tracemalloc.start()
    prepared, _ = prepare_folder(data, tmp_path / "out", tmp_path / "cache", n_workers=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert prepared.manifest.n_bytes > 32e6
    assert peak < 40e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory from /proc")
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:512"])
def test_a_jsonl_of_256_mb_takes_less_than_500_mb_of_memory(tmp_path: Path, tokenizer: str) -> None:
    """Limit the memory of the whole process, including imports; BPE holds its training text."""
    with (tmp_path / "a.jsonl").open("w") as file:
        for number in range(33_000):
            text = f"chapter {number}: the owl and the nest and the tree\n" * 160
            file.write(json.dumps({"text": text}) + "\n")
    code = """
import re, sys
from pathlib import Path
from minigpt.config import DataConfig
from minigpt.text.prepared_folders import prepare_folder
data = DataConfig(paths=("a.jsonl",), tokenizer=sys.argv[1])
prepared, _ = prepare_folder(data, Path("out"), Path("cache"), n_workers=4)
# Not getrusage, whose peak may be that of the process that started this one.
peak = re.search("VmHWM: *([0-9]+)", Path("/proc/self/status").read_text().replace("\\t", " "))
print(prepared.manifest.n_bytes, int(peak[1]) / 1024)
"""
    command = [sys.executable, "-c", code, tokenizer]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    n_bytes, peak_mib = map(float, done.stdout.split())
    assert n_bytes > 256e6
    assert peak_mib < 500
