"""Spectral indices: normalised differences of two bands, which light and shade hardly change.

All are (a - b) / (a + b), between -1 and 1. Indices with constants in the units of reflectance (EVI,
SAVI) are left out: the pixels of aerial tiles are not calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

INDICES: Mapping[str, tuple[str, str]] = {
    "ndvi": ("nir", "red"),  # vegetation: Rouse et al. 1974; Tucker 1979
    "ndwi": ("green", "nir"),  # open water: McFeeters 1996
    "ndre": ("nir", "rededge"),  # chlorophyll in dense canopies: Barnes et al. 2000
}
STEPS = 1 << 15  # an index is counted in whole multiples of 1 / STEPS, so that sums of it are exact


def indices_of(bands: Sequence[str]) -> tuple[str, ...]:
    """The indices that these bands suffice for, in the order of the table."""
    return tuple(name for name, pair in INDICES.items() if set(pair) <= set(bands))


def places(indices: Sequence[str], bands: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Of each index, where its two bands are.

    Raises:
        KeyError: there is no such index.
        ValueError: a band that it needs is not there.
    """
    missing = [band for name in indices for band in INDICES[name] if band not in bands]
    if missing:
        raise ValueError(f"there is no band {missing[0]} among {', '.join(bands)}")
    return tuple((bands.index(INDICES[n][0]), bands.index(INDICES[n][1])) for n in indices)


def sums_of_index(
    first: NDArray[Any], second: NDArray[Any], valid: NDArray[np.bool_]
) -> tuple[float, float]:
    """Sum and sum of squares of an index over valid pixels, exact for the rounded values.

    Args:
        first: (height, width), the band that counts up, finite where it is valid.
        second: the band that counts down, of the same shape and type.
        valid: of the same shape.
    """
    if first.dtype == np.uint8:
        pairs = (first.astype(np.uint16) << np.uint16(8) | second) * valid  # 0, 0 has the index 0
        counts = np.bincount(pairs.reshape(-1), minlength=1 << 16)
        return float(counts @ _OF_BYTES) / STEPS, float(counts @ _SQUARES) / STEPS**2
    values = _steps(first[valid], second[valid])
    return float(values.sum()) / STEPS, float(np.square(values).sum()) / STEPS**2


def ratio(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """The index of two bands, between -1 and 1; 0 where both are 0."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    total = a + b
    return np.clip(np.divide(a - b, total, out=np.zeros_like(total), where=total != 0), -1, 1)


def _steps(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.int64]:
    return np.rint(ratio(first, second) * STEPS).astype(np.int64)


_BYTES = np.arange(1 << 8, dtype=np.float64)
_OF_BYTES = _steps(np.repeat(_BYTES, 1 << 8), np.tile(_BYTES, 1 << 8))
_SQUARES = _OF_BYTES**2
