"""How a scene is cut: windows that overlap and are blended, and blocks of them, the units of work.

The overlap-tile strategy of Ronneberger et al. 2015 shows the network more than the window that it is
to fill. What it says of neighbouring windows still differs a little, so windows overlap, and each fades
out where the next one fades in: the weights of a pixel add up to one, whatever windows cover it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from agrivision.data.sources.source import Window
from agrivision.errors import BadInput
from agrivision.inference.trained import Description

_GRID = 16  # pixels: margins and strides of a multiple let windows meet the down-sampling in one phase
_BATCH = 8
_PROCESSOR_PIXELS = 1 << 19  # that a processor computes at a time: it is no faster with more
_BLOCK = 2048  # pixels: about the side of a block; its sums take 4 bytes a class and pixel


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a scene is cut.

    Attributes:
        tile: side of the windows in pixels.
        margin: pixels that the network sees around each window; what it says of them is not used.
        overlap: pixels that neighbouring windows share, at most half a tile.
    """

    tile: int
    margin: int
    overlap: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= self.tile // 2:
            raise BadInput(
                f"overlap is {self.overlap}: of windows of {self.tile} pixels, 0 to {self.tile // 2}"
                " can be shared with the next"
            )

    @classmethod
    def of(
        cls,
        description: Description,
        tile: int | None = None,
        margin: int | None = None,
        overlap: int | None = None,
    ) -> Tiling:
        """As asked for; else the tiles of the training, with margins and overlaps of an eighth.

        An eighth on each side lets the network see a ground half as large again as the map it makes:
        enough to hide the seams, though its field of view reaches further.
        """
        side = description.tile if tile is None else tile
        eighth = -(-side // (8 * _GRID)) * _GRID
        return cls(
            tile=side,
            margin=eighth if margin is None else margin,
            overlap=min(eighth, side // 2) if overlap is None else overlap,
        )

    @property
    def stride(self) -> int:
        """Pixels from one window to the next."""
        return self.tile - self.overlap

    def batch(self, device: torch.device) -> int:
        """Windows in one forward pass, where nobody says."""
        if device.type != "cpu":
            return _BATCH
        return max(1, min(_BATCH, _PROCESSOR_PIXELS // (self.tile + 2 * self.margin) ** 2))

    def axis(self, length: int) -> Axis:
        """The windows along a side of a scene of so many pixels."""
        return Axis(tile=self.tile, stride=self.stride, length=length)


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The windows and blocks along one side of a scene.

    A block is a run of windows. Its extent is what they cover; its cell is what is its own to finish:
    from where it begins to where the next one begins. The two differ by the overlap.

    Attributes:
        tile: side of the windows in pixels.
        stride: pixels from one window to the next.
        length: of the side in pixels, at least 1.
    """

    tile: int
    stride: int
    length: int

    @property
    def windows(self) -> int:
        """How many there are; only the last reaches to the end of the side, or beyond it."""
        return 1 + max(0, -(-(self.length - self.tile) // self.stride))

    @property
    def per_block(self) -> int:
        """Windows in a block; the last one may have fewer."""
        return max(1, _BLOCK // self.stride)

    @property
    def blocks(self) -> int:
        """How many there are."""
        return -(-self.windows // self.per_block)

    @property
    def overlap(self) -> int:
        """Pixels that neighbouring windows share."""
        return self.tile - self.stride

    def members(self, block: int) -> range:
        """The windows of a block."""
        first = block * self.per_block
        return range(first, min(first + self.per_block, self.windows))

    def start(self, window: int) -> int:
        """The first pixel of a window."""
        return window * self.stride

    def extent(self, block: int) -> tuple[int, int]:
        """The pixels of the scene that the block's windows cover."""
        members = self.members(block)
        return self.start(members[0]), min(self.start(members[-1]) + self.tile, self.length)

    def cell(self, block: int) -> tuple[int, int]:
        """The pixels that the block finishes."""
        begin, end = self.extent(block)
        return begin, end if block == self.blocks - 1 else self.start(self.members(block).stop)

    def weights(self, window: int) -> NDArray[np.float32]:
        """The weight of each pixel of a window, (tile,), 0 to 1.

        Where two windows overlap it is sin² of one and cos² of the other: smooth, and one in sum.
        """
        weights = np.ones(self.tile, np.float32)
        places = (np.arange(self.overlap) + 0.5) / max(1, self.overlap)
        rising = (np.sin(places * np.pi / 2) ** 2).astype(np.float32)
        if window:
            weights[: self.overlap] = rising
        if window < self.windows - 1:
            weights[self.stride :] *= 1 - rising
        return weights


@dataclass(frozen=True, kw_only=True)
class Block:
    """A unit of work: some windows of a scene, whose result depends on nothing else.

    Attributes:
        number: in rows from the top, each from the left.
        row: of blocks.
        column: of blocks.
        extent: what its windows cover of the scene.
        cell: what it finishes; the cells of all blocks cover the scene once.
        reach: as the extent, but with what its windows have beyond the scene's edges.
    """

    number: int
    row: int
    column: int
    extent: Window
    cell: Window
    reach: Window


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All windows and blocks of a scene.

    Attributes:
        rows: along the height.
        columns: along the width.
    """

    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, tiling: Tiling, height: int, width: int) -> Grid:
        """Of a scene of so many pixels."""
        return cls(rows=tiling.axis(height), columns=tiling.axis(width))

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.rows.blocks * self.columns.blocks

    def block(self, number: int) -> Block:
        """One of them."""
        row, column = divmod(number, self.columns.blocks)
        (y1, y2), (x1, x2) = self.rows.extent(row), self.columns.extent(column)
        (top, bottom), (left, right) = self.rows.cell(row), self.columns.cell(column)
        last = self.rows.members(row)[-1], self.columns.members(column)[-1]
        return Block(
            number=number,
            row=row,
            column=column,
            extent=(x1, y1, x2, y2),
            cell=(left, top, right, bottom),
            reach=(
                x1,
                y1,
                self.columns.start(last[1]) + self.columns.tile,
                self.rows.start(last[0]) + self.rows.tile,
            ),
        )

    def windows(self, block: Block) -> Iterator[tuple[int, int]]:
        """Row and column of each window of a block."""
        for row in self.rows.members(block.row):
            for column in self.columns.members(block.column):
                yield row, column

    def count(self, block: Block) -> int:
        """How many windows a block has."""
        return len(self.rows.members(block.row)) * len(self.columns.members(block.column))
