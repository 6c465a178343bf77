"""Our names of tensors <-> Hugging Face's, in pairs, for GPT-2's layout and Llama's."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt.checkpoint.families import OWN_TYPE
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError


@dataclass(frozen=True)
class Renaming:
    """One tensor of theirs and what it is with us; ``{i}`` stands for the block."""

    theirs: str
    """Without the prefix of the bare model."""
    ours: tuple[str, ...]
    """Several if theirs is ours fused, in this order, along the outputs."""
    is_transposed: bool = False
    """Theirs is (in, out), as GPT-2's Conv1D keeps it; ours is nn.Linear's (out, in)."""


def _same(theirs: str, ours: str, suffixes: tuple[str, ...] = ("weight",)) -> list[Renaming]:
    return [Renaming(f"{theirs}.{s}", (f"{ours}.{s}",)) for s in suffixes]


def _conv1d(theirs: str, *ours: str) -> list[Renaming]:
    return [
        Renaming(f"{theirs}.weight", tuple(f"{name}.weight" for name in ours), is_transposed=True),
        Renaming(f"{theirs}.bias", tuple(f"{name}.bias" for name in ours)),
    ]


_BOTH = ("weight", "bias")
_QKV = ("query", "key", "value")

_GPT2 = (
    *_same("wte", "embedding"),
    *_same("wpe", "positions"),
    *_same("h.{i}.ln_1", "blocks.{i}.attention_norm", _BOTH),
    *_conv1d("h.{i}.attn.c_attn", *(f"blocks.{{i}}.attention.{name}" for name in _QKV)),
    *_conv1d("h.{i}.attn.c_proj", "blocks.{i}.attention.output"),
    *_same("h.{i}.ln_2", "blocks.{i}.mlp_norm", _BOTH),
    *_conv1d("h.{i}.mlp.c_fc", "blocks.{i}.mlp.up"),
    *_conv1d("h.{i}.mlp.c_proj", "blocks.{i}.mlp.down"),
    *_same("ln_f", "final_norm", _BOTH),
)
_LLAMA = (
    *_same("embed_tokens", "embedding"),
    *_same("layers.{i}.input_layernorm", "blocks.{i}.attention_norm"),
    *_same("layers.{i}.self_attn.q_proj", "blocks.{i}.attention.query"),
    *_same("layers.{i}.self_attn.k_proj", "blocks.{i}.attention.key"),
    *_same("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.value"),
    *_same("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.output"),
    *_same("layers.{i}.post_attention_layernorm", "blocks.{i}.mlp_norm"),
    *_same("layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate"),
    *_same("layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up"),
    *_same("layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down"),
    *_same("norm", "final_norm"),
)
_QK_NORMS = (
    *_same("layers.{i}.self_attn.q_norm", "blocks.{i}.attention.query_norm"),
    *_same("layers.{i}.self_attn.k_norm", "blocks.{i}.attention.key_norm"),
)
_QKV_BIASES = (
    *_same("layers.{i}.self_attn.q_proj", "blocks.{i}.attention.query", ("bias",)),
    *_same("layers.{i}.self_attn.k_proj", "blocks.{i}.attention.key", ("bias",)),
    *_same("layers.{i}.self_attn.v_proj", "blocks.{i}.attention.value", ("bias",)),
)
_OUTPUT_BIASES = _same("layers.{i}.self_attn.o_proj", "blocks.{i}.attention.output", ("bias",))
_MLP_BIASES = (
    *_same("layers.{i}.mlp.gate_proj", "blocks.{i}.mlp.gate", ("bias",)),
    *_same("layers.{i}.mlp.up_proj", "blocks.{i}.mlp.up", ("bias",)),
    *_same("layers.{i}.mlp.down_proj", "blocks.{i}.mlp.down", ("bias",)),
)
_HEAD = Renaming("lm_head.weight", ("unembedding.weight",))

_PREFIXES = {"gpt2": "transformer.", "llama": "model."}
"""What the language-model class puts before the names of the bare model."""
# Tensors of old files that hold no weights: causal masks, rotary tables.
_IGNORED = re.compile(
    r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
    r"|model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
)


def _renamings(config: ModelConfig) -> Iterator[Renaming]:
    # The largest first: room for a second copy of one is there while few others are.
    if not config.tie_embeddings:
        yield _HEAD
    for renaming in _layout(config):
        blocks = range(config.n_layer) if "{i}" in renaming.theirs else range(1)
        for i in blocks:
            theirs = _PREFIXES[config.family] + renaming.theirs.format(i=i)
            ours = tuple(name.format(i=i) for name in renaming.ours)
            yield Renaming(theirs, ours, renaming.is_transposed)


def _layout(config: ModelConfig) -> Iterator[Renaming]:
    if config.family == "gpt2":
        yield from _GPT2
        return
    yield from _LLAMA
    yield from _QK_NORMS if config.qk_norm else ()
    yield from _QKV_BIASES if config.attention_bias != "none" else ()
    yield from _OUTPUT_BIASES if config.attention_bias == "all" else ()
    yield from _MLP_BIASES if config.mlp_bias else ()


def canonical_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Return the names that ``tensors_from_hf`` takes -> the names found, where they differ or not.

    Adds the prefix that files of the bare model lack, and leaves out tensors that hold no weights.
    Raises: CheckpointError if a tensor is there with the prefix and without.
    """
    prefix = "" if config.model_type == OWN_TYPE else _PREFIXES[config.family]
    canonical: dict[str, str] = {}
    for name in names:
        has_prefix = name.startswith(prefix) or name == _HEAD.theirs
        full = name if has_prefix else prefix + name
        if _IGNORED.fullmatch(full):
            continue
        if canonical.setdefault(full, name) != name:
            raise CheckpointError(f"the tensor {full!r} is there twice. Download the model again.")
    return canonical


def tensors_to_hf(config: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename, fuse and transpose a GPT's state_dict to what transformers calls it.

    Models of OWN_TYPE, which it does not know, keep our names.
    """
    if config.model_type == OWN_TYPE:
        return {name: tensor.contiguous() for name, tensor in tensors.items()}
    renamed = {}
    for renaming in _renamings(config):
        parts = [tensors[name] for name in renaming.ours]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        renamed[renaming.theirs] = (tensor.t() if renaming.is_transposed else tensor).contiguous()
    return renamed


def tensors_from_hf(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Rename, transpose and split tensors of canonical names to a GPT's state_dict.

    Each is asked for once and let go at once: where they are read from a file by then, there are
    never two of all.

    Args: device and dtype, of the result; None leaves them as they are.
    Raises: CheckpointError if the embeddings are said to be tied but are two; KeyError if a name
        is not there (``model_folder`` checks names and shapes first).
    """
    if config.model_type == OWN_TYPE:
        return {name: _placed(tensors[name], device, dtype) for name in tensors}
    renamed: dict[str, Tensor] = {}
    for renaming in _renamings(config):
        parts = _parts(tensors[renaming.theirs], renaming)
        renamed |= zip(renaming.ours, (_placed(p, device, dtype) for p in parts), strict=True)
        del parts
    if config.tie_embeddings and _HEAD.theirs in tensors:  # as some files hold it
        embedding = next(_renamings(config)).theirs
        if not torch.equal(tensors[_HEAD.theirs], tensors[embedding]):
            raise CheckpointError(
                "config.json: tie_word_embeddings is true, but lm_head.weight is not the "
                "embedding. Set it to false there."
            )
    return renamed


def _parts(tensor: Tensor, renaming: Renaming) -> Sequence[Tensor]:
    return (tensor.t() if renaming.is_transposed else tensor).chunk(len(renaming.ours))


def _placed(part: Tensor, device: torch.device | str | None, dtype: torch.dtype | None) -> Tensor:
    if part.is_contiguous():
        return part.to(device, dtype)
    place = torch.empty(part.shape, device=device or part.device, dtype=dtype or part.dtype)
    return place.copy_(part)
