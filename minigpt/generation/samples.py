"""Several samples of a prompt, decoded in batches."""

from collections.abc import Iterator, Sequence

from minigpt.config import ModelConfig, SamplingConfig
from minigpt.generation.decoder import Decoder
from minigpt.generation.stream import TextStep, TextStream
from minigpt.model.cache import cache_bytes_per_token
from minigpt.text.tokenizer import Tokenizer

_MAX_CACHE_BYTES = 2**30
_MAX_ROWS = 256


def max_rows_together(config: ModelConfig, n_rows: int, n_positions: int) -> int:
    """Return how many of n rows to decode together: at least 1, with at most 1 GiB of cache."""
    row_bytes = min(n_positions, config.context_length) * cache_bytes_per_token(config)
    return max(1, min(n_rows, _MAX_ROWS, _MAX_CACHE_BYTES // row_bytes))


def stream_samples(
    decoder: Decoder,
    tokenizer: Tokenizer,
    sampling: SamplingConfig,
    *,
    seed: int,
    forced: Sequence[int] = (),
) -> Iterator[TextStep]:
    """Yield the steps of all samples, decoded in batches of ``decoder.n_rows``.

    Sample i has the seed ``seed + i``.

    Args: forced, the token ids of ``sampling.force``.
    Raises: CheckpointError for NaN or inf in the logits.
    """
    for first in range(0, sampling.num_samples, decoder.n_rows):
        numbers = range(first, min(first + decoder.n_rows, sampling.num_samples))
        streams = [TextStream(tokenizer, sampling.stop, number) for number in numbers]
        stopped: set[int] = set()
        for row, step in decoder.batch(
            sampling,
            seeds=[seed + number for number in numbers],
            end_of_text=tokenizer.end_of_text_ids,
            stopped=stopped,
            forced=forced,
        ):
            item = streams[row].push(step)
            if item.step.finish:
                stopped.add(row)
            yield item
