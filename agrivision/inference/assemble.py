"""Blocks → the map: where blocks overlap, their sums are added up first.

What a block alone decides is kept as it is decided. Along its edges other blocks have a say: there it
keeps its sums, on the upper and left edge of its own cell, and beyond the lower and right one, where
the cells of the next blocks begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agrivision.data.sources.source import Window
from agrivision.inference.blend import Sums, Values, decide
from agrivision.inference.store import Store
from agrivision.inference.tiling import Block, Grid

Weights = NDArray[np.float32] | None  # of the classes, see `decide`

_UP, _LEFT, _DOWN, _RIGHT = "top", "left", "bottom", "right"


def keep(
    store: Store,
    grid: Grid,
    block: Block,
    sums: Sums,
    valid: NDArray[np.bool_],
    *,
    probabilities: bool,
    weights: Weights = None,
) -> None:
    """Put what a block gave into the store.

    Args:
        store: of the scene.
        grid: of the scene.
        block: the block.
        sums: (classes, rows, columns) of its extent.
        valid: where its extent has data.
        probabilities: whether the map is to have those of all classes.
        weights: see `decide`.

    Raises:
        StorageError, NotWritable: the disk refused.
    """
    height, width = _size(block.cell)
    down, across = grid.rows.overlap, grid.columns.overlap
    own = decide(
        sums[:, :height, :width], valid[:height, :width], probabilities=probabilities, weights=weights
    )
    arrays: dict[str, NDArray[Any]] = {"ids": own.ids, "confidence": own.confidence}
    if own.probabilities is not None:
        arrays["probabilities"] = own.probabilities
    if block.row:
        arrays[_UP] = sums[:, :down]
    if block.column:
        arrays[_LEFT] = sums[:, :, :across]
    if block.row < grid.rows.blocks - 1:
        arrays[_DOWN] = sums[:, height:]
    if block.column < grid.columns.blocks - 1:
        arrays[_RIGHT] = sums[:, :, width:]
    store.put(block.number, arrays)


def assemble(
    store: Store, grid: Grid, classes: int, *, probabilities: bool, weights: Weights = None
) -> Iterator[tuple[Window, Values]]:
    """The map cell by cell, once all blocks are there.

    Args:
        store: with all blocks.
        grid: of the scene.
        classes: how many there are.
        probabilities: whether those of all classes are wanted, with which the blocks were kept then.
        weights: with which the blocks were kept.

    Raises:
        StorageError: a block is damaged.
    """
    for number in range(grid.blocks):
        block = grid.block(number)
        yield (
            block.cell,
            _finish(store, grid, block, classes, probabilities=probabilities, weights=weights),
        )


def _finish(
    store: Store, grid: Grid, block: Block, classes: int, *, probabilities: bool, weights: Weights
) -> Values:
    height, width = _size(block.cell)
    number = block.number
    ids = store.get(number, "ids", "uint8", (height, width)).copy()
    confidence = store.get(number, "confidence", "uint8", (height, width)).copy()
    all_ = None
    if probabilities:
        all_ = store.get(number, "probabilities", "uint8", (classes, height, width)).copy()
    whole = Values(ids=ids, confidence=confidence, probabilities=all_)
    for rows, columns, sums in _edges(store, grid, block, classes):
        valid = confidence[rows, columns] > 0  # decided by the block alone, which knows it as well
        part = decide(sums, valid, probabilities=probabilities, weights=weights)
        ids[rows, columns], confidence[rows, columns] = part.ids, part.confidence
        if all_ is not None and part.probabilities is not None:
            all_[:, rows, columns] = part.probabilities
    return whole


def _edges(store: Store, grid: Grid, block: Block, classes: int) -> Iterator[tuple[slice, slice, Sums]]:
    """The sums of all blocks along the upper and left edge of a cell: its rows, columns, and sums."""
    height, width = _size(block.cell)
    down, across = min(grid.rows.overlap, height), min(grid.columns.overlap, width)
    if block.row and down:
        sums = _strip(store, grid, block, _UP, classes)[:, :down, :width]
        above = grid.block(block.number - grid.columns.blocks)
        sums = sums + _strip(store, grid, above, _DOWN, classes)[:, :down, :width]
        if block.column and across:
            sums[:, :, :across] += _beside(store, grid, block, classes)[:, :down, :across]
            corner = grid.block(above.number - 1)
            beyond = _size(corner.cell)[1]
            sums[:, :, :across] += _strip(store, grid, corner, _DOWN, classes)[
                :, :down, beyond : beyond + across
            ]
        yield slice(0, down), slice(0, width), sums
    if block.column and across:
        begin = down if block.row else 0
        sums = _strip(store, grid, block, _LEFT, classes)[:, begin:height, :across]
        sums = sums + _beside(store, grid, block, classes)[:, begin:height, :across]
        yield slice(begin, height), slice(0, across), sums


def _beside(store: Store, grid: Grid, block: Block, classes: int) -> Sums:
    return _strip(store, grid, grid.block(block.number - 1), _RIGHT, classes)


def _strip(store: Store, grid: Grid, block: Block, edge: str, classes: int) -> Sums:
    """The sums that a block kept along one edge."""
    height, width = _size(block.extent)
    rows, columns = _size(block.cell)
    shape = {
        _UP: (min(grid.rows.overlap, height), width),
        _LEFT: (height, min(grid.columns.overlap, width)),
        _DOWN: (height - rows, width),
        _RIGHT: (height, width - columns),
    }[edge]
    found: Sums = store.get(block.number, edge, "uint16", (classes, *shape))
    return found


def _size(window: Window) -> tuple[int, int]:
    """Rows and columns."""
    return window[3] - window[1], window[2] - window[0]
