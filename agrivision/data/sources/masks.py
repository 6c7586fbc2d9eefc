"""PNG masks: read strictly, and the uniform ones known again by their bytes."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.data.parts import describe
from agrivision.data.sources.source import Flaw, content_of
from agrivision.errors import DatasetError

Mask = NDArray[np.bool_] | bool  # (height, width), or what holds for every pixel

Chunk = tuple[bytes, memoryview]  # kind and content

_PNG = b"\x89PNG\r\n\x1a\n"
_PLAIN = {b"IHDR", b"IDAT", b"IEND"}
_VALUES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a pixel, by the number of the colour type
# First row and every how many, first column and every how many; PNG specification, 8.2.
_ADAM7 = (
    ((0, 8), (0, 8)),
    ((0, 8), (4, 8)),
    ((4, 8), (0, 4)),
    ((0, 4), (2, 4)),
    ((2, 4), (0, 2)),
    ((0, 2), (1, 2)),
    ((1, 2), (0, 1)),
)
_METADATA = 1 << 20  # bytes of a mask besides its pixels: text, a colour profile
NOT_WHOLE = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    struct.error,
    zlib.error,
    imagecodecs.PngError,
    Pillow.DecompressionBombError,
)
_KNOWN = 16  # uniform masks to remember; one encoder writes two


@dataclass(frozen=True, kw_only=True)
class MaskReader:
    """Reads masks of one size.

    Most masks of a tile are empty, and those of validity full. One encoder writes the same bytes for
    all of them, so that only the first has to be decoded.

    Attributes:
        size: height and width in pixels.
    """

    size: tuple[int, int]
    _uniform: dict[bytes, bool] = field(default_factory=dict)  # by the content of whole, checked files

    @property
    def _most(self) -> int:
        """Bytes that a mask may have: two a pixel, uncompressed, and one a row."""
        height, width = self.size
        return height * (2 * width + 1) + _METADATA

    def read(self, path: Path | str) -> Mask:
        """Where a PNG of one band is above 0.

        Raises:
            Flaw: it cannot be read, is damaged, or has another size or more bands.
        """
        content = content_of(path, most=self._most)
        known = self._uniform.get(content)
        if known is not None:
            return known
        mask = self._decode(path, content)
        value = bool(mask[0, 0])
        if np.not_equal(mask, value).any():
            return mask
        if len(self._uniform) < _KNOWN:
            self._uniform[content] = value
        return value

    def _decode(self, path: Path | str, content: bytes) -> NDArray[np.bool_]:
        try:
            pixels = png_pixels(content, self.size)
        except DatasetError as error:
            raise Flaw(path, "wrong size", str(error)) from None
        except NOT_WHOLE as error:
            raise Flaw(path, "unreadable", f"not a whole PNG ({error})") from None
        mask: NDArray[np.bool_] = np.greater(pixels, 0)
        return mask


def png_pixels(content: bytes, size: tuple[int, int]) -> NDArray[Any]:
    """Pixels of a PNG of one band and of any kind; of one with a palette the indexes.

    Args:
        content: of the file.
        size: height and width that it must have; checked before memory is taken.

    Raises:
        DatasetError: it has another size or more bands.
        `NOT_WHOLE`: it is damaged, or holds fewer pixels than its header says.
    """
    chunks = png_chunks(content)
    return _fast(content, size) if _is_plain(content, chunks) else _any(content, chunks, size)


def _fast(content: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Pixels of a plain grey PNG: libpng alone takes half of the time that Pillow does."""
    _check_shape((*_size_of(content), 1), size)
    pixels: NDArray[np.uint8] = imagecodecs.png_decode(content)
    return pixels


def _any(content: bytes, chunks: Sequence[Chunk], size: tuple[int, int]) -> NDArray[Any]:
    """Pixels of a PNG of any kind, by Pillow, which fills up what is missing with zeros."""
    if _size_of(content) != size:
        _check_shape((*_size_of(content), 1), size)
    _check_complete(content, chunks)
    with Pillow.open(io.BytesIO(content), formats=["PNG"]) as image:
        _check_shape((image.height, image.width, len(image.getbands())), size)
        return np.array(image)  # torch warns of pixels that cannot be written


def _size_of(content: bytes) -> tuple[int, int]:
    """Height and width of a PNG that begins as `png_chunks` wants it."""
    return int.from_bytes(content[20:24], "big"), int.from_bytes(content[16:20], "big")


def _check_shape(shape: tuple[int, int, int], size: tuple[int, int]) -> None:
    if shape != (*size, 1):
        raise DatasetError(f"{describe(shape)} where {describe((*size, 1))} belong")


def _check_complete(content: bytes, chunks: Sequence[Chunk]) -> None:
    """Check that there are as many bytes of pixels as the header wants, and in one piece.

    Raises:
        ValueError: there are not.
        zlib.error: they are damaged.
    """
    places = [place for place, (kind, _) in enumerate(chunks) if kind == b"IDAT"]
    if not places or places[-1] - places[0] + 1 != len(places):
        raise ValueError("its pixels are not in one piece")
    wanted, found = _bytes_of_pixels(content), 0
    inflate = zlib.decompressobj()
    for place in places:
        found += len(inflate.decompress(chunks[place][1], wanted - found))
        if found == wanted:
            return
    raise ValueError(f"it has {found} bytes of pixels instead of {wanted}")


def _bytes_of_pixels(content: bytes) -> int:
    """What the pixels of a PNG take, with the byte before each row that names its filter."""
    height, width = _size_of(content)
    depth, colour, interlace = content[24], content[25], content[28]
    if colour not in _VALUES or interlace > 1:
        raise ValueError(f"there is no colour type {colour} with interlacing {interlace}")
    bits = depth * _VALUES[colour]
    return sum(
        rows * (1 + (columns * bits + 7) // 8)
        for rows, columns in _passes(height, width, interlaced=interlace == 1)
        if columns
    )


def _passes(height: int, width: int, *, interlaced: bool) -> Iterator[tuple[int, int]]:
    """Rows and columns of each of the pictures that a PNG is put together from (Adam7: seven)."""
    if not interlaced:
        yield height, width
        return
    for (top, down), (left, right) in _ADAM7:
        yield max(0, -(-(height - top) // down)), max(0, -(-(width - left) // right))


def _is_plain(content: bytes, chunks: Sequence[Chunk]) -> bool:
    """Grey, 8 bits, not interlaced, and with nothing in it that could change the pixels."""
    depth, colour, interlace = content[24], content[25], content[28]
    return (depth, colour, interlace) == (8, 0, 0) and {kind for kind, _ in chunks} <= _PLAIN


def png_chunks(content: bytes) -> list[Chunk]:
    """Kind and content of each chunk; compares their checksums, since Pillow takes pixels as they come.

    Raises:
        ValueError: it is not a PNG, is damaged, ends early, or has another header than the first.
    """
    if not content.startswith(_PNG):
        raise ValueError("its first bytes are not those of a PNG")
    view = memoryview(content)
    start, kind, chunks = len(_PNG), b"", list[Chunk]()
    while kind != b"IEND":
        size, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        end = start + 8 + size
        if len(content) < end + 4:
            raise ValueError("it ends early")
        if zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("it is damaged: a checksum differs")
        chunks.append((kind, view[start + 8 : end]))
        start = end + 4
    kinds = [kind for kind, _ in chunks]
    if kinds[0] != b"IHDR" or kinds.count(b"IHDR") > 1 or int.from_bytes(content[8:12], "big") != 13:
        raise ValueError("it does not have one header at its beginning")
    return chunks
