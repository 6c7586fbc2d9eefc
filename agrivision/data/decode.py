"""Bytes → pixels, straight into a batch's memory.

Each image file of a record is decoded into a plane of its own, (height, width, bands) as decoders
write it; the planes are put together on the device, where that costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from agrivision.data.labels import decompress_into
from agrivision.data.parts import decode_part
from agrivision.data.schema import Schema
from agrivision.errors import DatasetError


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """The memory of some tiles as it comes from the decoder.

    Attributes:
        planes: for each image file of a record (tiles, height, width, bands), in the data set's dtype.
        labels: (tiles, height, width) int16, the bits of `agrivision.data.labels`. Torch computes
            with int16 but hardly with uint16; bit 15 is then the sign.
    """

    planes: tuple[torch.Tensor, ...]
    labels: torch.Tensor

    @classmethod
    def allocate(cls, schema: Schema, tiles: int, *, pinned: bool = False) -> Pixels:
        """Memory for `tiles` tiles, page-locked for faster copies to a GPU where `pinned`."""
        side = schema.tile
        dtype = torch.from_numpy(np.empty(0, dtype=schema.dtype)).dtype
        return cls(
            planes=tuple(
                torch.empty((tiles, side, side, part.bands), dtype=dtype, pin_memory=pinned)
                for part in schema.parts
            ),
            labels=torch.empty((tiles, side, side), dtype=torch.int16, pin_memory=pinned),
        )

    def part(self, slots: slice) -> Pixels:
        """Some of the tiles, in the same memory."""
        return Pixels(planes=tuple(plane[slots] for plane in self.planes), labels=self.labels[slots])

    def to(self, device: torch.device) -> Pixels:
        """The same pixels on a device; from pinned memory the copy runs beside the computation."""
        return Pixels(
            planes=tuple(plane.to(device, non_blocking=True) for plane in self.planes),
            labels=self.labels.to(device, non_blocking=True),
        )

    def images(self) -> torch.Tensor:
        """All bands together: (tiles, bands, height, width) float32, in channels-last memory."""
        planes = [plane.to(torch.float32) for plane in self.planes]
        joined = planes[0] if len(planes) == 1 else torch.cat(planes, dim=-1)
        return joined.permute(0, 3, 1, 2)

    def label_bits(self) -> torch.Tensor:
        """The labels as int32 with bits 0 … 15, as loss and score take them."""
        return self.labels.to(torch.int32) & 0xFFFF


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
    if len(files) != len(schema.parts) + 1:
        raise DatasetError(f"a record of {len(files)} files where {len(schema.parts) + 1} belong")
    for content, part, plane in zip(files, schema.parts, pixels.planes, strict=False):
        decode_part(content, part, schema.dtype, schema.tile, out=plane[slot].numpy())
    decompress_into(files[-1], pixels.labels[slot].numpy().view(np.uint16))
