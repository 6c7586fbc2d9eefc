"""The memory of batches, used again once nobody can reach it.

Fresh memory costs a page fault every 4 KiB, which is a good part of the time that decoding takes. A
block is handed out as a lease: the object beneath all arrays and tensors that are made of it. When the
last of them is gone, wherever it was (a batch, a view of one sample, a thread that still decodes), the
block is free again. So memory never changes under somebody who holds it, and nothing has to be given
back by hand.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agrivision.data.pages import paged


class _Block:
    """One piece of memory, and the copies to a GPU that still read it."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        self.size = size
        self.copies: list[torch.cuda.Event] = []
        if pinned:
            self._owner: Any = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self.address: int = self._owner.data_ptr()
        else:
            self._owner = paged(size)
            self.address = self._owner.ctypes.data

    def settle(self) -> None:
        """Wait for the copies."""
        while self.copies:
            self.copies.pop().synchronize()

    def __del__(self) -> None:
        self.settle()


class Lease:
    """A block in use; see the module. Bytes of it are made with `array`."""

    __slots__ = ("__array_interface__", "__weakref__", "_block", "_free")

    def __init__(self, block: _Block, free: deque[_Block]) -> None:
        self._block, self._free = block, free
        self.__array_interface__ = {
            "version": 3,
            "shape": (block.size,),
            "typestr": "|u1",
            "data": (block.address, False),
        }

    def array(self) -> NDArray[np.uint8]:
        """All of it; what is made of this array keeps the lease."""
        return np.asarray(self)

    def copied(self) -> None:
        """The current CUDA stream was told to read the block: nobody writes before it has."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._block.copies.append(event)

    def __del__(self) -> None:
        self._free.append(self._block)  # by whatever thread, at whatever moment: one atomic step


class Memory:
    """Blocks of one size.

    Args:
        size: of a block in bytes.
        pinned: page-locked, for copies to a GPU that run beside the computation.
        keep: blocks that are kept while nobody uses them; more are made where more are in use.
    """

    def __init__(self, size: int, *, pinned: bool = False, keep: int = 1) -> None:
        self._size, self._pinned = size, pinned
        self._free: deque[_Block] = deque(maxlen=keep)

    def lease(self) -> Lease:
        """A block that nobody else uses, whatever it holds."""
        try:
            # Copies from the block that was freed first ended first; else the last is in the cache.
            block = self._free.popleft() if self._pinned else self._free.pop()
        except IndexError:
            block = _Block(self._size, pinned=self._pinned)
        block.settle()
        return Lease(block, self._free)
