"""Writing every row of every head to one safetensors file, step by step.

Shapes: L layers, H query heads, S positions in view, N positions of all rows together.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from minigpt.files import resource_errors, writing_aside

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
