"""A TIFF reader of a page, to compare GDAL with: strips and tiles, plain or deflated."""

from __future__ import annotations

import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import Compression, Interleaving

_SIZES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "Q", 11: "f", 12: "d", 16: "Q"}
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _STRIPS, _SAMPLES = 256, 257, 258, 259, 273, 277
_ROWS, _COUNTS, _PLANAR, _PREDICTOR, _FORMAT = 278, 279, 284, 317, 339
_TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_COUNTS = 322, 323, 324, 325
_KNOWN = {
    254,
    262,
    266,
    274,
    282,
    283,
    296,
    305,
    306,
    338,
    33550,
    33922,
    34735,
    34736,
    34737,
    42112,
    42113,
}
_SINGLE = (_WIDTH, _HEIGHT, _COMPRESSION, _SAMPLES, _ROWS, _PLANAR, _PREDICTOR)
_SINGLE += (_TILE_WIDTH, _TILE_HEIGHT)  # of more than one value libtiff takes none, or the first
_KNOWN |= {256, 257, 258, 259, 273, 277, 278, 279, 284, 317, 339, 322, 323, 324, 325}


def encode(image: np.ndarray, tile: int = 0, **options: Any) -> bytes:
    """As somebody else's program might write it: plain, in strips or in tiles."""
    bands, height, width = image.shape
    blocks = {"tiled": True, "blockxsize": tile, "blockysize": tile} if tile else {}
    with rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=height, width=width, count=bands, dtype=image.dtype.name,
            photometric="MINISBLACK", alpha="NO", **blocks, **{"interleave": "pixel", **options},
        ) as dataset:  # fmt: skip
            dataset.write(image)
        return bytes(memory.getbuffer())


def decode(content: bytes) -> np.ndarray | None:
    """Pixels (height, width, bands) of a simple TIFF; None of one that is not simple, or not whole."""
    try:
        return _decode(content)
    except (struct.error, zlib.error, KeyError, ValueError, IndexError, TypeError, ArithmeticError):
        return None


def overflows(content: bytes) -> bool:
    """Whether a block of a TIFF of one deflate stream each unpacks to more bytes than it has room for.

    libtiff takes that for whole, and leaves up to 257 bytes of such a block as the memory was:
    libdeflate writes no match that does not fit.
    """
    with rasterio.MemoryFile(content) as memory, memory.open(driver="GTiff") as dataset:
        if dataset.compression is not Compression.deflate:
            return False
        together = dataset.interleaving is Interleaving.pixel
        width = np.dtype(dataset.dtypes[0]).itemsize * (dataset.count if together else 1)
        for band in [1] if together else dataset.indexes:
            for (y, x), window in dataset.block_windows(band):
                names = (f"BLOCK_{what}_{x}_{y}" for what in ("OFFSET", "SIZE"))
                start, size = (int(dataset.get_tag_item(name, "TIFF", band) or 0) for name in names)
                rows, columns = (
                    dataset.block_shapes[0] if dataset.is_tiled else (window.height, window.width)
                )
                if _exceeds(content[start : start + size], rows * columns * width):
                    return True
    return False


def _exceeds(piece: bytes, room: int) -> bool:
    """Whether a deflate stream holds more than that many bytes, as far as it can be read.

    libdeflate takes the last four bytes for the checksum, and reads on a bit as if zeros stood there.
    """
    unpack, size = zlib.decompressobj(), 0
    with suppress(zlib.error):
        for byte in piece[:-4] + bytes(8):
            size += len(unpack.decompress(bytes([byte])))
            if size > room:
                return True
    return False


def _decode(content: bytes) -> np.ndarray | None:
    order = {b"II*\0": "<", b"MM\0*": ">"}[content[:4]]
    tags = _tags(content, order)
    if set(tags) - _KNOWN or any(len(tags.get(tag, (1,))) != 1 for tag in _SINGLE):
        return None
    width, height = tags[_WIDTH][0], tags[_HEIGHT][0]
    bands = tags.get(_SAMPLES, (1,))[0]
    if width * height * bands > 1 << 20 or tags.get(_PLANAR, (1,))[0] != 1:
        return None
    bits, kinds = set(tags[_BITS]), set(tags.get(_FORMAT, (1,)))
    if len(bits) != 1 or len(kinds) != 1 or not bits <= {8, 16, 32, 64}:
        return None
    dtype = np.dtype(f"{order}{ {1: 'u', 2: 'i', 3: 'f'}[kinds.pop()] }{bits.pop() // 8}")
    tiled = _TILES in tags
    if not tiled and tags.keys() & {_TILE_WIDTH, _TILE_HEIGHT}:
        return None  # strips to us, tiles to libtiff
    block_width = tags[_TILE_WIDTH][0] if tiled else width
    block_height = tags[_TILE_HEIGHT][0] if tiled else min(tags.get(_ROWS, (height,))[0], height)
    starts, counts = tags[_TILES if tiled else _STRIPS], tags[_TILE_COUNTS if tiled else _COUNTS]
    across = -(-width // block_width)
    whole = np.zeros((height, width, bands), dtype.newbyteorder("="))
    blocks = -(-height // block_height) * across
    if len(starts) != blocks or len(counts) != blocks or block_width * block_height > 1 << 20:
        return None
    for number, (start, count) in enumerate(zip(starts, counts, strict=True)):
        y, x = number // across * block_height, number % across * block_width
        rows = block_height if tiled else min(block_height, height - y)
        shape = (rows, block_width, bands)
        piece = content[start : start + count]
        if not count or not start or len(piece) != count:
            return None
        block = _block(piece, tags, dtype, shape)
        inside = block[: height - y, : width - x]
        whole[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
    return whole


def _block(piece: bytes, tags: dict[int, Any], dtype: np.dtype, shape: Any) -> np.ndarray:
    compression = tags.get(_COMPRESSION, (1,))[0]
    if compression in (8, 32946):
        unpacked = zlib.decompressobj()
        piece = unpacked.decompress(piece, 1 << 24)
        if not unpacked.eof:
            raise ValueError
    elif compression != 1:
        raise ValueError
    predictor = tags.get(_PREDICTOR, (1,))[0]
    size = int(np.prod(shape)) * dtype.itemsize
    if len(piece) != size:
        raise ValueError
    if predictor == 3:
        return _floating(piece, dtype, shape)
    block = np.frombuffer(piece, dtype).reshape(shape).astype(dtype.newbyteorder("="))
    if predictor == 2 and dtype.kind != "f":
        return np.cumsum(block, axis=1, dtype=block.dtype)
    if predictor != 1:
        raise ValueError
    return block


def _floating(piece: bytes, dtype: np.dtype, shape: Any) -> np.ndarray:
    """Undo the floating-point predictor: differences of bytes, the highest bytes of a row first."""
    rows, width, bands = shape
    if dtype.kind != "f":
        raise ValueError
    planes = np.frombuffer(piece, np.uint8).reshape(rows, -1, bands)
    planes = np.cumsum(planes, axis=1, dtype=np.uint8).reshape(rows, dtype.itemsize, width * bands)
    big = np.ascontiguousarray(planes.transpose(0, 2, 1)).view(f">f{dtype.itemsize}")
    return big.reshape(shape).astype(f"f{dtype.itemsize}")


def _tags(content: bytes, order: str) -> dict[int, tuple[Any, ...]]:
    (start,) = struct.unpack_from(f"{order}I", content, 4)
    (count,) = struct.unpack_from(f"{order}H", content, start)
    tags: dict[int, tuple[Any, ...]] = {}
    for number in range(count):
        tag, kind, values, _ = struct.unpack_from(f"{order}HHI4s", content, start + 2 + 12 * number)
        if tag in tags or values > 1 << 16:
            raise ValueError
        if kind not in (1, 3, 4, 16):
            tags[tag] = ()
            continue
        code = _SIZES[kind]
        size = struct.calcsize(f"{order}{values}{code}")
        place = start + 2 + 12 * number + 8
        if size > 4:
            (place,) = struct.unpack_from(f"{order}I", content, place)
        tags[tag] = struct.unpack_from(f"{order}{values}{code}", content, place)
    return tags
