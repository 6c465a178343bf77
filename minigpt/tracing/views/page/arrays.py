"""The rows of a trace as arrays of unsigned integers, packed into text for its page.

Shapes: L layers, H query heads, S positions in view, K sources kept per row.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt.tracing.analysis_config import facts_of
from minigpt.tracing.config import DIGITS
from minigpt.tracing.file import WORKING_ARRAYS
from minigpt.tracing.findings import Row, Trace

EFFECTS = "knockout"
"""The exact effects of all positions, shown as another measure."""
Scales = Mapping[str, float | None]
"""The largest magnitude in each measure, or None for a measure in shares."""
_NOISE = 1e-4  # a negative number smaller than this is rounding
_SIGNED_FACTS = ("sink", "own", "prompt")  # in the unit of the measure
_HEAD_FACTS = (*_SIGNED_FACTS, "entropy", "distance")


def count_sources(trace: Trace) -> int | None:
    """Return the number K of sources kept per head, or None if a row has none of single heads."""
    heads = [row.heads for step in trace.steps for row in step.rows]
    n_kept = [rows.positions.shape[2] for rows in heads if rows is not None]
    return max(n_kept) if n_kept and len(n_kept) == len(heads) else None


def find_scales(trace: Trace) -> Scales:
    """Return the scale of each measure, and that of the effects if they are of all positions."""
    scales: dict[str, float | None] = {}
    for i, measure in enumerate(trace.header.measures):
        rows = [step.rows[i] for step in trace.steps]
        heads = [row.heads.shown() for row in rows if row.heads is not None]
        parts = [row.weights_S for row in rows]
        parts += [getattr(h, name).ravel() for h in heads for name in ("weights", *_SIGNED_FACTS)]
        numbers = _as_in_a_file(_concatenated(parts))
        is_signed = facts_of(measure).is_signed or numbers.min(initial=0) < -_NOISE
        scales[measure] = _largest(numbers) if is_signed else None
    if (changes := _changes(trace)).size:
        scales[EFFECTS] = _largest(_as_in_a_file(changes))
    return scales


def pack(trace: Trace, n_sources: int | None, scales: Scales) -> dict[str, Any]:
    """Encode the arrays as text: all first bytes of an array, all second bytes, ...

    This places the zero bytes of small numbers next to each other, which compresses well.
    """
    arrays = _row_arrays(trace, n_sources, scales) | _working_arrays(trace)
    planes = [
        np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()
        for array in arrays.values()
    ]
    return {
        "arrays": [[name, array.itemsize, array.size] for name, array in arrays.items()],
        "deflated": base64.b64encode(zlib.compress(b"".join(planes))).decode("ascii"),
    }


def _row_arrays(trace: Trace, n_sources: int | None, scales: Scales) -> dict[str, NDArray[Any]]:
    """Return each measure's full rows, and summaries of all heads' rows, as codes."""
    arrays: dict[str, NDArray[Any]] = {}
    for i, measure in enumerate(trace.header.measures):
        rows = [step.rows[i] for step in trace.steps]
        whole = _concatenated([row.weights_S for row in rows])
        arrays[f"{measure}.rows"] = _codes(whole, "<u2", scales[measure])
        if n_sources is not None:
            heads = _head_arrays(rows, n_sources, scales[measure])
            arrays |= {f"{measure}.{name}": array for name, array in heads.items()}
    if EFFECTS in scales:
        arrays[f"{EFFECTS}.rows"] = _codes(-_changes(trace), "<u2", scales[EFFECTS])
    return arrays


def _changes(trace: Trace) -> NDArray[np.float32]:
    """Return the changes of ln p of all steps, concatenated; empty if a step has none."""
    found = [step.changes_S for step in trace.steps if step.changes_S is not None]
    return _concatenated(found if len(found) == len(trace.steps) else [])


def _concatenated(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    return np.concatenate([np.empty(0, np.float32), *parts])


def _head_arrays(
    rows: Sequence[Row], n_sources: int, scale: float | None
) -> dict[str, NDArray[Any]]:
    heads = [row.heads.shown() for row in rows if row.heads is not None]

    def padded(name: str) -> NDArray[Any]:
        """Stack the arrays of all steps, padded because early steps have fewer than K sources."""
        arrays_LHK = [getattr(head_rows, name) for head_rows in heads]
        widths = [((0, 0), (0, 0), (0, n_sources - array.shape[2])) for array in arrays_LHK]
        return np.stack(list(map(np.pad, arrays_LHK, widths)))

    # Entropy and distance as shares of the largest possible value at each step.
    n_views = np.array([len(row.weights_S) for row in rows])[:, None, None]
    largest = {
        "entropy": np.maximum(np.log2(n_views), 1e-9),
        "distance": np.maximum(n_views - 1, 1),
    }
    arrays = {
        "positions": padded("positions").astype("<u2" if n_views.max() < 2**16 else "<u4"),
        "weights": _codes(padded("weights"), "u1", scale),
    }
    for name in _HEAD_FACTS:
        values = np.stack([getattr(head_rows, name) for head_rows in heads])
        values = values / largest.get(name, 1)
        arrays[name] = _codes(values, "u1", scale if name in _SIGNED_FACTS else None)
    return arrays


def _working_arrays(trace: Trace) -> dict[str, NDArray[Any]]:
    """Return the queries, keys and values of explained heads, as the bits of float32 numbers."""
    return {
        f"working{i}.{name}": np.ascontiguousarray(getattr(working, field), "<f4").view("<u4")
        for i, working in enumerate(trace.footer.workings)
        for name, field in WORKING_ARRAYS.items()
    }


def _as_in_a_file(values: NDArray[Any]) -> NDArray[Any]:
    """Round numbers as in a trace file, so that a replay gives the same page."""
    return np.round(values.astype(np.float64), DIGITS)


def _largest(numbers: NDArray[Any]) -> float:
    return max(1e-9, float(np.abs(numbers).max(initial=0)))


def _codes(values: NDArray[Any], dtype: str, scale: float | None) -> NDArray[Any]:
    """Encode numbers as unsigned integers, with finer steps for small numbers.

    Shares, without a scale: a code c means (c / m)^2, where m is the dtype's largest integer.
    Signed numbers: it means scale (c - m) |c - m| / (m - 1)^2, where m is the middle.
    """
    values = _as_in_a_file(values)
    largest = np.iinfo(dtype).max
    if scale is None:
        return np.rint(np.sqrt(np.clip(values, 0.0, 1.0)) * largest).astype(dtype)
    middle = (largest + 1) // 2
    clipped = np.clip(values / scale, -1.0, 1.0)
    roots = np.sign(clipped) * np.sqrt(np.abs(clipped))
    return (middle + np.rint(roots * (middle - 1))).astype(dtype)
