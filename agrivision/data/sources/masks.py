"""PNG masks: read strictly, and the uniform ones known again by their bytes."""

from __future__ import annotations

import io
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from agrivision.data.parts import describe
from agrivision.data.sources.source import Flaw, content_of

Mask = NDArray[np.bool_] | bool  # (height, width), or what holds for every pixel

_PNG = b"\x89PNG\r\n\x1a\n"
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

    def read(self, path: Path | str) -> Mask:
        """Where a PNG of one band is above 0.

        Raises:
            Flaw: it cannot be read, is damaged, or has another size or more bands.
        """
        content = content_of(path)
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
            _check_png(content)
            with Pillow.open(io.BytesIO(content), formats=["PNG"]) as image:
                shape = (image.height, image.width, len(image.getbands()))
                if shape != (*self.size, 1):
                    what = f"{describe(shape)} where {describe((*self.size, 1))} belong"
                    raise Flaw(path, "wrong size", what)
                mask: NDArray[np.bool_] = np.greater(np.asarray(image), 0)
        except (OSError, SyntaxError, ValueError) as error:
            raise Flaw(path, "unreadable", f"not a whole PNG ({error})") from None
        return mask


def _check_png(content: bytes) -> None:
    """Compare the checksum of every chunk: Pillow takes the pixels' chunks as they come.

    Raises:
        ValueError: it is not a PNG, is damaged, or ends early.
    """
    if not content.startswith(_PNG):
        raise ValueError("its first bytes are not those of a PNG")
    start, kind = len(_PNG), b""
    while kind != b"IEND":
        size, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        end = start + 8 + size
        if len(content) < end + 4:
            raise ValueError("it ends early")
        if zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise ValueError("it is damaged: a checksum differs")
        start = end + 4
