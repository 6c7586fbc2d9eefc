"""Bytes → pixels, straight into a batch's memory.

Each image file of a record is decoded into a plane of its own, (height, width, bands) as decoders
write it; the planes are put together on the device, where that costs next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agrivision.data.labels import Labels, decompress_into
from agrivision.data.memory import Lease, Memory
from agrivision.data.parts import decode_part, is_raw
from agrivision.data.schema import Schema
from agrivision.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The memory of some tiles as it comes from the decoder.

    It stays as it is for as long as somebody holds it or a tensor that was made of it; see
    `agrivision.data.memory`.

    Attributes:
        planes: for each image file of a record (tiles, height, width, bands), in the data set's dtype.
        labels: (tiles, height, width) int16, the bits of `agrivision.data.labels`. Torch computes
            with int16 but hardly with uint16; bit 15 is then the sign.
        lease: of the memory; None for tensors that have their own.
    """

    planes: tuple[torch.Tensor, ...]
    labels: torch.Tensor
    lease: Lease | None = None

    @classmethod
    def allocate(cls, schema: Schema, tiles: int, *, pinned: bool = False) -> Pixels:
        """Memory for `tiles` tiles, page-locked for faster copies to a GPU where `pinned`."""
        layout = Layout.of(schema, tiles)
        return layout.pixels(Memory(layout.size, pinned=pinned).lease())

    def part(self, slots: slice) -> Pixels:
        """Some of the tiles, in the same memory."""
        planes = tuple(plane[slots] for plane in self.planes)
        return Pixels(planes=planes, labels=self.labels[slots], lease=self.lease)

    def to(self, device: torch.device) -> Pixels:
        """The same pixels on a device; from pinned memory the copy runs beside the computation.

        On the CPU it is the same memory.
        """
        planes = tuple(plane.to(device, non_blocking=True) for plane in self.planes)
        labels = self.labels.to(device, non_blocking=True)
        if self.lease is None or device.type == "cpu":
            return Pixels(planes=planes, labels=labels, lease=self.lease)
        with torch.cuda.device(device):
            self.lease.copied()
        return Pixels(planes=planes, labels=labels)

    def images(self) -> torch.Tensor:
        """All bands together: (tiles, bands, height, width) float32, in channels-last memory."""
        planes = [plane.to(torch.float32) for plane in self.planes]
        joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        return joined.permute(0, 3, 1, 2)

    def label_bits(self) -> torch.Tensor:
        """The labels as int32 with bits 0 … 15, as loss and score take them."""
        return self.labels.to(torch.int32) & 0xFFFF

    def stand_in(self, slot: int, other: int | None) -> None:
        """Put another tile's image where one is missing, or zeros, without a valid pixel.

        Only in host memory, while nobody else holds it.

        Args:
            slot: which is missing.
            other: whose image it gets; None for zeros.
        """
        for plane in self.planes:
            pixels = plane.numpy()
            pixels[slot] = 0 if other is None else pixels[other]
        self.labels[slot] = 0


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the planes and the labels of some tiles are in one block of memory.

    Attributes:
        shapes: of the planes, and of the labels as the last.
        dtypes: of the same.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[np.dtype[Any], ...]

    @classmethod
    def of(cls, schema: Schema, tiles: int, *, images: bool = True) -> Layout:
        """For so many tiles of a data set, or for their labels alone."""
        area = (tiles, schema.tile, schema.tile)
        bands = [part.bands for part in schema.parts if part.bands] if images else []
        return cls(
            shapes=(*((*area, count) for count in bands), area),
            dtypes=(*(np.dtype(schema.dtype) for _ in bands), np.dtype(np.int16)),
        )

    @property
    def size(self) -> int:
        """Of the block in bytes."""
        return sum(_padded(shape, dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True))

    def pixels(self, lease: Lease) -> Pixels:
        """The tensors."""
        block, start = lease.array(), 0
        tensors = []
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            end = start + math.prod(shape) * dtype.itemsize
            tensors.append(torch.from_numpy(block[start:end].view(dtype).reshape(shape)))
            start += _padded(shape, dtype)
        return Pixels(planes=tuple(tensors[:-1]), labels=tensors[-1], lease=lease)


def _padded(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array, up to the next multiple of a cache line."""
    return -(-math.prod(shape) * dtype.itemsize // 64) * 64


class Frames:
    """A batch's memory as decoding threads see it; holds the memory.

    Args:
        schema: of the data set.
        pixels: of the batch; without planes only the labels are decoded.
    """

    def __init__(self, schema: Schema, pixels: Pixels) -> None:
        self._dtype, self._side, self._files = schema.dtype, schema.tile, len(schema.parts) + 1
        planes = iter([plane.numpy() for plane in pixels.planes])
        self._pictures = [
            (part, next(planes) if part.bands and pixels.planes else None) for part in schema.parts
        ]
        self._labels: Labels = pixels.labels.numpy().view(np.uint16)

    def places(self, slot: int) -> list[memoryview | None]:
        """Where the files of a tile are wanted as they are stored: those that hold plain pixels."""
        return [
            None if plane is None or not is_raw(part) else memoryview(plane[slot]).cast("B")
            for part, plane in self._pictures
        ]

    def labels(self, slot: int) -> Labels:
        """The decoded labels of a slot, (side, side) uint16, in the batch's memory."""
        labels: Labels = self._labels[slot]
        return labels

    def decode(self, files: Sequence[memoryview], slot: int) -> None:
        """Decode the files of one tile into a slot; those that are where `places` wants them stay.

        Raises:
            DatasetError: a file cannot be decoded or has another size.
        """
        if len(files) != self._files:
            raise DatasetError(f"a record of {len(files)} files where {self._files} belong")
        for content, (part, plane) in zip(files, self._pictures, strict=False):
            if plane is not None:
                decode_part(content, part, self._dtype, self._side, out=plane[slot])
        decompress_into(files[-1], self._labels[slot])


def decode_record(files: Sequence[memoryview], schema: Schema, pixels: Pixels, slot: int) -> None:
    """Decode the files of one tile into a slot of a batch's memory.

    Args:
        files: image files first, labels last, as `SplitReader.read` returns them.
        schema: of the data set.
        pixels: the batch's memory.
        slot: which tile of the batch.

    Raises:
        DatasetError: a file cannot be decoded or has another size.
    """
    Frames(schema, pixels).decode(files, slot)
