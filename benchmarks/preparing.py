"""Tokenization throughput, from files to shards on disk, compared with tiktoken in memory.

    python benchmarks/preparing.py ../shared/data/fairytales.txt
    TIKTOKEN_CACHE_DIR=../shared/tiktoken python benchmarks/preparing.py \\
        ../shared/data/novels.jsonl.xz --tokenizer gpt2 bpe:1024

Both use the same number of threads and the same pieces of text, and alternate; the table shows the
best of each. minigpt reads and unpacks the files, encodes, hashes and writes the shards; tiktoken's
``encode_ordinary_batch`` only encodes text in memory. Training a BPE and hashing the corpus to find
an earlier result are not included.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minigpt.config import DataConfig
from minigpt.text.building import default_workers
from minigpt.text.corpus import iter_documents
from minigpt.text.prepared_folders import prepare_folder
from minigpt.text.sources import find_files
from minigpt.text.tokenizer import Tokenizer, make_tokenizer


def ours(data: DataConfig, tokenizer: Tokenizer, n_workers: int) -> tuple[float, int]:
    """Prepare the text once; return MB/s and the number of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        prepared, work = prepare_folder(
            data, Path(folder, "out"), Path(folder), tokenizer=tokenizer, n_workers=n_workers
        )
        return work.n_bytes / 1e6 / work.seconds, prepared.manifest.n_tokens


def tiktokens(pieces: list[str], tokenizer: Tokenizer, n_threads: int) -> tuple[float, int]:
    """Encode the pieces once; return MB/s and the number of tokens."""
    started = time.perf_counter()
    ids = tokenizer.encoding.encode_ordinary_batch(pieces, num_threads=n_threads)
    seconds = time.perf_counter() - started
    return sum(len(piece.encode()) for piece in pieces) / 1e6 / seconds, sum(map(len, ids))


def measure(data: DataConfig, spec: str, n_workers: int, repeats: int) -> dict[str, Any]:
    """Compare the two with one tokenizer."""
    with tempfile.TemporaryDirectory() as cache:
        files = find_files(data.paths, Path(cache), Path(cache), data)
        documents = list(iter_documents(files))
    pieces = [document.text for document in documents]
    tokenizer = make_tokenizer(spec, pieces)
    our_best = their_best = 0.0
    for _ in range(repeats):
        our_speed, our_tokens = ours(data, tokenizer, n_workers)
        their_speed, their_tokens = tiktokens(pieces, tokenizer, n_workers)
        n_separators = sum(document.is_start for document in documents)
        assert our_tokens == their_tokens + n_separators * len(tokenizer.separator)
        our_best, their_best = max(our_best, our_speed), max(their_best, their_speed)
    return {
        "tokenizer": spec,
        "workers": n_workers,
        "n_bytes": sum(len(piece.encode()) for piece in pieces),
        "n_tokens": our_tokens,
        "ours_mb_per_s": round(our_best, 2),
        "tiktoken_mb_per_s": round(their_best, 2),
        "ratio": round(our_best / their_best, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", nargs="*", default=["../shared/data/fairytales.txt"])
    parser.add_argument("--tokenizer", nargs="+", default=["bpe:1024"])
    parser.add_argument("--workers", type=int, nargs="+", default=[default_workers()])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    data = DataConfig(paths=tuple(args.data))
    print("| tokenizer | threads | text | ours | tiktoken | ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    results = []
    for spec in args.tokenizer:
        for n_workers in args.workers:
            result = measure(data, spec, n_workers, args.repeats)
            results.append(result)
            print(
                f"| {spec} | {n_workers} | {result['n_bytes'] / 1e6:.1f} MB | "
                f"{result['ours_mb_per_s']:.2f} MB/s | {result['tiktoken_mb_per_s']:.2f} MB/s | "
                f"{result['ratio']:.2f} |",
                flush=True,
            )
    machine = {
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": sys.version.split()[0],
        "tiktoken": version("tiktoken"),
    }
    print(json.dumps(machine))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "runs": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
