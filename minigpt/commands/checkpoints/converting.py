"""Export a model to GGUF, and import one from pickles; each docstring is the command's --help."""

import os
import shlex
from pathlib import Path
from typing import Annotated

from rich.text import Text

from minigpt import console
from minigpt.checkpoint.resolve import resolve_model
from minigpt.commands import tables
from minigpt.commands.options import Json, Option, argument, command
from minigpt.errors import ConfigError
from minigpt.format import short, with_unit
from minigpt.rings import ring
from minigpt.text.escape import one_line

_TYPES = ("f32", "f16", "bf16", "q8_0")


@command
def export(
    model: Annotated[str, argument("MODEL", "Model folder, name of a run, or org/name on the Hub")],
    *,
    gguf: Annotated[Path, Option("GGUF file to write", "Output")],
    type_: Annotated[
        str, Option("Type of the weights", "Output", name="type", choices=_TYPES)
    ] = "f16",
    as_json: Json = False,
) -> None:
    """Write a model as a GGUF file for llama.cpp and Ollama.

    The file contains the model's weights, vocabulary, special tokens and chat template. llama.cpp
    encodes texts to the same ids, and with --type f32 generates the same greedy text. Models and
    vocabularies that it would handle differently are refused; docs/export.md lists them.

    q8_0 stores 8-bit weights with one scale per 32; matrices whose row length is not a multiple of
    32 become f16. Vectors and learned positions are always f32.
    """
    from minigpt.checkpoint.tools.gguf import export_gguf  # imports torch; list does not

    if os.path.lexists(gguf):
        raise ConfigError(f"{str(gguf)!r} exists already. Choose another --gguf.")
    exported = export_gguf(resolve_model(model), gguf, type_)
    for note in exported.notes:
        console.note(f"note: {note}")
    words = "llama-cli" if exported.is_chat else "llama-completion -p 'Once upon a time'"
    # Without a vocabulary, llama.cpp's programs have no way to enter a prompt.
    run = f"{words} -m {shlex.quote(str(gguf))}" if exported.has_vocabulary else None
    if as_json:
        record = {"file": gguf, "type": type_, "n_bytes": exported.n_bytes, "run": run}
        tables.write_json(record | {"notes": exported.notes})
        return
    size = with_unit(exported.n_bytes, "B")
    line = f"{one_line(str(gguf))}: {size}, {type_}"
    tables.show([Text(f"{line}. Run it: {one_line(run)}" if run else line)])


@command
def import_(
    source: Annotated[
        str, argument("SOURCE", "nanoGPT's ckpt.pt, or a folder of pytorch_model.bin")
    ],
    folder: Annotated[str, argument("FOLDER", "New model folder")],
    *,
    tokenizer: Annotated[
        str | None,
        Option("Vocabulary of a ckpt.pt", "Vocabulary", "NAME", shown="gpt2, if the size matches"),
    ] = None,
    vocabulary: Annotated[
        Path | None,
        Option("Text that a character-level ckpt.pt was trained on", "Vocabulary", shown="none"),
    ] = None,
    activation: Annotated[
        str | None,
        Option("Activation of a ckpt.pt", "Model", shown="gelu", choices=("gelu", "gelu_tanh")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Create a model folder from a pickle.

    Reads nanoGPT's ckpt.pt, and Hugging Face folders with weights in pytorch_model.bin, one file or
    several. Only tensors and plain values are read from a pickle; its code is never run. --model
    never opens a pickle.

    nanoGPT stores the vocabulary of a character-level model in meta.pkl, which is never opened.
    Instead, --vocabulary names the text that prepare.py read: the vocabulary is its sorted
    characters. nanoGPT used gelu_tanh before June 2023; its checkpoints do not record this.
    """
    from minigpt.checkpoint.tools.pickled import import_pickled

    if not folder:
        raise ConfigError("FOLDER is empty. Give a path.")
    if os.path.lexists(folder):
        raise ConfigError(f"{folder!r} exists already. Choose another FOLDER.")
    imported = import_pickled(
        Path(source),
        Path(folder),
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        activation=activation,
    )
    if not imported.has_tokenizer:
        remedy = ring("checkpoint.vocabulary_files").tokenizer_remedy(Path(folder))
        console.note(
            "note: the model has no vocabulary, so prompts and texts are token ids, and training, "
            f"evaluation and chat are not possible. {remedy}"
        )
    if as_json:
        record = {"folder": folder, "source": imported.source}
        tables.write_json(record | {"n_parameters": imported.n_parameters})
        return
    prompt = "" if imported.has_tokenizer else " '0 1 2'"
    run = one_line(f"minigpt generate --model {shlex.quote(folder)}{prompt}")
    what = f"{short(imported.n_parameters)} parameters from {imported.source}"
    tables.show([Text(f"{one_line(folder)}: {what}. Run it: {run}")])
