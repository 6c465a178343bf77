"""Convert pickles to model folders: nanoGPT's ckpt.pt and Hugging Face's pytorch_model.bin.

Pickles are opened by torch.load with weights_only, which reads only tensors and plain values and
runs no code from the file. No other part of minigpt opens pickles.
"""

import re
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt.checkpoint.byte_pair_json import tokenizer_file
from minigpt.checkpoint.carried import CARRIED
from minigpt.checkpoint.config_json import config_json
from minigpt.checkpoint.folder import writing_folder
from minigpt.checkpoint.model_folder import (
    CONFIG,
    WEIGHTS,
    read_config,
    read_model,
    read_vocabulary,
    save_tensors,
    write_model,
)
from minigpt.checkpoint.published_models import canonical_names
from minigpt.checkpoint.stored_tensors import DTYPES, stored_tensors
from minigpt.checkpoint.tokenizer_json import tokenizer_from_json
from minigpt.checkpoint.tools.other_folders import not_a_model
from minigpt.checkpoint.tools.refusals import other_format
from minigpt.checkpoint.tools.weight_files import BIN, BIN_INDEX, INDEX, shard_names
from minigpt.config import ModelConfig
from minigpt.errors import CheckpointError, ConfigError, DataError, cut
from minigpt.files import open_regular, read_bytes, resource_errors, to_json
from minigpt.model import cost
from minigpt.settings import build
from minigpt.text.tokenizer import Tokenizer, make_tokenizer

_NANOGPT = "ckpt.pt"
_SHAPE = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
    "dropout": "dropout",
}
"""nanoGPT's model_args -> ModelConfig fields."""
_GPT2_TOKENS = range(50257, 50305)  # nanoGPT pads GPT-2's vocabulary to a multiple of 64
_COPIED = (".json", ".txt", ".jinja", ".md", ".model")


@dataclass(frozen=True)
class Imported:
    """A model folder converted from pickles."""

    source: str
    """Kind of the converted file."""
    n_parameters: int
    has_tokenizer: bool


def import_pickled(
    source: Path,
    out: Path,
    *,
    tokenizer: str | None = None,
    vocabulary: Path | None = None,
    activation: str | None = None,
) -> Imported:
    """Create a model folder from nanoGPT's ckpt.pt, or from a folder with pytorch_model.bin.

    Args: source, a file, or a folder that contains one; out, a new folder; the others are only for
        ckpt.pt: tokenizer, a spec of ``make_tokenizer``; vocabulary, the text that a
        character-level model was trained on; activation, gelu or gelu_tanh, None for gelu.
    Raises: CheckpointError if the file is malicious, damaged or of an unsupported model;
        ConfigError; DataError; ResourceError.
    """
    if not source.is_dir() and (what := not_a_model(source)):
        raise CheckpointError(what)
    folder = source if source.is_dir() else source.parent
    if not (folder / CONFIG).is_file():
        kind = f"{_NANOGPT} of nanoGPT"
        shape, tensors = _read_nanogpt(source / _NANOGPT if source.is_dir() else source)
        chosen = _tokenizer(shape["vocab_size"], tokenizer, vocabulary)
        shape |= {"activation": activation or "gelu"}
        write = partial(_write_nanogpt, shape=shape, tensors=tensors, tokenizer=chosen)
    elif tokenizer or vocabulary or activation:
        raise ConfigError(
            "--tokenizer, --vocabulary and --activation are for ckpt.pt of nanoGPT. "
            f"{str(folder)!r} has a config.json: leave them out."
        )
    else:
        kind = BIN
        names = _bin_names(folder) if source.is_dir() else [source.name]
        write = partial(_write_hugging_face, source=folder, names=names)
    with writing_folder(out, {"imported_from": source.name}) as aside:
        try:
            write(aside)
            config = read_config(aside)
            stored_tensors(config, aside)
            has_tokenizer = read_vocabulary(aside, config.vocab_size) is not None
        except (CheckpointError, DataError) as error:
            raise type(error)(str(error).replace(str(aside), str(source))) from None
    return Imported(kind, cost.parameter_count(config), has_tokenizer)


def _load(path: Path) -> Any:
    """Return the tensors and plain values of a pickle, without running any code in it."""
    warned: list[warnings.WarningMessage] = []
    try:
        with (
            resource_errors(path),
            open_regular(path) as file,
            warnings.catch_warnings(record=True) as warned,  # of pickle protocols other than 2
        ):
            warnings.simplefilter("always")
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error.strerror}.") from None
    except Exception as error:  # a damaged file may raise anything
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            raise CheckpointError(
                f"{str(path)!r} asks to run {cut(asked[1])} when it is opened. Nothing was run: "
                "only tensors and plain values are read. Save only the model's state_dict."
            ) from None
        if what := other_format(path):
            raise CheckpointError(f"{str(path)!r} {what}") from None
        if protocol := re.search(
            r"pickle protocol (\d+)", " ".join(str(w.message) for w in warned)
        ):
            raise CheckpointError(
                f"{str(path)!r} has pickle protocol {protocol[1]}, which torch.load does not read "
                "with weights_only. Save it again with torch.save's default protocol."
            ) from None
        raise CheckpointError(
            f"{str(path)!r} is not a complete torch.save file ({type(error).__name__}). "
            "Write or download it again."
        ) from None


def _state_dict(path: Path, value: Any) -> dict[str, Tensor]:
    """Return a state_dict without the name prefixes of torch.compile and DDP.

    Raises: CheckpointError if a value is not a tensor, or a name occurs twice.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(
            f"{str(path)!r} has no state_dict, which maps names to tensors. Choose another file."
        )
    tensors: dict[str, Tensor] = {}
    for name, tensor in value.items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
            raise CheckpointError(
                f"{str(path)!r}: {cut(name)} is not a dense tensor. Save only the model's "
                "state_dict."
            )
        plain = name.replace("_orig_mod.", "").removeprefix("module.")
        if tensors.setdefault(plain, tensor) is not tensor:
            raise CheckpointError(f"{str(path)!r} has {cut(plain)} twice. Write it again.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _read_nanogpt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the shape of nanoGPT's model, as fields of ModelConfig, and its state_dict."""
    if not path.exists():
        raise CheckpointError(
            not_a_model(path.parent)
            or f"there is no {str(path)!r}. Name nanoGPT's {_NANOGPT}, or a folder with "
            f"config.json and {BIN}."
        )
    checkpoint = _load(path)
    args = checkpoint.get("model_args") if isinstance(checkpoint, Mapping) else None
    if not isinstance(args, Mapping) or "model" not in checkpoint:
        raise CheckpointError(
            f"{str(path)!r} has no model_args with its model, unlike nanoGPT's {_NANOGPT}, and "
            "there is no config.json next to it. Put the model's config.json there."
        )
    if unknown := [str(name) for name in args if name not in (*_SHAPE, "bias")]:
        raise CheckpointError(
            f"{str(path)!r}: nanoGPT has no model_args {cut(unknown[0])}. Models of other programs "
            "cannot be imported."
        )
    if missing := [name for name in _SHAPE if name not in args]:
        raise CheckpointError(f"{str(path)!r}: model_args has no {missing[0]}. Write it again.")
    shape = {ours: args[theirs] for theirs, ours in _SHAPE.items()}
    tensors = _state_dict(path, checkpoint["model"])
    if args.get("bias", True) is False:
        tensors |= _zero_biases(tensors)
    return shape, tensors


def _zero_biases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for GPT-2's biases, for a nanoGPT model without biases."""
    biased = re.compile(r"transformer\.(.*\.c_\w+|.*\.ln_\d|ln_f)\.weight")
    return {
        f"{name.removesuffix('weight')}bias": weight.new_zeros(weight.shape[:1])
        for name, weight in tensors.items()
        if biased.fullmatch(name)
    }


def _write_nanogpt(
    folder: Path, shape: dict[str, Any], tensors: dict[str, Tensor], tokenizer: Tokenizer
) -> None:
    """Write nanoGPT's model in GPT-2's layout, with transposed matrices and all biases."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("transformer.wte.weight")
    is_tied = head is None or (embedding is not None and torch.equal(head, embedding))
    try:
        config = build(ModelConfig, shape | {"family": "gpt2", "tie_embeddings": is_tied})
    except ConfigError as error:
        raise CheckpointError(f"model_args of {str(folder)!r}: {error}") from None
    if is_tied:
        tensors.pop("lm_head.weight", None)
    written = {}
    for name, theirs in canonical_names(config, tensors).items():
        tensor = tensors[theirs]
        written[name] = tensor.t() if ".c_" in name and tensor.dim() == 2 else tensor
    _save(folder / WEIGHTS, written)
    with resource_errors(folder):
        (folder / CONFIG).write_bytes(to_json(config_json(config, tokenizer)))
    write_model(folder, read_model(folder).model, tokenizer)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, copying tensors that share memory, which it does not allow."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            raise CheckpointError(
                f"the tensor {cut(name)} in {str(path.parent)!r} is {tensor.dtype}, but only "
                "floating-point weights are read. Save the model in float32 or bfloat16."
            )
        address = tensor.untyped_storage().data_ptr()
        kept[name] = (tensor.clone() if address in seen else tensor).contiguous()
        seen.add(address)
    save_tensors(path, kept, {"format": "pt"})


def _tokenizer(vocab_size: Any, spec: str | None, text: Path | None) -> Tokenizer:
    """Return the vocabulary of nanoGPT's model, without opening its pickle, meta.pkl."""
    if spec and text:
        raise ConfigError("--tokenizer and --vocabulary are mutually exclusive. Leave one out.")
    if text:
        return _characters(vocab_size, text)
    if not spec and vocab_size not in _GPT2_TOKENS:
        raise ConfigError(
            f"the model has {str(vocab_size)[:20]} tokens, whose vocabulary nanoGPT stores in "
            "meta.pkl, a pickle that is never opened. Pass --vocabulary FILE with the training "
            "text (input.txt) if they are characters, or --tokenizer NAME."
        )
    kind = spec or "gpt2"
    if kind.partition(":")[0] == "bpe":
        raise ConfigError(
            f"--tokenizer {kind} would train a new vocabulary. Name the model's own, such as gpt2."
        )
    tokenizer = make_tokenizer(kind, ())
    if isinstance(vocab_size, int) and tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"--tokenizer {kind} has {tokenizer.vocab_size} tokens, but the model has "
            f"{vocab_size}. Name the one that it was trained with."
        )
    return tokenizer


def _characters(vocab_size: Any, path: Path) -> Tokenizer:
    """Return the vocabulary of nanoGPT's prepare.py: the sorted characters of a text."""
    try:
        with resource_errors(path):
            text = read_bytes(path).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--vocabulary {str(path)!r} cannot be read as UTF-8 text: {str(error)[:80]}. "
            "Name the text that prepare.py read (input.txt)."
        ) from None
    # nanoGPT reads the text with Python's universal newlines.
    characters = sorted(set(text.replace("\r\n", "\n").replace("\r", "\n")))
    if len(characters) != vocab_size:
        raise DataError(
            f"{str(path)!r} has {len(characters)} different characters, but the model has "
            f"{str(vocab_size)[:20]} tokens. Name the complete text that it was trained on."
        )
    model = {"type": "BPE", "vocab": {c: i for i, c in enumerate(characters)}, "merges": []}
    return tokenizer_from_json(tokenizer_file(model=model, decoder={"type": "Fuse"}), "characters")


def _write_hugging_face(folder: Path, source: Path, names: Sequence[str]) -> None:
    """Copy a Hugging Face folder, converting its pickles with these names to safetensors."""
    config = read_config(source)
    weight_map: dict[str, str] = {}
    for i, name in enumerate(names, start=1):
        shard = WEIGHTS if len(names) == 1 else f"model-{i:05}-of-{len(names):05}.safetensors"
        tensors = _state_dict(source / name, _load(source / name))
        theirs = canonical_names(config, tensors)
        _save(folder / shard, {ours: tensors[stored] for ours, stored in theirs.items()})
        weight_map |= dict.fromkeys(theirs, shard)
        del tensors
    with resource_errors(folder):
        if len(names) > 1:
            index = {"metadata": {}, "weight_map": weight_map}
            (folder / INDEX).write_bytes(to_json(index))
        carried = (path for pattern in CARRIED for path in source.glob(pattern))
        others = {path for path in source.iterdir() if path.suffix in _COPIED}.union(carried)
        for other in others:
            if other.is_file() and not other.name.endswith(".index.json"):
                copy = folder / other.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(other, copy)


def _bin_names(folder: Path) -> list[str]:
    if (folder / BIN).is_file():
        return [BIN]
    if (folder / BIN_INDEX).is_file():
        return shard_names(folder / BIN_INDEX)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        raise ConfigError(
            f"{str(folder)!r} is already a model folder, which --model can open. There is nothing "
            "to import."
        )
    raise CheckpointError(
        not_a_model(folder)
        or f"{str(folder)!r} has no {BIN}. Name a folder with config.json and {BIN}, or nanoGPT's "
        f"{_NANOGPT}."
    )
