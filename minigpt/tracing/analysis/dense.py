"""Rows of all heads in one safetensors file, written step by step, and read for a replay.

Shapes: L layers, H query heads, S positions in view, N sum of S over all steps.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minigpt.checkpoint.stored_tensors import check_header
from minigpt.errors import ConfigError, DataError
from minigpt.files import resource_errors, writing_aside
from minigpt.text.escape import printable
from minigpt.tracing.analysis.tally import CauseTally
from minigpt.tracing.analysis_config import AnalysisConfig
from minigpt.tracing.findings import Effect, Row, Trace
from minigpt.tracing.head_lists import reduce_rows, select_heads
from minigpt.tracing.rows import RowSummarizer

_HEADER_BYTES = 4096
_LARGEST_WEIGHT = 1.01
"""1, plus rounding of bfloat16."""


@contextmanager
def writing_rows(
    path: Path, *, n_layer: int, n_head: int, metadata: dict[str, str]
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that appends the weights (L, H, S) of a step to a safetensors file.

    ``rows`` (N, L, H), float32: the weights of each step's row, concatenated over steps.
    ``offsets`` (steps + 1,), int32: step i has rows[offsets[i]:offsets[i + 1]]. The file appears at
    the end of the block, unless there was an exception.

    Args: metadata, for the safetensors header; must be short.
    Raises: ResourceError if the file cannot be written.
    """
    offsets = [0]
    with resource_errors(path), writing_aside(path) as file:
        file.write(bytes(_HEADER_BYTES))  # placeholder: the sizes are not known yet

        def add(weights_LHS: Tensor) -> None:
            rows_SLH = weights_LHS.permute(2, 0, 1).float().cpu().numpy()
            file.write(np.ascontiguousarray(rows_SLH, dtype="<f4").data)
            offsets.append(offsets[-1] + len(rows_SLH))

        yield add
        n_bytes = 4 * offsets[-1] * n_layer * n_head
        file.write(end := np.array(offsets, dtype="<i4").tobytes())
        tensors = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": place}
            for name, dtype, shape, place in (
                ("rows", "F32", [offsets[-1], n_layer, n_head], [0, n_bytes]),
                ("offsets", "I32", [len(offsets)], [n_bytes, n_bytes + len(end)]),
            )
        }
        header = json.dumps({"__metadata__": metadata} | tensors).encode()
        room = _HEADER_BYTES - 8
        assert len(header) <= room, "the metadata is too long"
        file.seek(0)
        # The format allows trailing spaces in a header.
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def with_rows_of(trace: Trace, path: Path, config: AnalysisConfig, *, n_kept: int) -> Trace:
    """Return a trace with its rows reduced again, as if it had been traced with other options.

    Args: path, a file that ``writing_rows`` wrote for the same trace; config, whose layers, heads
        and reduce are used; n_kept, the number of sources to keep per row.
    Raises: ConfigError for heads that the model does not have, or reduce rollout; DataError if the
        file was not written by ``writing_rows``, or for another trace; ResourceError if reading it
        is not permitted.
    """
    if config.reduce == "rollout":
        raise ConfigError(
            "--reduce rollout needs the weights of all queries, and --dense only has those of "
            "generated tokens. Use mean or max."
        )
    header = trace.header
    shape = (header.n_layer, header.n_head)
    selection = select_heads(*shape, layers=config.layers, heads=config.heads)
    offsets = [0, *accumulate(len(step.row.weights_S) for step in trace.steps)]
    rows_NLH = _read_rows(path, (offsets[-1], *shape), offsets)
    summarizer = RowSummarizer(sink=header.sink, n_prompt=len(header.prompt), n_sources=n_kept)
    steps, tally = [], CauseTally()
    for step, (start, end) in zip(trace.steps, pairwise(offsets), strict=True):
        rows_LHS = torch.from_numpy(np.ascontiguousarray(rows_NLH[start:end].transpose(1, 2, 0)))
        reduced_S = reduce_rows(rows_LHS, selection, is_max=config.reduce == "max")
        rows_RS = torch.cat((reduced_S[None], rows_LHS.flatten(0, 1)))
        [row] = summarizer.rows([rows_RS], trace.tokens, header.n_layer)
        # The knockouts stay the same, but are compared with the weights of the new rows.
        effects = tuple(_with_weight(effect, row) for effect in step.effects)
        steps.append(replace(step, rows=(row,), effects=effects))
        tally.add(steps[-1])
    changed = replace(
        header, selection=selection, measures=("weight",), reduce=config.reduce, against=None
    )
    errors = [] if config.reduce == "max" else [abs(step.row.total - 1) for step in steps]
    error = max(errors, default=None)
    footer = replace(trace.footer, worst_row_sum_error=error, cause=tally.check())
    return replace(trace, header=changed, steps=tuple(steps), footer=footer)


def _with_weight(effect: Effect, row: Row) -> Effect:
    weight = float(row.weights_S[effect.source.token.position])
    return replace(effect, source=replace(effect.source, weight=weight))


def _read_rows(path: Path, shape: tuple[int, int, int], offsets: list[int]) -> NDArray[np.float32]:
    """Return the rows (N, L, H) of a file, after checking that its header matches the trace."""
    expected = {"rows": ("F32", list(shape)), "offsets": ("I32", [len(offsets)])}
    try:
        with resource_errors(path):
            check_header(path)
            with safe_open(path, framework="numpy", backend="pread") as file:
                parts = {name: file.get_slice(name) for name in expected}
                found = {name: (p.get_dtype(), p.get_shape()) for name, p in parts.items()}
                is_its_own = found == expected and file.get_tensor("offsets").tolist() == offsets
                rows_NLH: NDArray[np.float32] = file.get_tensor("rows" if is_its_own else "offsets")
    except (OSError, SafetensorError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise DataError(
            f"{str(path)!r} is not a file of --dense: {printable(reason[:120])}. Name a file that "
            "--dense wrote."
        ) from None
    if not is_its_own:
        raise DataError(
            f"{str(path)!r} has rows of another trace. Name the file that --dense wrote with it."
        )
    if not ((rows_NLH >= 0) & (rows_NLH < _LARGEST_WEIGHT)).all():  # also false for NaN
        raise DataError(f"{str(path)!r} has weights below 0, above 1, NaN or inf. Trace again.")
    return rows_NLH
