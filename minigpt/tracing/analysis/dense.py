"""Every row of every head in one safetensors file: written step by step, and read for a replay.

Shapes: L layers, H query heads, S positions in view, N positions of all rows together.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from minigpt.errors import ConfigError, DataError
from minigpt.files import resource_errors, writing_aside
from minigpt.tracing.config import TraceConfig
from minigpt.tracing.events import Trace
from minigpt.tracing.rows import RowReader, reduce_rows
from minigpt.tracing.selection import select_heads

_HEADER_BYTES = 4096


@contextmanager
def writing_rows(
    path: Path, *, n_layer: int, n_head: int, metadata: dict[str, str]
) -> Iterator[Callable[[Tensor], None]]:
    """Yield a function that adds the weights (L, H, S) of a step to a safetensors file.

    ``rows`` (N, L, H), float32: the weights of each step's row, one step after the other.
    ``offsets`` (steps + 1,), int32: step i has rows[offsets[i]:offsets[i + 1]]. The file appears at
    the end of the block, unless there was an exception.

    Args: metadata, of the safetensors header; short.
    Raises: ResourceError if the file cannot be written.
    """
    offsets = [0]
    with resource_errors(path), writing_aside(path) as file:
        file.write(bytes(_HEADER_BYTES))  # its sizes are known at the end

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
        # The format allows trailing blanks in a header.
        file.write(room.to_bytes(8, "little") + header.ljust(room))


def with_rows_of(trace: Trace, path: Path, config: TraceConfig, *, n_kept: int) -> Trace:
    """Return a trace whose rows are reduced anew, as if it had been traced with other options.

    Args: path, a file that ``writing_rows`` wrote for the same trace; config, whose layers, heads,
        reduce and n_sources are used; n_kept, the number of sources to keep of each head.
    Raises: ConfigError for heads that the model does not have, or reduce rollout; DataError if the
        file is not one of ``writing_rows``, or of another trace; ResourceError if reading it is not
        permitted.
    """
    if config.reduce == "rollout":
        raise ConfigError(
            "--reduce rollout needs the weights of all queries, and --dense has those of the "
            "generated tokens. Use mean or max."
        )
    header = trace.header
    shape = (header.n_layer, header.n_head)
    selection = select_heads(*shape, layers=config.layers, heads=config.heads)
    rows_NLH, offsets = _read_rows(path)
    lengths = [len(step.row.weights_S) for step in trace.steps]
    if rows_NLH.shape[1:] != shape or np.diff(offsets).tolist() != lengths:
        raise DataError(
            f"{str(path)!r} has rows of another trace. Name the file that --dense wrote with it."
        )
    reader = RowReader(sink=header.sink, n_prompt=len(header.prompt), n_sources=n_kept)
    steps = []
    for step, start, end in zip(trace.steps, offsets[:-1], offsets[1:], strict=True):
        rows_LHS = torch.from_numpy(np.ascontiguousarray(rows_NLH[start:end].transpose(1, 2, 0)))
        reduced_S = reduce_rows(rows_LHS, selection, is_max=config.reduce == "max")
        rows_RS = torch.cat((reduced_S[None], rows_LHS.flatten(0, 1)))
        row = reader.row("weight", rows_RS, trace.tokens[: end - start], header.n_layer)
        steps.append(replace(step, rows=(row,)))
    changed = replace(header, selection=selection, measures=("weight",), reduce=config.reduce)
    return replace(trace, header=changed, steps=tuple(steps))


def _read_rows(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Return rows (N, L, H) and offsets of a file, after checking that they fit together."""
    try:
        with resource_errors(path):
            tensors = load_file(path)
        rows_NLH, offsets = tensors["rows"], tensors["offsets"]
    except (OSError, SafetensorError, KeyError) as error:
        what = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(
            f"{str(path)!r} is not a file of --dense: {what}. Name one that --dense wrote."
        ) from None
    is_valid = rows_NLH.dtype == np.float32 and rows_NLH.ndim == 3 and offsets.ndim == 1
    if not is_valid or not len(offsets) or offsets[0] != 0 or offsets[-1] != len(rows_NLH):
        raise DataError(f"{str(path)!r} is not a file of --dense. Name one that --dense wrote.")
    if not np.isfinite(rows_NLH).all() or rows_NLH.min(initial=0) < 0:
        raise DataError(f"{str(path)!r} has weights that are negative, NaN or inf. Trace again.")
    return rows_NLH, offsets
