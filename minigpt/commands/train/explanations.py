"""Facts printed about a training run: its settings, the meaning of its losses, next commands."""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from minigpt.checkpoint.folder import Pointer
from minigpt.checkpoint.model_folder import name_of
from minigpt.checkpoint.resolve import SHIPPED, shipped_model, shown_name
from minigpt.commands.process import command_line
from minigpt.errors import DataError, MinigptError
from minigpt.format import count, duration, short
from minigpt.model.cost import parameter_count
from minigpt.model.device import has_fast_bfloat16
from minigpt.rings import find_ring, ring
from minigpt.training.events import EvalEvent
from minigpt.training.reports.curves import read_curves
from minigpt.training.schedule import steps_of_max_epochs
from minigpt.training.trainer import Trainer

_OVERFITTED = 0.6
"""Ratio of training to validation loss below which a model counts as overfitted."""
_LEAST_GAP = 0.1
"""Minimum difference of these losses, in nats/token, for a model to count as overfitted."""
_SHORT_TEXT = 100_000
"""Bytes below which a text is too short to learn a language's words from it."""
_CHAT_PROMPT, _PROMPT = "Hello", "Once upon a time"
_N_OPENING_TOKENS = 64
_N_PROMPT_WORDS, _LONGEST_PROMPT = 4, 40


def opening(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the facts of a run before its first step: its model, its text and its budget."""
    config, manifest = trainer.config, trainer.data.manifest
    model = config.model
    if config.from_ is not None and not trainer.step:
        yield "from", shown_name(Path(config.from_))
    yield from _saved(trainer)
    yield (
        "text",
        f"{manifest.n_tokens:,} tokens ({manifest.tokenizer}) of {manifest.n_bytes:,} "
        f"bytes; {manifest.validation(config.data.val_fraction)}",
    )
    for line in manifest.notes():
        yield "note", line
    is_shorter = config.sequence_length < model.context_length
    sequences = f", trained on {config.sequence_length}" if is_shorter else ""
    yield (
        "model",
        f"{short(parameter_count(model))} parameters ({model.kind}): "
        f"{count(model.n_layer, 'layer')}, {count(model.n_head, 'head')}, "
        f"width {model.d_model}, context {model.context_length}{sequences}",
    )
    yield "run", _budget(trainer)
    if slow := slow_dtype_note(trainer.device, trainer.dtype):
        yield "note", slow
    if resume := find_ring("commands.train.resume"):
        for line in resume.resumed_notes(trainer):
            yield "note", line
    if trainer.config.training.compile is None and (trainer.is_compiled or trainer.compile_failed):
        compiling = ring("training.compiling")
        yield "note", compiling.FAILED_NOTE if trainer.compile_failed else compiling.NOTE
    for line in _limits(trainer):
        yield "note", line
    is_new = config.from_ is None and not trainer.step
    if is_new and manifest.n_bytes < _SHORT_TEXT and shipped_model():
        yield (
            "note",
            f"{manifest.n_bytes:,} bytes are too few to learn most words: give more text, or for "
            f"English, --from {SHIPPED} (the model that ships)",
        )
    if trainer.progress >= 1:
        yield "", "already complete: raise --max-steps or --max-minutes to continue"
    elif trainer.is_early_stop_due:
        yield "", "stopped early: raise --patience to continue, or 0 for no limit"


def slow_dtype_note(device: torch.device, dtype: torch.dtype) -> str:
    """Return a note if this is a CPU without instructions for a dtype; "" if not."""
    if device.type != "cpu" or dtype != torch.bfloat16 or has_fast_bfloat16(device):
        return ""
    return (
        "this CPU has no bfloat16 instructions, so bfloat16 takes several times as long as "
        "--dtype float32"
    )


def _saved(trainer: Trainer) -> Iterator[tuple[str, str]]:
    """Yield the dtype of saved weights, unless it is float32 as usual."""
    chosen = trainer.config.training.save_dtype
    inherited = trainer.carried.dtype if trainer.carried else "float32"
    saved = inherited if chosen == "auto" else chosen
    if saved != "float32" or inherited != "float32":
        why = "as in the base; --save-dtype changes it" if chosen == "auto" else "--save-dtype"
        yield "saved", f"weights in {saved} ({why})"


def _budget(trainer: Trainer) -> str:
    training, world = trainer.config.training, trainer.world
    epochs = f" ({count(training.max_epochs, 'epoch')})" if _ends_by_epochs(trainer) else ""
    limits = [count(training.max_steps, "step") + epochs] if training.max_steps else []
    limits += [duration(60 * training.max_minutes)] if training.max_minutes else []
    n_ranks = f"{world.size} x " if world.size > 1 else ""
    shards = ", weights in shards," if world.is_sharded else ""
    device = f"{n_ranks}{world.device.type}{shards}"
    where = f", from step {trainer.step} on" if trainer.step else ""
    on = f"{device} in {name_of(trainer.dtype)}"
    return f"{trainer.folder.path}: {' or '.join(limits)} on {on}{where}"


def _limits(trainer: Trainer) -> Iterator[str]:
    """Yield the settings that were chosen against overfitting, unless the user chose others."""
    config, n_train_tokens = trainer.config, len(trainer.train_tokens)
    model, training, overfitting = config.model, config.training, find_ring("training.overfitting")
    if config.from_ is not None or not overfitting:
        return
    n_parameters = parameter_count(model)
    chosen = overfitting.text_settings(n_train_tokens, n_parameters, config.step_tokens)
    if training.dropout_start and model.dropout == chosen.get("model", {}).get("dropout"):
        yield (
            f"no dropout in the first {training.dropout_start:g} epochs, then {model.dropout:g}, "
            "for a text of this size (--dropout)"
        )
    is_chosen = training.max_epochs == chosen["training"].get("max_epochs")
    if is_chosen and _ends_by_epochs(trainer) and not trainer.step:
        yield (
            f"at most {count(training.max_epochs, 'epoch')} (--max-epochs): more did not lower the "
            "validation loss of texts of this size (docs/training.md)"
        )


def _ends_by_epochs(trainer: Trainer) -> bool:
    """Return whether ``max_epochs`` sets the number of steps."""
    limit = steps_of_max_epochs(trainer.config, len(trainer.train_tokens))
    return limit > 0 and limit == trainer.config.training.max_steps


def _perplexity(loss: float) -> str:
    perplexity = math.exp(min(loss, 700))
    return f"{perplexity:,.0f}" if 1000 <= perplexity < 1e6 else f"{perplexity:.3g}"


def meaning(
    trainer: Trainer,
    best: Pointer,
    evaluations: Sequence[EvalEvent],
    train_loss: float | None,
) -> Iterator[tuple[str, str]]:
    """Yield the meaning of the best checkpoint's loss, and notes on failed training.

    Args: evaluations, all that this process made; train_loss, the last one.
    """
    evaluation = evaluations[-1] if evaluations else None
    base_loss = _loss_before(trainer)
    val_loss = best.facts["val_loss"]
    yield "", _perplexities(trainer, best, base_loss)
    if base_loss is not None and val_loss >= base_loss and trainer.step:
        yield (
            "note",
            f"fine-tuning did not lower the validation loss, which was {base_loss:.4f} before: the "
            "base model predicts this text better. Try a lower --lr",
        )
    n_val = len(trainer.val_tokens) - 1
    # The validation tokens of chats include questions, which are never measured.
    if evaluation and evaluation.n_tokens < n_val and not _is_chat(trainer):
        yield (
            "",
            f"measured on {evaluation.n_tokens:,} of {n_val:,} validation tokens; minigpt "
            "evaluate measures all",
        )
    last = evaluation.val_loss if evaluation else val_loss
    if train_loss is not None and train_loss < min(_OVERFITTED * last, last - _LEAST_GAP):
        before = "The best checkpoint is from before that; more text would make it better"
        yield (
            "note",
            f"the model overfitted: at the end the training loss was {train_loss:.2f} "
            f"and the validation loss {last:.2f} nats/token. "
            f"{before if best.step < trainer.step else 'More text would make it better'}",
        )


def _loss_before(trainer: Trainer) -> float | None:
    """Return the validation loss of a fine-tuned run's base model; None if it is not logged."""
    if trainer.config.from_ is None:
        return None
    with suppress(MinigptError):  # a damaged log
        first = next(iter(read_curves(trainer.folder.path).val), None)
        return first.loss if first and not first.steps else None
    return None


def _perplexities(trainer: Trainer, best: Pointer, base_loss: float | None) -> str:
    """Return what a loss means as a perplexity. Args: base_loss, that before fine-tuning."""
    before, loss = "before fine-tuning", base_loss
    if trainer.config.from_ is None:
        before, loss = "untrained", math.log(trainer.config.model.vocab_size)
    weights = "averaged weights; " if best.facts.get("is_averaged") else ""
    perplexity = _perplexity(best.facts["val_loss"])
    text = f"{weights}perplexity {perplexity}: as uncertain as a choice between {perplexity} "
    text += "equally likely tokens"
    if loss is None:
        return text
    return f"{text} ({before}: {_perplexity(loss)}, {loss:.2f} nats/token)"


def _is_chat(trainer: Trainer) -> bool:
    """Return whether the text is conversations, a setting of the ring of corpora."""
    return getattr(trainer.config.data, "chat", False)


def next_commands(trainer: Trainer) -> list[str]:
    """Return the shell commands that use a trained model."""
    config = trainer.config.model
    words = ["--model", trainer.folder.path.name, *(["--chat"] if _is_chat(trainer) else [])]
    prompt = _CHAT_PROMPT if _is_chat(trainer) else _opening_words(trainer) or _PROMPT
    try:
        if len(trainer.data.tokenizer.encode_prompt(prompt)) <= config.context_length:
            words.append(prompt)
    except DataError:  # a character of the prompt is not in the vocabulary
        pass
    commands = [command_line("generate", *words)]
    if config.n_attention_layer:
        commands.append(command_line("attention-trace", *words))
    return commands


def _opening_words(trainer: Trainer) -> str:
    """Return the first words of a sentence or line of the validation text, as a prompt, or "".

    A model best continues text like that it was trained on. Without a validation text, the words
    are from the training text.
    """
    tokenizer = trainer.data.tokenizer
    span = trainer.val_tokens if len(trainer.val_tokens) > 1 else trainer.train_tokens
    n_tokens = min(_N_OPENING_TOKENS, len(span) - 1)
    ids = span.first_ids(n_tokens)
    text = tokenizer.decode(ids).strip("\ufffd")  # of characters cut by the window
    for special in tokenizer.special_ids:
        text = text.replace(special, "\n")
    parts = re.split("\n|[.!?][\"'\u201d\u2019)]*\\s|[\u3002\uff01\uff1f]", text)
    if not text.startswith("\n"):  # it starts inside a document
        parts = parts[1:] or parts
    prompts = filter(None, map(_first_words, parts))
    # Prefer words without apostrophes, which are easier to quote, from the start of a sentence.
    return min(prompts, key=lambda prompt: ("'" in prompt, prompt[0].islower()), default="")


def _first_words(text: str) -> str:
    """Return the first words of a text, as a prompt; "" if they would not print as they are."""
    words = text.split()[:_N_PROMPT_WORDS]
    if words and unicodedata.east_asian_width(words[0][0]) in "WF":  # a script without spaces
        words = [words[0][: 2 * _N_PROMPT_WORDS]]
    prompt = " ".join(words)
    is_plain = prompt.isprintable() and "\ufffd" not in prompt and not prompt.startswith("-")
    return prompt if is_plain and len(prompt) <= _LONGEST_PROMPT else ""
