"""Fast decoding of a GPT: a step with few kernel calls, compiled graphs, quantized weights."""

import warnings
from typing import TypeGuard

import torch
from torch import nn

from minigpt.errors import ConfigError, MinigptWarning, ResourceError
from minigpt.generation.fast.compiled import CompiledForward, is_default
from minigpt.generation.fast.eager import EagerForward
from minigpt.generation.fast.prompts import PromptLinear
from minigpt.generation.fast.quantize import WeightOnlyEmbedding, WeightOnlyLinear
from minigpt.generation.forward import PlainForward
from minigpt.model.attention import Attention, Recorder
from minigpt.model.gpt import GPT
from minigpt.model.language_model import LanguageModel
from minigpt.model.layers import MLP, GatedMLP, RMSNorm

_LINEAR = nn.Linear, PromptLinear, WeightOnlyLinear
_TYPES: dict[str, tuple[type[nn.Module], ...]] = {
    "attention": (Attention,),
    "mlp": (MLP, GatedMLP),
    **dict.fromkeys(("query", "key", "value", "output", "gate", "up", "down"), _LINEAR),
    **dict.fromkeys(("attention_norm", "mlp_norm", "final_norm"), (nn.LayerNorm, RMSNorm)),
    **dict.fromkeys(("query_norm", "key_norm"), (nn.Identity, RMSNorm)),
    **dict.fromkeys(("attention_post_norm", "mlp_post_norm"), (nn.Identity,)),
}
"""Types of the modules that the decode step computes itself, by the last part of their names."""


def supports(model: LanguageModel, *, compile: bool = False) -> bool:
    """Return whether the eager (or, with ``compile``, the compiled) decode step fits a model.

    Subclasses of GPT may compute something else, so only GPT itself is supported, and without
    module hooks and replaced modules, which the step does not run.
    """
    if type(model) is not GPT or model.training or not _has_own_modules(model):
        return False
    if compile:
        return model.config.attention == "scaled_dot" and model.device.type in (
            "cpu",
            "cuda",
            "meta",
        )
    return model.device.type == "cpu"


def _has_own_modules(model: GPT) -> bool:
    """Return whether a model still has the modules of ``GPT.__init__``, without hooks.

    Of the others, such as an adapter in place of a linear layer, the step would only read weights.
    """
    for name, module in model.named_modules():
        types = _TYPES.get(name.rpartition(".")[2])
        if types is not None and type(module) not in types:
            return False
        # A function may also be assigned to ``forward`` of a module.
        if module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module):
            return False
    layers = [attention.layer for attention in model.attentions]
    return layers == list(range(model.config.n_layer))


def is_compiled(model: LanguageModel, compile: bool | None, n_rows: int = 1) -> bool:
    """Return whether to decode with a compiled graph.

    Args: compile, whether the user requests it. None for the default: on CUDA, if the model is
        supported; on a CPU, for one row, if its graph is in the cache, computes the same as the
        eager step up to float32 rounding, and was not slower when it was compiled. If compiling
        then fails, ``make_forward`` warns and decodes without it.
    """
    if compile is not None:
        return compile
    if model.device.type == "cuda":
        return supports(model, compile=True)
    return n_rows == 1 and compiled_matches_eager(model) and is_default(model)


def compiled_matches_eager(model: LanguageModel) -> TypeGuard[GPT]:
    """Return whether the compiled step on a CPU equals the eager one up to float32 rounding.

    Weights must be float32 or int8, and activations float32. With bfloat16, the graph rounds less
    often than the eager step and its tables, so the same seed could sample a different text.
    """
    kinds = {model.dtype, stored_dtype(model)}
    is_same = model.device.type in ("cpu", "meta") and kinds <= {torch.float32, torch.int8}
    return is_same and supports(model, compile=True)


def stored_dtype(model: LanguageModel) -> torch.dtype:
    """Return the dtype of a model's weights in memory."""
    embedding = model.embedding
    if isinstance(embedding, WeightOnlyEmbedding):
        return embedding.linear.stored_dtype
    return model.dtype


def make_forward(
    model: LanguageModel,
    *,
    capacity: int,
    n_rows: int = 1,
    recorder: Recorder | None = None,
    compile: bool | None = False,
) -> PlainForward | None:
    """Return the decode step of a model; None if the model is not supported.

    Args: as for ``forward.make_forward``.
    Raises: ConfigError if compiling is requested but not possible.
    """
    if compile and not supports(model, compile=True):
        raise ConfigError(
            "--compile needs a GPT with scaled_dot attention and full context on cpu or cuda, "
            "without hooks or replaced modules: this model is of class "
            f"{type(model).__name__}, with {model.config.attention} on {model.device.type}. Use "
            "--no-compile."
        )
    if is_compiled(model, compile, n_rows):
        assert isinstance(model, GPT)
        try:
            return CompiledForward(model, capacity=capacity, n_rows=n_rows, recorder=recorder)
        except (ConfigError, ResourceError) as error:
            if compile:
                raise
            note = f"decoding without a compiled graph: {error}"
            warnings.warn(note, MinigptWarning, stacklevel=2)
    if not supports(model):
        return None
    assert isinstance(model, GPT)
    return EagerForward(model, capacity=capacity, recorder=recorder)
