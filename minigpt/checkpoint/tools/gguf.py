"""Write a model folder as a GGUF file, which llama.cpp and Ollama run.

Tensors are read, converted and written one by one. llama.cpp supports only some of our models: a
feature that it would compute differently is an error that names it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minigpt.checkpoint.model_folder import read_config, read_vocabulary
from minigpt.checkpoint.stored_tensors import LazyTensors, StoredTensor, stored_tensors
from minigpt.checkpoint.tools.gguf_architectures import (
    Architecture,
    add_metadata,
    architecture_of,
    extra_tensors,
    to_gguf,
)
from minigpt.checkpoint.tools.gguf_vocabulary import chat_template, gguf_vocabulary
from minigpt.checkpoint.weights import check_tied, tensor_names
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, install_extra
from minigpt.files import resource_errors, writing_aside
from minigpt.text.tokenizer import Tokenizer, well_formed

_LARGEST = {"f16": 65504.0, "q8_0": 65504.0 * 127}
_VALUES_AT_ONCE = 2**22
_BLOCK = 32  # values that share a scale in q8_0
_TOKENS_OF_PHI3 = {"<unk>", "<s>", "</s>", "<|endoftext|>"}
_ALIGNMENT = 32  # bytes; GGUF's default


@dataclass(frozen=True)
class Exported:
    """A GGUF file that was written."""

    n_bytes: int
    is_chat: bool
    """Whether it has a chat template."""
    has_vocabulary: bool
    notes: tuple[str, ...]
    """How llama.cpp differs from minigpt for this model, one sentence each."""


def export_gguf(folder: Path, path: Path, type_: str) -> Exported:
    """Write a model folder as a GGUF file, atomically.

    Args: type_, of matrices: f32, f16, bf16 or q8_0. Vectors and learned positions are float32.
    Raises: CheckpointError if llama.cpp does not support the model or its vocabulary; ConfigError
        if the package gguf is not installed; ResourceError.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            f"writing GGUF files needs the package gguf. Install it: {install_extra('gguf')}."
        ) from None
    config = read_config(folder)
    architecture = architecture_of(config)
    stored = stored_tensors(config, folder)
    check_tied(config, LazyTensors(stored))
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    all_of = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[all_of[type_]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    notes = add_metadata(writer, config, architecture)
    tokenizer = read_vocabulary(folder, config.vocab_size)
    notes += _add_vocabulary(writer, folder, config, tokenizer)
    template = chat_template(folder)
    if template:
        writer.add_chat_template(template)
    tensors = list(_tensors(gguf, config, architecture, stored))
    kinds = [_add_tensor_info(writer, gguf, tensor, type_) for tensor in tensors]
    with resource_errors(path), writing_aside(path) as file:
        try:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        file.seek(0, 2)
        for tensor, kind in zip(tensors, kinds, strict=True):
            _write_tensor(file, gguf, tensor, kind)
        _pad(file)
        n_bytes = file.tell()
    return Exported(n_bytes, template is not None, tokenizer is not None, tuple(notes))


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, which is read and converted when it is written."""

    name: str
    """Name in the file."""
    source: str
    """Name in the model folder, for messages."""
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _tensors(
    gguf: ModuleType,
    config: ModelConfig,
    architecture: Architecture,
    stored: Mapping[str, StoredTensor],
) -> Iterator[_Tensor]:
    """Yield the tensors of the file: the model's, then those that only llama.cpp has."""
    names = {name.theirs: name for name in tensor_names(config)}
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[architecture.name], config.n_layer)
    written = [(known.get_name(name, (".weight", ".bias")), name) for name in names]
    if architecture.head == "needed" and config.tie_embeddings:
        written.append(("output.weight", next(iter(names))))

    def read(name: str) -> Tensor:
        tensor = stored[name].read()
        tensor = tensor.t() if names[name].is_transposed else tensor
        return to_gguf(tensor, name, config, architecture)

    for gguf_name, name in written:
        shape = stored[name].shape[:: -1 if names[name].is_transposed else 1]
        yield _Tensor(gguf_name, name, shape, partial(read, name))
    for name, tensor in extra_tensors(config).items():
        yield _Tensor(name, name, tuple(tensor.shape), tensor.float)


def _add_vocabulary(
    writer: Any, folder: Path, config: ModelConfig, tokenizer: Tokenizer | None
) -> list[str]:
    """Write the name and vocabulary of a model; return notes on how llama.cpp differs."""
    run = folder.parent if folder.name.startswith("step-") else folder
    # In the cache of the Hub, a model is in models--OWNER--NAME/snapshots/COMMIT.
    is_cached = run.parent.name == "snapshots"
    name = well_formed(run.parents[1].name.rpartition("--")[2] if is_cached else run.name)
    if tokenizer is None:
        writer.add_name(name)
        writer.add_tokenizer_model("none")
        return ["the model has no vocabulary, so llama.cpp reads and writes token ids"]
    vocabulary = gguf_vocabulary(folder, tokenizer, config.vocab_size)
    if config.model_type != "phi3" or not {*vocabulary.tokens} >= _TOKENS_OF_PHI3:
        other = re.sub("phi-?3", "phi 3", name, flags=re.IGNORECASE)
        if other != name:
            vocabulary.notes.append(
                f"the model's name in the file is {other!r}, because llama.cpp expects the tokens "
                "of Phi-3 in a model named phi3"
            )
        name = other
    writer.add_name(name)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.has_space_prefix)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    for role, id_ in vocabulary.special_ids.items():
        getattr(writer, f"add_{role}_token_id")(id_)
    return vocabulary.notes


def _add_tensor_info(writer: Any, gguf: ModuleType, tensor: _Tensor, type_: str) -> Any:
    """Declare a tensor and return its type; vectors and positions are always float32."""
    if len(tensor.shape) == 1 or tensor.name.startswith("position_embd"):
        type_ = "f32"
    elif type_ == "q8_0" and tensor.shape[-1] % _BLOCK:
        type_ = "f16"  # as llama.cpp's own converter does
    kind = gguf.GGMLQuantizationType[type_.upper()]
    n_bytes = math.prod(gguf.quant_shape_to_byte_shape(tensor.shape, kind))
    writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), n_bytes, kind)
    return kind


def _write_tensor(file: Any, gguf: ModuleType, tensor: _Tensor, kind: Any) -> None:
    type_ = kind.name.lower()
    limit = _LARGEST.get(type_, np.finfo(np.float32).max)
    _pad(file)
    for rows in _rows(tensor.read()):
        largest = np.abs(rows).max(initial=0)
        if not largest <= limit:
            problem = "NaN or inf. Choose another checkpoint."
            if np.isfinite(largest):
                problem = f"the value {largest:g}, too large for {type_}. Use --type bf16 or f32."
            raise CheckpointError(f"the tensor {tensor.source!r} holds {problem}")
        file.write(gguf.quantize(rows, kind).tobytes())


def _pad(file: Any) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _rows(tensor: Tensor) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the rows of a tensor in float32, in chunks."""
    n_rows = max(_VALUES_AT_ONCE // max(tensor.shape[-1], 1), 1)
    for rows in tensor.split(n_rows) if tensor.dim() > 1 else [tensor]:
        yield rows.to(torch.float32).contiguous().numpy()
