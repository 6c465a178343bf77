"""One contender in a separate process: load, decode once to warm up, then decode on request.

    python decoders.py '{"contender": {...}, "job": {...}}'

Each line on standard input requests a turn: an empty line that of the job, a number N the first
token after N tokens of the longest prompt. Each line on standard output is a Turn as JSON, or
{"failed": REASON}. The module level only imports the standard library, because the Python that has
llama.cpp may not have torch.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from contender import Contender, Decode, Job, Turn, UnavailableError, drain
from peers import PEERS, WITHOUT_TORCH


def minigpt(contender: Contender, job: Job) -> Decode:
    """Return minigpt's decoder, through the classes that the commands use."""
    from minigpt.config import SamplingConfig
    from minigpt.generation.decoder import Decoder
    from minigpt.generation.loading import load

    is_int8 = contender.precision == "int8"
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(contender.precision, "auto")
    options: Any = {"quantize": "int8" if is_int8 else None, "compile": contender.is_compiled}
    loaded = load(Path(job.folder), device=job.device, dtype=dtype, for_decoding=True, **options)
    model = loaded.model

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        sampling = SamplingConfig(temperature=0, max_new_tokens=job.n_new)
        decoder = Decoder(
            model,
            job.prompt,
            max_new_tokens=job.n_new,
            n_rows=contender.n_rows,
            compile=contender.is_compiled,
        )
        steps = decoder.batch(sampling, seeds=range(contender.n_rows))
        return drain((step.token for row, step in steps if row == 0), first)

    if contender.variant == "trace":
        return _traced(model, contender)
    return decode


def _traced(model: Any, contender: Contender) -> Decode:
    """Return minigpt's decoder with an attention row per token, as in ``attention-trace``."""
    from random_models import ENDLESS

    from minigpt.config import SamplingConfig
    from minigpt.tracing.findings import TraceStep
    from minigpt.tracing.tracer import trace

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        sampling = SamplingConfig(temperature=0, max_new_tokens=job.n_new)
        events = trace(
            model,
            ENDLESS,
            job.prompt,
            sampling,
            seed=0,
            compile=contender.is_compiled,
        )
        return drain((e.token.id for e in events if isinstance(e, TraceStep)), first)

    return decode


def memory(contender: Contender, job: Job) -> Decode:
    """Return a decoder whose tokens are passes over an array that is larger than any cache."""
    import torch

    array = torch.ones(READ_BYTES // 4, device=job.device)

    def decode(_: Job, first: Callable[[], None]) -> list[int]:
        return drain((int(array.sum() > 0) for _ in range(1 + N_READS)), first)

    return decode


READ_BYTES, N_READS = 2**30, 8
ENGINES = {"minigpt": minigpt, "memory": memory, **PEERS}


def peak_bytes(device: str) -> int:
    """Return this process's peak resident memory, or with CUDA its peak allocated memory."""
    if device == "cuda" and "torch" in sys.modules:  # unknown for llama.cpp
        import torch

        return torch.cuda.max_memory_allocated()
    # Not getrusage: on Linux its maximum starts with that of the parent process.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def timed_turn(decode: Decode, job: Job) -> Turn:
    """Decode once and time it."""
    marks: list[float] = []
    started = time.perf_counter()
    tokens = decode(job, lambda: marks.append(time.perf_counter()))
    ended = time.perf_counter()
    return Turn(marks[0] - started, ended - marks[0], tokens, peak_bytes(job.device))


def main() -> None:
    # Keep the output of libraries out of the replies.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    request = json.loads(sys.argv[1])
    contender, job = Contender(**request["contender"]), Job(**request["job"])
    try:
        if contender.engine not in WITHOUT_TORCH:
            import torch

            torch.set_num_threads(job.threads)
        decode = ENGINES[contender.engine](contender, job)
        print(json.dumps(asdict(timed_turn(decode, job))), file=replies)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        reason = (
            words[0]
            if isinstance(error, UnavailableError)
            else f"{type(error).__name__}: {words[0]}"
        )
        print(json.dumps({"failed": reason}), file=replies)
        raise
    for line in sys.stdin:
        requested = job
        if line.strip():
            requested = replace(job, prompt=job.longest_prompt[: int(line)], n_new=1)
        print(json.dumps(asdict(timed_turn(decode, requested))), file=replies)


if __name__ == "__main__":
    main()
