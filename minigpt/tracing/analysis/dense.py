"""Every row of every head in one file, written as it comes.

Shapes: L layers, H query heads, S positions in view, N rows' positions in all.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from torch import Tensor

from minigpt.files import path_aside, rename_synced, resource_errors

_HEADER_BYTES = 4096


class DenseWriter:
    """Writes a safetensors file of all weights, without ever holding more than a step's.

    ``rows`` (N, L, H), float32: the positions that each step had in view, step after step;
    ``offsets`` (steps + 1,), int32: step i has rows[offsets[i]:offsets[i + 1]]. It is written aside
    and has its name when it is whole, as the header, which comes first, tells the sizes.
    """

    def __init__(self, path: Path, *, n_layer: int, n_head: int) -> None:
        """Begin a file.

        Raises: ResourceError if the folder cannot be written.
        """
        self.path, self._shape = path, (n_layer, n_head)
        self._aside = path_aside(path)
        self._offsets = [0]
        with resource_errors(path):
            self._file = self._aside.open("wb")
            self._file.write(bytes(_HEADER_BYTES))

    def write(self, weights_LHS: Tensor) -> None:
        """Add a step.

        Raises: ResourceError if the disk is full.
        """
        rows_SLH = weights_LHS.permute(2, 0, 1).float().cpu().numpy()
        with resource_errors(self.path):
            self._file.write(np.ascontiguousarray(rows_SLH, dtype="<f4").data)
        self._offsets.append(self._offsets[-1] + len(rows_SLH))

    def close(self, metadata: dict[str, str]) -> None:
        """Make the file whole.

        Args: metadata, texts that its header keeps.
        Raises: ResourceError if the disk is full.
        """
        offsets = np.array(self._offsets, dtype="<i4")
        n_values = self._offsets[-1] * self._shape[0] * self._shape[1]
        tensors = {
            "rows": _entry("F32", [self._offsets[-1], *self._shape], 0, 4 * n_values),
            "offsets": _entry("I32", [len(offsets)], 4 * n_values, offsets.nbytes),
        }
        header = json.dumps({"__metadata__": metadata} | tensors).encode()
        room = _HEADER_BYTES - 8
        assert len(header) <= room, "the metadata is too long"
        with resource_errors(self.path):
            self._file.write(offsets.data)
            self._file.seek(0)
            # The format lets a header end in blanks.
            self._file.write(room.to_bytes(8, "little") + header.ljust(room))
            rename_synced(self._file, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Clear away what was not made whole."""
        self._file.close()
        self._aside.unlink(missing_ok=True)


def _entry(dtype: str, shape: list[int], start: int, n_bytes: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, start + n_bytes]}
