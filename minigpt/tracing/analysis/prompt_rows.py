"""``--prompt-rows``: the tokens of the prompt as steps of a trace."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from minigpt.errors import ConfigError
from minigpt.generation.decoder import Decoder, Step, require_finite, to_host
from minigpt.generation.stream import TextStep


def require_rows(n_prompt: int) -> None:
    """Raise ConfigError if a prompt is too short to have a row."""
    if n_prompt == 1:
        raise ConfigError(
            "the prompt has one token, and only tokens after the first have rows. Give a longer "
            "prompt, or generate tokens without --prompt-rows."
        )


def prompt_steps(decoder: Decoder, n_best: int = 0) -> Iterator[TextStep]:
    """Yield the tokens of the prompt from the second on, as if they were generated.

    They are decoded one at a time, so that the recorder's latest pass is the one that predicted the
    step's token. Then the prompt is prefilled again in one pass, so that ``generate`` samples the
    same tokens as without these steps. Their text is empty, as it is not generated.

    Args: n_best, number of most probable tokens to report at each step.
    Raises: CheckpointError for NaN or inf in the logits.
    """
    decoder.cache.truncate(0)
    for index, (token, following) in enumerate(pairwise(decoder.prompt)):
        logits = decoder.logits([token])[None]
        [result] = to_host(logits, torch.tensor([following], device=logits.device), n_best)
        require_finite(result, index + 1)
        step = Step(index, index + 1, following, result[1], None, result[2], is_forced=True)
        yield TextStep(step, "")
    decoder.prefill()
