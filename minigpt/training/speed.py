"""How fast a run is: steps -> events with the speeds measured between them."""

from dataclasses import replace
from typing import TYPE_CHECKING

from minigpt.model.cost import training_flops_per_token
from minigpt.model.device import peak_flops
from minigpt.training.events import StepEvent
from minigpt.training.readings import Reading

if TYPE_CHECKING:
    from minigpt.training.trainer import Trainer


class Stopwatch:
    """Looks at a trainer's clock whenever a step is to be reported."""

    def __init__(self, trainer: "Trainer") -> None:
        """Start it."""
        self._trainer = trainer
        self._start = self._last = (trainer.step, trainer.elapsed_s, trainer.progress)
        config = trainer.config
        self._step_tokens = config.training.batch_size * config.sequence_length
        peak = peak_flops(trainer.device, trainer.dtype)
        self._peak_flops = peak * trainer.world.size if peak else None

    def event(self, reading: Reading) -> StepEvent:
        """Report the step that was taken last, and the speed since the last report."""
        trainer = self._trainer
        seconds = trainer.elapsed_s - self._last[1]
        tokens_per_s = (trainer.step - self._last[0]) * self._step_tokens / seconds
        used = trainer.progress - self._start[2]
        rate = (trainer.elapsed_s - self._start[1]) / used if used else 0.0
        self._last = (trainer.step, trainer.elapsed_s, trainer.progress)
        model = replace(trainer.config.model, context_length=trainer.context_length)
        flops_per_s = tokens_per_s * training_flops_per_token(model)
        return StepEvent(
            step=trainer.step,
            progress=trainer.progress,
            train_loss=reading.loss,
            lr=reading.lr,
            grad_norm=reading.grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=flops_per_s / self._peak_flops if self._peak_flops else None,
            elapsed_s=trainer.elapsed_s,
            remaining_s=rate * (1 - trainer.progress),
        )
