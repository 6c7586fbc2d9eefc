"""Label sets as bits: one uint16 a pixel says which classes hold there and whether it counts.

Bit c stands for the class with id c, background included: its bit is on where no other scored class
is. Bits from the number of classes up may stand for labels that are kept but not scored. Bit 15 says
that the pixel is valid: inside the field and photographed.
"""

from __future__ import annotations

import numpy as np
import zstandard
from numpy.typing import NDArray

from agrivision.errors import DatasetError

VALID_BIT = 15
MAX_CLASSES = VALID_BIT
_VALID = np.uint16(1 << VALID_BIT)
_LEVEL = 3  # zstd: higher levels save under 5 % on label images and cost much more time

Labels = NDArray[np.uint16]


def valid_mask(labels: Labels) -> NDArray[np.bool_]:
    """Where a pixel counts: bool of the same shape."""
    mask: NDArray[np.bool_] = (labels & _VALID) != 0
    return mask


def class_mask(labels: Labels, class_id: int) -> NDArray[np.bool_]:
    """Where class `class_id` is in the label set of a valid pixel: bool of the same shape."""
    wanted = np.uint16(1 << class_id) | _VALID
    mask: NDArray[np.bool_] = (labels & wanted) == wanted
    return mask


def class_pixels(labels: Labels, classes: int) -> NDArray[np.int64]:
    """Valid pixels of each class, shape (classes,); a pixel with two labels counts for both."""
    counts = np.bincount(labels.reshape(-1)[valid_mask(labels).reshape(-1)], minlength=1 << 16)
    present = np.flatnonzero(counts)
    return np.array(
        [counts[present[(present >> class_id) & 1 == 1]].sum() for class_id in range(classes)],
        dtype=np.int64,
    )


def compress(labels: Labels) -> bytes:
    """The content of a `.labels.zst` file: rows of little-endian uint16, compressed with zstd."""
    raw = np.ascontiguousarray(labels, dtype="<u2").tobytes()
    return zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(raw)


def decompress_into(content: bytes | memoryview, out: Labels) -> None:
    """Fill `out`, a C-contiguous (height, width) uint16 array, from a `.labels.zst` file's content.

    Raises:
        DatasetError: it is not a zstd frame of exactly that many bytes.
    """
    try:
        size = zstandard.frame_content_size(content)
        if size != out.nbytes:  # checked before anything is allocated
            raise DatasetError(f"labels of {size} bytes where {out.nbytes} belong")
        raw = zstandard.ZstdDecompressor().decompress(content, max_output_size=out.nbytes)
    except zstandard.ZstdError as error:
        raise DatasetError(f"labels cannot be decompressed ({error})") from None
    out[...] = np.frombuffer(raw, dtype="<u2").reshape(out.shape)
