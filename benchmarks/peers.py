"""The other contenders: transformers, gpt-fast, llama.cpp, CTranslate2 and ONNX Runtime.

The module level only imports the standard library, because a Python that has one of them may not
have the others, or torch.
"""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from contender import Contender, Decode, Job, UnavailableError, drain


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
        compile_config._compile_all_devices = True  # otherwise only on a GPU
        options |= {"cache_implementation": "static", "compile_config": compile_config}

    class Streamer(BaseStreamer):  # type: ignore[misc]
        def __init__(self, first: Callable[[], None]) -> None:
            self.first, self.n_calls = first, 0

        def put(self, value: Any) -> None:
            self.n_calls += 1
            if self.n_calls == 2:  # the first call passes the prompt
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

    Its class is a Llama without QK-norm, so only the shape is the same, not the weights. For a
    GPT-2, the width of the MLP is chosen so that the number of weights is the same.
    """
    if not job.gpt_fast:
        raise UnavailableError("no checkout of gpt-fast was given: use --gpt-fast DIR")
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
        # Keys and values in float32 if the weights are; otherwise llama.cpp's default.
        **({"type_k": 0, "type_v": 0} if contender.precision == "fp32" else {}),
        verbose=False,
    )

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        model.reset()  # otherwise it would reuse the prompt's keys of the last turn
        stream = model.generate(job.prompt, temp=0, repeat_penalty=1.0)
        return drain((next(stream) for _ in range(job.n_new)), first)

    return decode


def ctranslate2(contender: Contender, job: Job) -> Decode:
    """CTranslate2's generator, whose int8 quantizes activations too."""
    import ctranslate2 as library

    precision = {"fp32": "float32", "bf16": "bfloat16"}.get(contender.precision, "int8")
    path = str(peer_folder(job.folder, contender))
    model = library.Generator(path, compute_type=precision, intra_threads=job.threads)

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        prompt = list(map(str, job.prompt))  # the names of the tokens are their ids
        steps = model.generate_tokens(prompt, max_length=job.n_new, end_token=[])
        return drain((step.token_id for step in steps), first)

    return decode


def onnx_runtime(contender: Contender, job: Job) -> Decode:
    """ONNX Runtime's generate(); its int8 has a scale for each block of a row's weights."""
    import onnxruntime_genai as library

    folder = peer_folder(job.folder, contender)
    path = folder / "genai_config.json"
    config = json.loads(path.read_text())
    options = config["model"]["decoder"]["session_options"]
    options["intra_op_num_threads"] = job.threads
    path.write_text(json.dumps(config))
    model = library.Model(str(folder))

    def decode(job: Job, first: Callable[[], None]) -> list[int]:
        parameters = library.GeneratorParams(model)
        parameters.set_search_options(do_sample=False, max_length=len(job.prompt) + job.n_new)
        generator = library.Generator(model, parameters)
        generator.append_tokens(job.prompt)

        def step() -> int:
            generator.generate_next_token()
            return int(generator.get_next_tokens()[0])

        return drain((step() for _ in range(job.n_new)), first)

    return decode


def peer_folder(folder: str, contender: Contender) -> Path:
    """Return the folder of the model in the format of CTranslate2 or ONNX Runtime."""
    return Path(folder, f"{contender.engine}-{contender.precision}")


PEERS: dict[str, Callable[[Contender, Job], Decode]] = {
    "transformers": transformers,
    "gpt-fast": gpt_fast,
    "llama.cpp": llama_cpp,
    "CTranslate2": ctranslate2,
    "ONNX": onnx_runtime,
}
WITHOUT_TORCH = ("llama.cpp", "CTranslate2", "ONNX")
"""Engines without torch: their Python may not have it, and their memory must not include it."""


def _module(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _torch_dtype(precision: str) -> Any:
    """Return the dtype of weights before quantization, and of all other tensors."""
    import torch

    return torch.float32 if precision == "fp32" else torch.bfloat16
