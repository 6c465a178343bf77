"""The Python API of generation: ``minigpt.load`` and ``minigpt.generate``."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.checkpoint.model_folder import LoadedModel
from minigpt.checkpoint.resolve import resolve_model
from minigpt.config import SamplingConfig
from minigpt.errors import ConfigError, cut, nearest
from minigpt.generation import loading
from minigpt.generation.decoder import Decoder, check_prompt, fresh_seed
from minigpt.generation.forcing import forced_ids
from minigpt.generation.loading import encode_prompt, make_decoder, require_new_tokens, tokenizer_of
from minigpt.generation.samples import stream_samples
from minigpt.generation.stream import TextStep
from minigpt.model.device import torch_modes
from minigpt.model.language_model import LanguageModel
from minigpt.rings import find_ring, ring
from minigpt.settings import build
from minigpt.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from minigpt.intervention_config import InterventionConfig

_LISTS = ("ablate", "explain", "heads", "layers", "patch", "verify_heads", "verify_layers")

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""Text, token ids, or the messages of a chat."""
Prompts = Prompt | Sequence[str] | Sequence[Sequence[int]] | Tensor | NDArray[Any]
"""A prompt, or a list of texts or of lists of token ids; ids may be a tensor or an array."""


Models = str | Path | LoadedModel | LanguageModel | None
"""A model as ``--model`` names it, or one in memory. None for the newest run."""


def load(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    for_decoding: bool = False,
) -> LoadedModel:
    """Load a model once, for several calls of ``minigpt.generate`` and ``minigpt.trace``.

        import minigpt

        book = minigpt.load("book")
        ids = book.tokenizer.encode_prompt("Once upon a time")
        logits = book.model(torch.tensor([ids]))  # (B, T, V)

    ``book.model`` is an ``nn.Module`` in evaluation mode, whose parameters do not require
    gradients; ``book.folder`` is its folder.

    Args:
        model: as for ``--model``. None for the newest run.
        device, dtype, quantize: as for the command; also a ``torch.device`` and a ``torch.dtype``.
        for_decoding: whether to lay out the weights for decoding instead of keeping ``nn.Linear``
            modules: calls need no second copy of them, but changes to ``layer.weight`` have no
            effect.
    Raises: CheckpointError for a model that is missing or damaged; ConfigError for a device or
        quantization that is unknown or not available.
    """
    with torch_modes():
        loaded = loading.load(
            resolve_model(model_name(model)),
            device=plain_value(device),
            dtype=plain_value(dtype),
            quantize=quantize,
            for_decoding=for_decoding,
        )
    return replace(loaded, tokenizer=tokenizer_of(loaded))


def generate(
    model: Models,
    prompt: Prompts = "",
    *,
    tokenizer: Tokenizer | None = None,
    special: bool = False,
    chat_template: str | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    quantize: str | None = None,
    compile: bool | None = None,
    **sampling: Any,
) -> Iterator[TextStep]:
    """Generate text after a prompt: yield each token with the text that it completes.

        import minigpt

        for step in minigpt.generate("book", "Once upon a time", temperature=0.7, seed=1):
            print(step.text, end="", flush=True)

    The same settings give the same text as ``minigpt generate``.

    Args:
        model: as for ``--model``, or the result of ``minigpt.load``, or a LanguageModel in
            evaluation mode.
        prompt: text, token ids, the messages of a chat (``[{"role": "user", "content": "Hi"}]``),
            or a list of texts or of lists of token ids. Empty text starts a new document. Sample j
            of prompt i has index i * num_samples + j, which is added to the seed.
        tokenizer: needed only for a LanguageModel, which takes no messages.
        special: whether to parse special tokens in text.
        chat_template: as for the command.
        device, dtype, quantize: as for ``minigpt.load``; only for a model that is not loaded yet.
        compile: whether to decode with a compiled graph. None: on CUDA, and on a CPU if one is in
            the cache.
        sampling: fields of SamplingConfig (temperature, top_k, stop=("text",), seed...) and of
            InterventionConfig, whose patch_from may be text, token ids or messages. Heads are
            "1.3,0.*" or [(1, 3), "0.*"], layers "0,2" or [0, 2].
    Returns: the steps; those of several samples (``step.sample``) alternate. ``step.step.finish``
        of a sample's last step says why it ended.
    Raises: when called, ConfigError for an invalid setting, CheckpointError for a model that is
        missing or damaged, DataError for a prompt that is empty or too long; during iteration,
        CheckpointError for NaN or inf in the logits.
    """
    options = checked_options(generate, sampling, SamplingConfig)
    interventions, source = interventions_in(options)
    config = build(SamplingConfig, options)
    require_new_tokens(config)
    network, tokenizer, folder = model_and_tokenizer(
        model,
        tokenizer,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compile=compile,
        n_rows=config.num_samples,
    )
    seed = fresh_seed() if config.seed is None else config.seed
    encode = partial(
        prompt_ids, tokenizer, folder=folder, special=special, chat_template=chat_template
    )
    prompts, _ = prompts_of(prompt)
    encoded = [encode(one) for one in prompts]
    for ids, _ in encoded:
        check_prompt(ids, network.config, config.overflow)
    forced = [forced_ids(ending, config, network, ids, special=special) for ids, ending in encoded]

    def decoder_of(ids: list[int]) -> Decoder:
        changed, _ = intervened(network, interventions, ids, encode, tokenizer, source)
        with torch_modes():
            return make_decoder(changed, ids, config, compile=compile)

    first_decoder = decoder_of(encoded[0][0])

    def steps() -> Iterator[TextStep]:
        for number, (ids, ending) in enumerate(encoded):
            first = number * config.num_samples
            decoder = decoder_of(ids) if number else first_decoder
            for item in stream_samples(
                decoder, ending, config, seed=seed + first, forced=forced[number]
            ):
                yield replace(item, sample=first + item.sample)

    return _in_modes(steps())


def _in_modes(items: Iterator[TextStep]) -> Iterator[TextStep]:
    """Yield items that are computed in ``torch_modes``; in between, the caller's modes hold."""
    while True:
        with torch_modes():
            item = next(items, None)
        if item is None:
            return
        yield item


def checked_options(function: Any, options: Mapping[str, Any], *configs: type) -> dict[str, Any]:
    """Return a function's other keyword arguments, with lists of heads and layers as text.

    Args: configs, dataclasses whose fields are allowed, in addition to those of InterventionConfig.
    Raises: ConfigError for an unknown argument.
    """
    changes = find_ring("intervention_config")
    types = (*configs, changes.InterventionConfig) if changes else configs
    names = [f.name for config in types for f in fields(config)]
    checked = dict(options)
    for name, value in options.items():
        if name not in names:
            names += function.__kwdefaults__
            raise ConfigError(f"unknown setting {name}. {nearest(name, names)}")
        checked[name] = plain_value(value)
        listed = _as_list(value)
        if name in _LISTS and isinstance(listed, list | range):
            parts = (part if isinstance(part, list) else [part] for part in listed)
            checked[name] = ",".join(".".join(map(str, part)) for part in parts)
    return checked


def plain_value(value: Any) -> Any:
    """Return an argument as the command takes it: numbers of Python, names and paths as text."""
    if isinstance(value, Path | torch.device):
        return str(value)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    is_array = isinstance(value, np.generic | np.ndarray | Tensor)
    return value.item() if is_array and value.ndim == 0 else value


def interventions_in(
    options: dict[str, Any],
) -> tuple["InterventionConfig | None", Prompt | None]:
    """Remove interventions from options; return them, and ``patch_from`` if it is not text."""
    configs = find_ring("intervention_config")
    if configs is None:
        return None, None
    config = configs.InterventionConfig
    names = {f.name for f in fields(config)}
    chosen = {name: options.pop(name) for name in names & options.keys()}
    source = _as_list(chosen.get("patch_from"))
    if source is None or isinstance(source, str):
        return build(config, chosen), None
    _require_prompt(source)
    return build(config, chosen | {"patch_from": ""}), source


def intervened(
    model: LanguageModel,
    config: "InterventionConfig | None",
    prompt: Sequence[int],
    encode: Callable[[Prompt], tuple[list[int], Tokenizer]],
    tokenizer: Tokenizer,
    source: Prompt | None,
) -> tuple[LanguageModel, "InterventionConfig | None"]:
    """Return a model with interventions, and their config with its position; None if none are set.

    Args: encode, ``prompt_ids`` of a prompt; source, a ``patch_from`` that is not text.
    """
    if config is None or not config.is_any:
        return model, None
    if source is not None:
        ids, _ = encode(source)
        if any(not 0 <= token < model.config.vocab_size for token in ids):
            raise ConfigError(
                f"patch_from has token ids outside 0 to {model.config.vocab_size - 1}."
            )
        config = replace(config, patch_from=tokenizer.decode(ids))

    def encode_source(text: str) -> list[int]:
        return encode(text)[0] if source is None else ids

    with torch_modes():
        return ring("tracing.interventions").intervene(model, config, prompt, encode_source)


def prompts_of(prompt: Prompts) -> tuple[list[Prompt], bool]:
    """Return the prompts, and whether they were given as a list of texts or of lists of token ids.

    Raises: ConfigError for a list that mixes them.
    """
    prompt = _as_list(prompt)
    _require_prompt(prompt)
    if isinstance(prompt, str):
        return [prompt], False
    is_text = [isinstance(one, str) for one in prompt]
    is_nested = [isinstance(one, Sequence) and not isinstance(one, str) for one in prompt]
    if prompt and (all(is_text) or all(is_nested)):
        return list(prompt), True
    if any(is_text) or any(is_nested):
        raise ConfigError(
            "a list of prompts must be all texts or all lists of token ids. Use one call for "
            "each kind."
        )
    return [prompt], False  # type: ignore[list-item]


def _as_list(value: Any) -> Any:
    """Return a tensor, an array, or a sequence of them as lists; anything else unchanged."""
    if isinstance(value, list | tuple):
        return [_as_list(item) for item in value]
    return value.tolist() if isinstance(value, Tensor | np.ndarray) else value


def _require_prompt(prompt: object) -> None:
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray | memoryview):
        raise ConfigError(
            f"a prompt must be text or a list of token ids: it is of type {type(prompt).__name__}."
        )


def model_name(model: object) -> str | None:
    """Return a model as ``--model`` names it; None for the newest run.

    Raises: ConfigError for a value of another type.
    """
    if not isinstance(model, str | Path | None):
        remedy = ""
        if hasattr(model, "save_pretrained"):  # a model of transformers
            remedy = " Save it and its tokenizer with save_pretrained(FOLDER), and give the folder."
        raise ConfigError(
            "a model must be given as the name of a run, a folder or org/name: it is of type "
            f"{type(model).__name__}.{remedy}"
        )
    return None if model is None else str(model)


def model_and_tokenizer(
    model: Models,
    tokenizer: Tokenizer | None,
    *,
    device: str | torch.device,
    dtype: str | torch.dtype,
    quantize: str | None,
    compile: bool | None,
    n_rows: int = 1,
) -> tuple[LanguageModel, Tokenizer, str]:
    """Return a model, its tokenizer and its folder ("" for a LanguageModel); see ``generate``."""
    if not isinstance(tokenizer, Tokenizer | None):
        raise ConfigError(
            "tokenizer must be one of minigpt, as in minigpt.load(MODEL).tokenizer: it is of type "
            f"{type(tokenizer).__name__}. To use that of another folder, copy its tokenizer.json "
            "and tokenizer_config.json into the model's folder."
        )
    given: dict[str, Any] = {
        "device": plain_value(device),
        "dtype": plain_value(dtype),
        "quantize": quantize,
    }
    if isinstance(model, LanguageModel | LoadedModel):
        for name, value in given.items():
            if value not in ("auto", None):
                raise ConfigError(
                    f"{name} is chosen when a model is loaded, but this model is already loaded. "
                    f"Pass {name} to minigpt.load."
                )
    if isinstance(model, LanguageModel):
        if tokenizer is None:
            raise ConfigError("a LanguageModel has no tokenizer. Pass tokenizer as well.")
        if model.training and model.config.dropout:
            raise ConfigError(
                f"the model is in training mode, so its dropout of {model.config.dropout} would "
                "change every prediction. Call model.eval() first."
            )
        return model, tokenizer, ""
    if not isinstance(model, LoadedModel):
        folder = resolve_model(model_name(model))
        with torch_modes():
            model = loading.load(folder, for_decoding=True, compile=compile, n_rows=n_rows, **given)
    return model.model, tokenizer or tokenizer_of(model), str(model.folder)


def prompt_ids(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    folder: str,
    special: bool,
    chat_template: str | None,
) -> tuple[list[int], Tokenizer]:
    """Return the token ids of a prompt, and the tokenizer with the tokens that end its answer.

    Args: folder, the model's, needed for chat messages; the others as for ``generate``.
    Raises: as ``encode_prompt``, and ConfigError if there is no chat template.
    """
    _require_prompt(prompt)
    if isinstance(prompt, str):
        return encode_prompt(tokenizer, prompt, special=special), tokenizer
    if not prompt or not isinstance(prompt[0], Mapping):
        for token in prompt:
            if isinstance(token, bool) or not hasattr(token, "__index__"):
                raise ConfigError(
                    f"token ids must be integers: the prompt has {cut(token)}, of type "
                    f"{type(token).__name__}."
                )
        return [int(token) for token in prompt], tokenizer  # type: ignore[arg-type]
    if not folder:
        raise ConfigError(
            "messages need the chat template of a model folder. Name the folder as the model."
        )
    chat = ring("text.chat")
    template = chat.read_chat_template(Path(folder), chat_template)
    messages = list(prompt)
    chat.check_messages(messages)
    return template.encode(tokenizer, messages), chat.ending_turns(tokenizer, template)
