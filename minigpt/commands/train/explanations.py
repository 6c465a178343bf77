"""What the numbers of a training run mean."""

import math
from collections.abc import Iterator

from minigpt.checkpoint.folder import Pointer
from minigpt.commands.train.display import ends_by_epochs
from minigpt.training.events import EvalEvent
from minigpt.training.trainer import Trainer

_BY_HEART = 0.6
"""Ratio of training to validation loss below which a text counts as learned by heart."""


def limits(trainer: Trainer) -> Iterator[str]:
    """Yield what was chosen against overfitting."""
    model, training = trainer.config.model, trainer.config.training
    if model.dropout and training.dropout_start:
        yield (
            f"dropout {model.dropout:g} after {training.dropout_start:g} epochs, for a text of "
            "this size (--dropout)"
        )
    if training.dropout_start and ends_by_epochs(trainer) and not trainer.step:
        yield (
            f"the text is read at most {training.max_epochs:.3g} times (--max-epochs): more "
            "does not improve the model"
        )


def meaning(
    trainer: Trainer, best: Pointer, evaluation: EvalEvent | None, train_loss: float | None
) -> Iterator[tuple[str, str]]:
    """Yield what the loss of the best checkpoint means, and whether the text was learned by heart.

    Args: evaluation and train_loss, the last ones.
    """
    n_tokens, val_loss = trainer.config.model.vocab_size, best.facts["val_loss"]
    sure = "averaged weights; " if best.facts.get("is_averaged") else ""
    sure += f"as unsure as between {math.exp(min(val_loss, 700)):.3g} tokens"
    yield "", f"{sure}; guessing among all {n_tokens:,} is {math.log(n_tokens):.2f} nats/token"
    n_val = len(trainer.val_tokens) - 1
    if evaluation and evaluation.n_tokens < n_val:
        yield (
            "",
            f"measured on {evaluation.n_tokens:,} of {n_val:,} validation tokens; minigpt "
            "evaluate measures all",
        )
    last = evaluation.val_loss if evaluation else val_loss
    if train_loss is not None and train_loss < _BY_HEART * last:
        yield (
            "note",
            f"the text was learned by heart: at the end the training loss was {train_loss:.2f} "
            f"and the validation loss {last:.2f} nats/token. More text, more dropout or fewer "
            "epochs help",
        )
