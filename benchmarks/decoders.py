"""One contender in a separate process: load, decode once to warm up, then decode on request.

    python decoders.py '{"contender": {...}, "job": {...}}'

Each line on standard input requests a turn: an empty one the job's, a number the first token after
as many tokens of the longest prompt. Each line on standard output is a Turn as JSON, or
{"failed": why}. The module level only imports the standard library, because the Python that has
llama.cpp may not have torch.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any


@dataclass(frozen=True)
class Contender:
    """An implementation and its options."""

    engine: str
    """minigpt, transformers, gpt-fast, llama.cpp, or memory, which only reads memory."""
    precision: str
    """fp32, bf16 or int8 (llama.cpp: q8_0)."""
    variant: str = ""
    """Empty for the usual call; trace, loop (a bare loop over forward) or static."""
    is_compiled: bool = False
    n_rows: int = 1
    """Batch size."""

    @property
    def name(self) -> str:
        words = [self.engine, self.precision, self.variant, "compiled" if self.is_compiled else ""]
        return " ".join(filter(None, [*words, f"x{self.n_rows}" if self.n_rows > 1 else ""]))


@dataclass(frozen=True)
class Job:
    """The input of every contender."""

    folder: str
    """Hugging Face folder of the model; llama.cpp reads PRECISION.gguf in it."""
    prompt: list[int]
    n_new: int
    threads: int
    device: str
    gpt_fast: str
    """Path of a gpt-fast checkout, or empty."""
    longest_prompt: list[int] = field(default_factory=list)
    """Begins with the prompt; empty if no turn has another."""

    @property
    def n_positions(self) -> int:
        """Positions that any turn needs."""
        return max(len(self.prompt), len(self.longest_prompt)) + self.n_new


@dataclass(frozen=True)
class Turn:
    """The timing of one decoding."""

    first_s: float
    """From the prompt's ids to the first new token's on the host."""
    rest_s: float
    """From there to the last new token's."""
    tokens: list[int]
    """The first row's new ones."""
    peak_bytes: int
    """The most memory that the process, or with CUDA its tensors, ever had."""


Decode = Callable[[Job, Callable[[], None]], list[int]]
"""Decodes greedily; calls the function once the first token is on the host; returns row 0's."""


class UnavailableError(Exception):
    """A contender cannot be measured here, with the reason."""


def minigpt(contender: Contender, job: Job) -> Decode:
    """minigpt, through the classes that the commands use."""
    from minigpt.config import SamplingConfig
    from minigpt.generation.decoder import Decoder
    from minigpt.generation.loading import load

    is_int8 = contender.precision == "int8"
    dtype = {"fp32": "float32", "bf16": "bfloat16"}.get(contender.precision, "auto")
    options: Any = {"quantize": "int8" if is_int8 else None, "compile": contender.is_compiled}
    loaded = load(Path(job.folder), device=job.device, dtype=dtype, decodes=True, **options)
    model = loaded.model

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        sampling = SamplingConfig(temperature=0, max_new_tokens=job.n_new)
        decoder = Decoder(
            model,
            job.prompt,
            max_new_tokens=job.n_new,
            n_rows=contender.n_rows,
            compiles=contender.is_compiled,
        )
        steps = decoder.batch(sampling, seeds=range(contender.n_rows))
        return _drain((step.token for row, step in steps if row == 0), first)

    if contender.variant == "trace":
        return _traced(model, contender)
    return decode


def _traced(model: Any, contender: Contender) -> Decode:
    """minigpt with a row of attention per token, as in ``attention-trace``."""
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
            compiles=contender.is_compiled,
        )
        return _drain((e.token.id for e in events if isinstance(e, TraceStep)), first)

    return decode


def transformers(contender: Contender, job: Job) -> Decode:
    """Hugging Face's model class: its generate, or a bare loop over its forward."""
    import torch
    from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache
    from transformers.generation.streamers import BaseStreamer

    model = AutoModelForCausalLM.from_pretrained(
        job.folder,
        dtype=_torch_dtype(contender.precision),
        attn_implementation="sdpa",
        local_files_only=True,
    )
    model.to(job.device).eval()
    model.generation_config.eos_token_id = None  # every text has its full length
    options: dict[str, Any] = {"do_sample": False}
    if contender.is_compiled:
        compile_config = CompileConfig(fullgraph=False)
        compile_config._compile_all_devices = True  # else only on a GPU
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self, first: Callable[[], None]) -> None:
            self.first, self.n_calls = first, 0

        def put(self, value: Any) -> None:
            self.n_calls += 1
            if self.n_calls == 2:  # the first call brings the prompt
                self.first()

        def end(self) -> None:
            pass

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        prompt = torch.tensor([job.prompt] * contender.n_rows, device=job.device)
        rows = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=Streamer(first),
            max_new_tokens=job.n_new,
            **options,
        )
        tokens: list[int] = rows[0, len(job.prompt) :].tolist()
        return tokens

    @torch.inference_mode()
    def decode_loop(job: Job, first: Callable[[], None]) -> list[int]:
        prompt = torch.tensor([job.prompt] * contender.n_rows, device=job.device)
        cache, chosen, tokens = DynamicCache(config=model.config), prompt, list[int]()
        for _ in range(job.n_new):
            logits = model(chosen, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            chosen = logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(chosen.tolist()[0][0])
            if len(tokens) == 1:
                first()
        return tokens

    return decode_loop if contender.variant == "loop" else decode


def gpt_fast(contender: Contender, job: Job) -> Decode:
    """gpt-fast's model class and compiled step, set up as in its main().

    Its class is a Llama without QK-norm, so the shape is the same and the weights are not: with an
    MLP as wide as keeps the number of them, for a GPT-2.
    """
    if not job.gpt_fast:
        raise UnavailableError("no checkout of it was given: --gpt-fast DIR")
    import torch

    from minigpt.checkpoint.model_folder import read_config

    config = read_config(Path(job.folder))
    # Its generate.py imports a tokenizer library that is not needed here.
    sys.modules["tokenizer"] = SimpleNamespace(get_tokenizer=None)  # type: ignore[assignment]
    model_file = _module(Path(job.gpt_fast, "model.py"), "model")
    generate = _module(Path(job.gpt_fast, "generate.py"), "gpt_fast_generate")
    d_mlp = config.d_mlp if config.family == "llama" else config.d_mlp * 2 // 3
    model = model_file.Transformer(
        model_file.ModelArgs(
            block_size=config.context_length,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_local_heads=config.n_kv_head,
            dim=config.d_model,
            intermediate_size=d_mlp,
        )
    )
    model.to(job.device, _torch_dtype(contender.precision)).eval()
    generate.decode_one_token = torch.compile(
        generate.decode_one_token, mode="reduce-overhead", fullgraph=True
    )
    n_rows = contender.n_rows

    @torch.no_grad()
    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        n_prompt = len(job.prompt)
        prompt = torch.tensor([job.prompt] * n_rows, device=job.device)
        with torch.device(job.device):
            model.setup_caches(max_batch_size=n_rows, max_seq_length=n_prompt + job.n_new)
        positions = torch.arange(n_prompt, device=job.device)
        chosen = generate.prefill(model, prompt, positions, temperature=0).clone()
        tokens = [int(chosen[0])]
        first()
        position = torch.tensor([n_prompt], device=job.device, dtype=torch.int)
        rest, _ = generate.decode_n_tokens(
            model, chosen.view(n_rows, -1), position, job.n_new - 1, temperature=0
        )
        return tokens + torch.cat(rest, dim=-1)[0].tolist()

    return decode


def llama_cpp(contender: Contender, job: Job) -> Decode:
    """llama.cpp through llama-cpp-python."""
    from llama_cpp import Llama

    model = Llama(
        str(Path(job.folder, f"{contender.precision}.gguf")),
        n_ctx=job.n_positions,
        n_batch=job.n_positions,  # a prompt in one pass
        n_ubatch=job.n_positions,
        n_threads=job.threads,
        n_threads_batch=job.threads,
        n_gpu_layers=-1 if job.device == "cuda" else 0,
        # Keys and values in float32 where the weights are; otherwise its own choice.
        **({"type_k": 0, "type_v": 0} if contender.precision == "fp32" else {}),
        verbose=False,
    )

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        model.reset()  # else it would go on from the prompt's keys of the last turn
        stream = model.generate(job.prompt, temp=0, repeat_penalty=1.0)
        return _drain((next(stream) for _ in range(job.n_new)), first)

    return decode


def memory(contender: Contender, job: Job) -> Decode:
    """Read an array that fits no cache: a pass for the first token and one for each other."""
    import torch

    array = torch.ones(READ_BYTES // 4, device=job.device)

    def decode(_: Job, first: Callable[[], None]) -> list[int]:
        return _drain((int(array.sum() > 0) for _ in range(1 + N_READS)), first)

    return decode


READ_BYTES, N_READS = 2**30, 8
ENGINES: dict[str, Callable[[Contender, Job], Decode]] = {
    "minigpt": minigpt,
    "transformers": transformers,
    "gpt-fast": gpt_fast,
    "llama.cpp": llama_cpp,
    "memory": memory,
}


def _drain(tokens: Any, first: Callable[[], None]) -> list[int]:
    taken = []
    for token in tokens:
        taken.append(token)
        if len(taken) == 1:
            first()
    return taken


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_dtype(precision: str) -> Any:
    """Of the weights before they are quantized, and of everything else."""
    import torch

    return torch.float32 if precision == "fp32" else torch.bfloat16


def peak_bytes(device: str) -> int:
    """Return the most memory that this process has had resident, or with CUDA allocated."""
    if device == "cuda" and "torch" in sys.modules:  # llama.cpp's is not known
        import torch

        return torch.cuda.max_memory_allocated()
    # Not getrusage: on Linux its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def take_turn(decode: Decode, job: Job) -> Turn:
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
        if contender.engine != "llama.cpp":
            import torch

            torch.set_num_threads(job.threads)
        decode = ENGINES[contender.engine](contender, job)
        print(json.dumps(asdict(take_turn(decode, job))), file=replies)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        why = (
            words[0]
            if isinstance(error, UnavailableError)
            else f"{type(error).__name__}: {words[0]}"
        )
        print(json.dumps({"failed": why}), file=replies)
        raise
    for line in sys.stdin:
        wanted = job
        if line.strip():
            wanted = replace(job, prompt=job.longest_prompt[: int(line)], n_new=1)
        print(json.dumps(asdict(take_turn(decode, wanted))), file=replies)


if __name__ == "__main__":
    main()
