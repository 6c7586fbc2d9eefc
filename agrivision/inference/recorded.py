"""The predictions of a split, kept on the disk while post-processing is chosen on them.

A choice needs many passes over the same predictions. The network is asked once; what it said goes into
a file without a name, which ends with the process, however that ends, so memory does not grow with the
split. Little has to be kept: the likeliest class of every pixel, which packs well, and exact
probabilities only where another class could still win, with some factors of the grid.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray
from safetensors.numpy import load, save

from agrivision.data.labels import VALID_BIT
from agrivision.maps.legend import NODATA
from agrivision.storage import storage_error

_SAFE = 1.0001  # products of float32 are rounded

Arrays = Mapping[str, NDArray[Any]]


class Spill:
    """Arrays in a file without a name.

    Args:
        folder: where there is room.

    Raises:
        StorageError, NotWritable: the disk refused.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        except OSError as error:
            raise storage_error(folder, error) from error
        self._places: list[tuple[int, int]] = []
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def put(self, arrays: Arrays) -> int:
        """Keep some arrays; returns their number.

        Raises:
            StorageError, NotWritable: the disk refused.
        """
        plain = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        packed = memoryview(zstandard.ZstdCompressor(level=1).compress(plain))
        self._places.append((self._end, len(packed)))
        self._end += len(packed)
        try:
            while packed:
                packed = packed[os.write(self._file.fileno(), packed) :]
        except OSError as error:
            raise storage_error(self._folder, error) from error
        return len(self._places) - 1

    def get(self, number: int) -> dict[str, NDArray[Any]]:
        """Arrays that were kept; safe to be called by several threads.

        Raises:
            StorageError: the disk refused.
        """
        start, size = self._places[number]
        try:
            packed = os.pread(self._file.fileno(), size, start)
        except OSError as error:
            raise storage_error(self._folder, error) from error
        found: dict[str, NDArray[Any]] = load(zstandard.ZstdDecompressor().decompress(packed))
        return found


class Recording:
    """What a network said of the tiles of a split, on one rank.

    Args:
        spill: where tiles are kept.
        classes: number of classes.
        spread: largest factor of a class over the smallest.

    Attributes:
        half: of the fields, that each tile belongs to, in the order in which they came.
        settled: int64 (2, classes, 2**classes): pixels by half, class and label set whose class no
            factor can change.
    """

    def __init__(self, spill: Spill, classes: int, spread: float) -> None:
        self._spill, self._classes, self._spread = spill, classes, spread * _SAFE
        self.half: list[int] = []
        self.settled = np.zeros((2, classes, 1 << classes), np.int64)
        self._numbers: list[int] = []
        self._seen = np.zeros(1 << classes, np.int64)

    def __len__(self) -> int:
        return len(self.half)

    def add(self, half: int, probabilities: torch.Tensor, labels: torch.Tensor) -> None:
        """Keep a tile.

        Args:
            half: of the fields, 0 or 1.
            probabilities: (classes, height, width) float32.
            labels: (height, width) label bits.
        """
        most = probabilities.amax(0)
        valid = ((labels >> VALID_BIT) & 1).bool()
        rivals = ~(probabilities * self._spread < most)
        doubtful = ((rivals.sum(0) != 1) & valid) if self._spread > _SAFE else torch.zeros_like(valid)
        ids = probabilities.argmax(0).to(torch.uint8).masked_fill_(~valid, NODATA).cpu().numpy()
        sets = ((labels & ((1 << self._classes) - 1)) * valid).cpu().numpy().astype(np.uint16)
        places = doubtful.flatten().nonzero().flatten()
        # Those that cannot win are zero, which packs.
        likely = (probabilities * rivals).flatten(1)[:, places].cpu().numpy()
        there = places.cpu().numpy().astype(np.int32)
        arrays = {"ids": ids, "sets": sets, "places": there, "probabilities": likely}
        self._numbers.append(self._spill.put(arrays))
        self.half.append(half)
        self._seen += np.bincount(sets.ravel(), minlength=len(self._seen))
        sure = valid.cpu().numpy().ravel()
        sure[there] = False
        pairs = (ids.ravel()[sure].astype(np.int64) << self._classes) + sets.ravel()[sure]
        self.settled[half] += np.bincount(pairs, minlength=self.settled[half].size).reshape(
            self.settled[half].shape
        )

    @property
    def seen(self) -> torch.Tensor:
        """How many pixels have each label set, int64 (2**classes,)."""
        return torch.from_numpy(self._seen)

    def tile(self, number: int) -> RecordedTile:
        """A tile, by its place among those that were added."""
        return RecordedTile(**self._spill.get(self._numbers[number]))


class RecordedTile:
    """What was kept of a tile.

    Attributes:
        ids: uint8 (height, width), the likeliest class, `NODATA` where there is no data.
        sets: uint16 (height, width), the bits of the label set; 0 where a pixel does not count.
        places: int32, the pixels where factors decide, counted row by row.
        probabilities: float32 (classes, n), of these.
    """

    def __init__(
        self,
        *,
        ids: NDArray[np.uint8],
        sets: NDArray[np.uint16],
        places: NDArray[np.int32],
        probabilities: NDArray[np.float32],
    ) -> None:
        self.ids, self.sets, self.places, self.probabilities = ids, sets, places, probabilities

    def likeliest(self, weights: NDArray[np.float32]) -> NDArray[np.uint8]:
        """The class of each pixel, `NODATA` where there is no data.

        Args:
            weights: float32 by class id, that probabilities are multiplied by.
        """
        ids = self.ids.copy()
        if len(self.places):
            found = (self.probabilities * weights[:, None]).argmax(0)
            ids.reshape(-1)[self.places] = found.astype(np.uint8)
        return ids

    def labels(self) -> torch.Tensor:
        """Label bits int32 (height, width), as `confusion_matrix` takes them."""
        valid = (self.ids != NODATA).astype(np.int32)
        return torch.from_numpy(self.sets.astype(np.int32) | (valid << VALID_BIT))
