"""Memory that begins with a page.

Some processors copy several times slower to a place that lies a few bytes after the source's, counted
within pages. Files of a shard begin at multiples of 512 bytes, so the beginning of a page is never such
a place, as what `malloc` gives often is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_PAGE = 4096


def paged(size: int) -> NDArray[np.uint8]:
    """So many bytes, whatever they hold."""
    memory = np.empty(size + _PAGE, np.uint8)  # numpy asks for huge pages, torch does not
    begin = -memory.ctypes.data % _PAGE
    return memory[begin : begin + size]
