"""A batch and its samples' generators → a batch the network can take, on the device.

Every random choice is drawn from a generator of its own for (seed, epoch, tile), so that a sample is
changed in the same way whatever rank, thread or batch it is met in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

from agrivision.config import AugmentConfig
from agrivision.data.order import Stream, generator
from agrivision.data.schema import Schema


@dataclass(frozen=True, kw_only=True)
class Normaliser:
    """Pixels → what the network sees: less a mean, divided by a deviation, empty pixels zero.

    Attributes:
        mean: by band, in the units of the pixels.
        std: by band; 0 is taken as 1, so that a band that never varies is only centred.
        nodata: a pixel with this value in all bands is empty; None where there is none.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    nodata: float | None = None

    @classmethod
    def of(cls, schema: Schema, how: Literal["bands", "range"]) -> Normaliser:
        """From the statistics of a data set.

        Args:
            schema: of the data set.
            how: see `DataConfig.normalisation`.
        """
        known = schema.statistics
        if how == "bands":
            return cls(mean=known.mean, std=known.std, nodata=schema.nodata)
        largest = max(map(abs, (*known.minimum, *known.maximum)))
        bands = len(schema.bands)
        return cls(mean=(0.0,) * bands, std=(float(largest),) * bands, nodata=schema.nodata)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise (batch, bands, height, width) float32 pixels; NaN and infinite values become 0."""
        mean = images.new_tensor(self.mean).view(1, -1, 1, 1)
        std = images.new_tensor([value or 1.0 for value in self.std]).view(1, -1, 1, 1)
        normal = (images - mean) / std
        if self.nodata is not None:
            empty = (images == self.nodata).all(dim=1, keepdim=True)
            normal = normal.masked_fill(empty, 0.0)
        return torch.nan_to_num(normal, nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The random choices for one sample.

    Attributes:
        mirror: flip left and right.
        turns: quarter turns, counter-clockwise, after the flip.
        row: decides the upper edge of the crop, 0 … 1; see `_offset`.
        column: decides the left edge of the crop, 0 … 1.
        scale: factor by which the sample is enlarged.
        angle: degrees by which it is turned.
        shift: added to the normalised bands.
        gain: factor of each band.
    """

    mirror: bool
    turns: int
    row: float
    column: float
    scale: float
    angle: float
    shift: float
    gain: tuple[float, ...]


def draw(config: AugmentConfig, bands: int, seed: int, epoch: int, tile: int) -> Draw:
    """Draw a sample's changes; all numbers are drawn whether used or not, in a fixed order."""
    random = generator(seed, Stream.AUGMENT, epoch, tile).random(8 + bands)
    symmetric = 2 * random - 1  # -1 … 1
    contrast = 1 + config.contrast * symmetric[7]
    return Draw(
        mirror=config.flip and bool(random[0] < 0.5),
        turns=int(random[1] * 4) if config.rotate90 else 0,
        row=float(random[2]),
        column=float(random[3]),
        scale=float((1 + config.scale) ** symmetric[4]),
        angle=float(config.rotate * symmetric[5]),
        shift=float(config.brightness * symmetric[6]),
        gain=tuple((contrast * (1 + config.band_gain * symmetric[8:])).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Augment:
    """Crops, flips, turns, warps and changes the radiometry of training samples.

    Attributes:
        config: which changes, how strong.
        normaliser: of the data set.
        crop: side of the crop in pixels; None keeps the tiles whole.
        seed: of the run.
    """

    config: AugmentConfig
    normaliser: Normaliser
    crop: int | None
    seed: int

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, epoch: int, tiles: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Change a batch.

        Args:
            images: (batch, bands, side, side) float32 pixels as decoded.
            labels: (batch, side, side) int32 label bits.
            epoch: of the batch.
            tiles: their numbers in the split.

        Returns:
            images (batch, bands, crop, crop) float32, normalised, in channels-last memory, and
            labels (batch, crop, crop) int32; pixels from outside of a tile are invalid.
        """
        bands = images.shape[1]
        draws = [draw(self.config, bands, self.seed, epoch, tile) for tile in tiles]
        if self.config.scale or self.config.rotate:
            # What a warp moves in from outside is zero, as empty pixels are once they are normalised.
            changed, bits = self._warp(self.normaliser(images), labels, draws)
        else:
            cut, bits = self._cut(images, labels, draws)
            changed = self.normaliser(cut)  # after the crop: there is less of it
        gain = changed.new_tensor([one.gain for one in draws]).view(len(draws), bands, 1, 1)
        shift = changed.new_tensor([one.shift for one in draws]).view(len(draws), 1, 1, 1)
        if self.config.brightness or self.config.contrast or self.config.band_gain:
            changed = changed * gain + shift
        return changed.contiguous(memory_format=torch.channels_last), bits

    def _side(self, tile_side: int) -> int:
        return tile_side if self.crop is None else min(self.crop, tile_side)

    def _cut(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops and the eight symmetries: pixels move, none is computed."""
        side = self._side(images.shape[-1])
        cut = images.new_empty((len(draws), images.shape[1], side, side))
        bits = labels.new_empty((len(draws), side, side))
        for sample, one in enumerate(draws):
            top, left = (_offset(place, images.shape[-1], side) for place in (one.row, one.column))
            window = (..., slice(top, top + side), slice(left, left + side))
            cut[sample] = _symmetry(images[sample][window], one)
            bits[sample] = _symmetry(labels[sample][window], one)
        return cut, bits

    def _warp(
        self, images: torch.Tensor, labels: torch.Tensor, draws: Sequence[Draw]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, with scale and rotation, in one bilinear pass; labels take the nearest pixel."""
        side = self._side(images.shape[-1])
        matrices = np.stack([_matrix(one, images.shape[-1], side) for one in draws])
        grid = _grid(torch.from_numpy(matrices).to(images.device, torch.float32), side)
        cut = F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        # float32 holds all 16 bits exactly, and outside there is no valid bit.
        bits = F.grid_sample(
            labels.unsqueeze(1).to(torch.float32),
            grid,
            mode="nearest",
            padding_mode="zeros",
            align_corners=False,
        )
        return cut, bits.squeeze(1).to(torch.int32)


def _offset(share: float, tile_side: int, side: int) -> int:
    """Where a crop begins, from a number drawn between 0 and 1.

    Drawn from half a crop beyond both ends and moved in: pixels along the edge of a tile are in few of
    the places that a crop can have, and would hardly be seen.
    """
    room = tile_side - side
    beyond = min(room, side) // 2
    place = int(share * (room + 2 * beyond + 1)) - beyond
    return min(max(place, 0), room)


def _symmetry(pixels: torch.Tensor, one: Draw) -> torch.Tensor:
    mirrored = pixels.flip(-1) if one.mirror else pixels
    return torch.rot90(mirrored, one.turns, (-2, -1)) if one.turns else mirrored


def _grid(matrices: torch.Tensor, side: int) -> torch.Tensor:
    """Where each output pixel's centre comes from: (batch, side, side, 2), x before y.

    As `F.affine_grid`, but without a matrix product, whose bits may depend on the batch and whose
    precision on the GPU's settings.
    """
    centres = (torch.arange(side, device=matrices.device) * 2 + 1) / side - 1
    rows, columns = centres.view(1, side, 1, 1), centres.view(1, 1, side, 1)
    along_x, along_y, shift = (matrices[:, None, None, :, part] for part in range(3))
    return along_x * columns + along_y * rows + shift


def _matrix(one: Draw, tile_side: int, side: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Output → input coordinates, each -1 … 1 over its image, (2, 3), as `_grid` takes them."""
    turn = math.radians(90 * one.turns + one.angle)
    cos, sin = math.cos(turn), math.sin(turn)
    # Image rows grow downwards, so a counter-clockwise turn reads the input with this sign of sine.
    rotate = np.array([[cos, -sin], [sin, cos]])
    mirror = np.diag([-1.0 if one.mirror else 1.0, 1.0])
    room = tile_side - side
    offsets = [_offset(share, tile_side, side) for share in (one.column, one.row)]
    centre = [(2 * offset - room) / tile_side for offset in offsets]
    linear = mirror @ rotate * (side / tile_side / one.scale)
    return np.concatenate([linear, np.array(centre)[:, None]], axis=1)
