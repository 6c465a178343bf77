"""Text sampled from a model while it is trained."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from rich.text import Text

from minigpt.commands.display.status_line import FREE_CELLS
from minigpt.config import SamplingConfig
from minigpt.errors import CheckpointError
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import stream_text
from minigpt.model.language_model import LanguageModel
from minigpt.text.escape import printable
from minigpt.training.trainer import Trainer

_SAMPLE = SamplingConfig(max_new_tokens=200, temperature=0.8)
_GLIMPSE = replace(_SAMPLE, max_new_tokens=80)
_WIDEST_GLIMPSE = 100
_BAR = "  | "  # before each line, so that model text cannot pass for our own


def sample_lines(model: LanguageModel, trainer: Trainer) -> list[str]:
    """Return a sample as lines."""
    return [f"{_BAR}{line}" for line in draw_sample(model, trainer).splitlines()]


def glimpse(trainer: Trainer, width: int) -> Iterator[Text]:
    """Yield one line of sampled text, unless ``sample_every`` gives whole samples."""
    # One rank cannot sample from sharded parameters. With sample_every, SampleEvents do it.
    if trainer.world.is_sharded or trainer.config.training.sample_every is not None:
        return
    text = " ".join(draw_sample(trainer.model, trainer, _GLIMPSE).split())
    line = Text(f"{_BAR}{printable(text)}", "dim", no_wrap=True)
    line.truncate(min(width - FREE_CELLS, _WIDEST_GLIMPSE), overflow="ellipsis")
    yield line


def draw_sample(model: LanguageModel, trainer: Trainer, config: SamplingConfig = _SAMPLE) -> str:
    """Return text sampled from a run's current model, with the run's seed."""
    tokenizer = trainer.data.tokenizer
    model.eval()
    # Without a token that begins a text, begin as the validation text does.
    first = trainer.val_tokens.windows(np.zeros(1, np.int64), 1)[0].tolist()
    prompt = tokenizer.encode_prompt("") or first
    decoder = Decoder(model, prompt, max_new_tokens=config.max_new_tokens)
    steps = decoder.generate(config, seed=trainer.config.training.seed)
    try:
        text = "".join(item.text for item in stream_text(steps, tokenizer))
    except CheckpointError:  # NaN or inf in the logits
        raise trainer.metrics.diverged("a sample's logits are NaN or inf") from None
    model.train()
    return text
