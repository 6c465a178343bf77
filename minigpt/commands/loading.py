"""Loading a model, its tokenizer and a prompt for a command."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minigpt.checkpoint.model_folder import LoadedModel
from minigpt.checkpoint.resolve import resolve_model, shown_name
from minigpt.commands.options import Interventions, ModelSource, PromptForm
from minigpt.config import SamplingConfig
from minigpt.console import note
from minigpt.errors import DataError
from minigpt.generation import loading as models
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.text.tokenizer import Tokenizer

LONGEST_PROMPT_BYTES = 2**24


@dataclass(frozen=True)
class PromptedModel:
    """A loaded model and the encoded prompt that it continues."""

    model: LanguageModel
    """Model in evaluation mode."""
    tokenizer: Tokenizer
    folder: Path
    text: str
    """Prompt as given. Empty for the start of a new document."""
    prompt: list[int]
    """Token ids of the prompt."""
    chat: Any = None
    """Conversation started by the prompt, a ``text.chat.Chat``. None without a chat template."""
    intervention: Any = None
    """``InterventionConfig`` of the interventions in the model. None if there are none."""
    forced: Sequence[int] = ()
    """Token ids that the continuation begins with."""


def load_to_continue(
    source: ModelSource,
    prompt: str | None,
    form: PromptForm,
    sampling: SamplingConfig,
    interventions: Interventions,
    *,
    n_rows: int = 1,
) -> PromptedModel:
    """Load a model with interventions, and encode a prompt and the forced text after it."""
    prompted = load(source, prompt, form, n_rows=n_rows)
    if interventions.is_any:
        prompted = ring("commands.interventions").with_interventions(prompted, interventions, form)
    if sampling.force is None:
        return prompted
    forced = ring("generation.forcing").forced_ids
    ids = forced(
        prompted.tokenizer, sampling, prompted.model, prompted.prompt, special=form.special
    )
    return replace(prompted, forced=ids)


def load(
    source: ModelSource, prompt: str | None, form: PromptForm, *, n_rows: int = 1
) -> PromptedModel:
    """Load a model and encode a prompt for it; None starts a new document.

    Prints a note if a special token in the prompt is treated as plain text.

    Args: n_rows, the number of samples to decode together.
    Raises: DataError for a prompt that is empty, not text or far too long; CheckpointError for a
        model that is missing or damaged; ConfigError for an unavailable device or template.
    """
    text = _read_prompt(prompt)
    templates = ring("text.chat") if form.chat else None
    if templates:  # before the model is loaded, which takes longer
        template = templates.read_chat_template(resolve_model(source.model), form.chat_template)
    loaded = load_model(source, for_decoding=True, n_rows=n_rows)
    folder = loaded.folder
    tokenizer = models.tokenizer_of(loaded)
    if templates:
        tokenizer = templates.ending_turns(tokenizer, template)
        chat = templates.Chat(template, tokenizer, form.system)
        ids = chat.ask(text)[0] if prompt is not None else []
        return PromptedModel(loaded.model, tokenizer, folder, text, ids, chat)
    ids = models.encode_prompt(tokenizer, text, special=form.special)
    if loaded.tokenizer is None:
        note(f"{folder} has no tokenizer: texts are token ids, as in '5 9 40'")
    if not form.special:
        note_special(tokenizer, text)
    return PromptedModel(loaded.model, tokenizer, folder, text, ids)


def note_special(tokenizer: Tokenizer, text: str) -> bool:
    """Note a special token in a prompt that is treated as plain text; return whether it has one."""
    found = tokenizer.special_pattern.search(text)
    if found:
        note(f"{found[0]} in the prompt is plain text; --special makes it the special token")
    return bool(found)


def load_model(source: ModelSource, *, for_decoding: bool = False, n_rows: int = 1) -> LoadedModel:
    """Find and load a model. Args: as for ``models.load``."""
    use_threads(source.threads)
    return models.load(
        resolve_model(source.model),
        device=source.device,
        dtype=source.dtype,
        quantize=source.quantize,
        for_decoding=for_decoding,
        compile=source.compile,
        n_rows=n_rows,
    )


def show_model(folder: Path) -> None:
    """Print the model's name on stderr: its folder, or that it ships with minigpt."""
    name = shown_name(folder)
    note(f"model {name}" if name == str(folder) else f"model {name}, which ships with minigpt")


def use_threads(threads: int | None) -> None:
    """Set the number of CPU threads that torch uses; None leaves the default."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if openmp := find_ring("commands.openmp"):
        openmp.share_cores(torch.get_num_threads())


def compiling(
    model: LanguageModel, compile: bool | None, n_rows: int = 1
) -> AbstractContextManager[Any]:
    """Return a context in which to create a decoder; it shows when the model is being compiled."""
    shown = find_ring("commands.display.compiling")
    return shown.showing(model, compile, n_rows) if shown else nullcontext()


def _read_prompt(prompt: str | None) -> str:
    """Return the prompt's text, every byte preserved; read it from standard input for ``-``."""
    if prompt is None:
        return ""
    data, where = prompt.encode(errors="surrogateescape"), "the prompt"
    if prompt == "-":
        if sys.stdin.isatty():
            print("Type the prompt; Ctrl-D ends it.", file=sys.stderr)  # noqa: T201
        data = sys.stdin.buffer.read(LONGEST_PROMPT_BYTES + 1)
        where = "the prompt on standard input"
    if not data:
        raise DataError(f"{where} is empty. Give some text, or no prompt for a new document.")
    return decode_prompt(data, where)


def decode_prompt(data: bytes, where: str) -> str:
    """Decode a prompt from UTF-8; raise DataError if it is invalid or far too long."""
    if len(data) > LONGEST_PROMPT_BYTES:
        raise DataError(
            f"{where} is longer than {LONGEST_PROMPT_BYTES // 2**20} MiB, too long for any "
            "context. Give only its end."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8 text: byte {error.start} is invalid. Convert it first, for "
            "example with iconv."
        ) from None
