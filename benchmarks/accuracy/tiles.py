"""Tiles as the peers take them: in memory, one label a pixel, cropped and mirrored by chance."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from agrivision.data.labels import VALID_BIT
from agrivision.data.loader import evaluation_batches
from agrivision.data.schema import Schema
from agrivision.data.shards import SplitReader
from agrivision.world import World

IGNORED = 255  # in targets: the pixel does not count
_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """A split in memory.

    Attributes:
        pixels: (tiles, bands, side, side) as in the data set.
        targets: uint8 (tiles, side, side): class ids, or IGNORED.
    """

    pixels: Tensor
    targets: Tensor


def read(dataset: Path, split: str) -> Tiles:
    """Decode a whole split."""
    schema = Schema.read(dataset)
    reader = SplitReader(dataset, schema, split)
    pixels, targets = [], []
    for batch in evaluation_batches(reader, World(), batch_size=_TOGETHER, threads=1):
        joined = torch.cat(batch.pixels.planes, dim=-1)  # a copy: the memory is used again
        pixels.append(joined.permute(0, 3, 1, 2).contiguous())
        targets.append(first_label(batch.pixels.label_bits(), len(schema.classes)))
    return Tiles(pixels=torch.cat(pixels), targets=torch.cat(targets))


def first_label(bits: Tensor, classes: int) -> Tensor:
    """The lowest class id of each label set, as who knows of one label a pixel takes it.

    Args:
        bits: int32 (...), bit c for class c, bit 15 for valid.
        classes: number of scored classes.

    Returns:
        uint8 of the same shape; IGNORED where no label counts.
    """
    first = torch.full_like(bits, IGNORED, dtype=torch.uint8)
    for class_id in reversed(range(classes)):
        first[(bits >> class_id) & 1 == 1] = class_id
    first[(bits >> VALID_BIT) & 1 == 0] = IGNORED
    return first


class Crops(Dataset[dict[str, Tensor]]):
    """Random crops of tiles, mirrored along both axes by chance, from torch's global generator.

    Args:
        tiles: to crop.
        side: of a crop in pixels; tiles that are not larger stay whole.
    """

    def __init__(self, tiles: Tiles, side: int) -> None:
        self._tiles, self._side = tiles, min(side, tiles.targets.shape[-1])

    def __len__(self) -> int:
        return len(self._tiles.targets)

    def __getitem__(self, tile: int) -> dict[str, Tensor]:
        """`image` float32 (bands, side, side), not normalised, and `mask` int64 (side, side)."""
        room = self._tiles.targets.shape[-1] - self._side + 1
        top, left = torch.randint(room, (2,)).tolist()
        window = (..., slice(top, top + self._side), slice(left, left + self._side))
        image, mask = self._tiles.pixels[tile][window], self._tiles.targets[tile][window]
        flips = [dim for dim in (-2, -1) if torch.rand(()) < 0.5]
        return {"image": image.flip(flips).float(), "mask": mask.flip(flips).long()}
