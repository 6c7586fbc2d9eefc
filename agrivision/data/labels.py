"""Label sets as bits: one uint16 a pixel says which classes hold there and whether it counts.

Bit c stands for the class with id c, background included: its bit is on where no other scored class
is. Bits from the number of classes up may stand for labels that are kept but not scored. Bit 15 says
that the pixel is valid: inside the field and photographed.
"""

from __future__ import annotations

import threading

import numpy as np
import zstandard
from numpy.typing import NDArray

from agrivision.errors import DatasetError

VALID_BIT = 15
MAX_CLASSES = VALID_BIT
_VALID = np.uint16(1 << VALID_BIT)
_LEVEL = 3  # zstd: higher levels save under 5 % on label images and cost much more time
_BLOCK_HEADER, _REPEATED = 3, 1  # of zstd: bytes before a block, and the kind that is one byte
_DESCRIPTOR, _CHECKSUM_FLAG, _CHECKSUM = (
    4,
    4,
    4,
)  # where the flags are, which one, and bytes of a checksum
_local = threading.local()  # holds each thread's tools of zstd, which only one may use at a time

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
    values, counts = _tally(labels.reshape(-1))
    return np.array(
        [counts[class_mask(values, class_id)].sum() for class_id in range(classes)], dtype=np.int64
    )


def _tally(labels: Labels) -> tuple[Labels, NDArray[np.int64]]:
    """Which values there are and how often, shapes (n,); one may come more than once."""
    ends = np.flatnonzero(labels[1:] != labels[:-1])  # of runs of the same value
    if len(ends) > labels.size // 8:  # noise: runs save nothing
        counts = np.bincount(labels)
        values = np.flatnonzero(counts)
        return values.astype(np.uint16), counts[values]
    ends = np.append(ends, labels.size - 1)
    return labels[ends], np.diff(ends, prepend=-1)


def compress(labels: Labels) -> bytes:
    """The content of a `.labels.zst` file: rows of little-endian uint16, compressed with zstd."""
    return _compressor().compress(np.ascontiguousarray(labels, dtype="<u2").data)


def decompress_into(content: bytes | memoryview, out: Labels) -> None:
    """Fill `out`, a C-contiguous (height, width) uint16 array, from a `.labels.zst` file's content.

    Where an error is raised, `out` may be filled in part.

    Raises:
        DatasetError: it is not one zstd frame of exactly that many bytes, and nothing else.
    """
    try:
        size = zstandard.frame_content_size(content)
        if size != out.nbytes:  # checked before anything is written
            raise DatasetError(f"labels of {size} bytes where {out.nbytes} belong")
        if _end_of_frame(content) != len(content):
            raise DatasetError("labels of another length than their zstd frame")
        # Room for all at once lets zstd write there directly, without a window of its own.
        with _decompressor().stream_reader(content) as reader:
            count = reader.readinto(out.data)
    except zstandard.ZstdError as error:
        raise DatasetError(f"labels cannot be decompressed ({error})") from None
    if count != size:
        raise DatasetError(f"labels end after {count} of {size} bytes")


def _end_of_frame(content: bytes | memoryview) -> int:
    """Where the first zstd frame ends, by the sizes of its blocks (RFC 8878, 3.1.1); beyond, if cut."""
    place, last = zstandard.frame_header_size(content), False
    while not last:
        header = int.from_bytes(content[place : place + _BLOCK_HEADER], "little")
        kind, size = header >> 1 & 3, header >> 3
        last = bool(header & 1) or place >= len(content)
        place += _BLOCK_HEADER + (1 if kind == _REPEATED else size)
    has_checksum = content[_DESCRIPTOR] & _CHECKSUM_FLAG
    return place + (_CHECKSUM if has_checksum else 0)


def _compressor() -> zstandard.ZstdCompressor:
    if not hasattr(_local, "compressor"):
        _local.compressor = zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True)
    compressor: zstandard.ZstdCompressor = _local.compressor
    return compressor


def _decompressor() -> zstandard.ZstdDecompressor:
    if not hasattr(_local, "decompressor"):
        _local.decompressor = zstandard.ZstdDecompressor()
    decompressor: zstandard.ZstdDecompressor = _local.decompressor
    return decompressor
